"""``linear_channel_grad`` beside ATen's matrix product, under pytest-benchmark.

pytest benchmarks/linear_channel_grad.py
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.benchmark import LINEARS
from trady_kernels.ops import backend, linear_channel_grad


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 16))
@pytest.mark.parametrize("size", LINEARS, ids=lambda size: "x".join(map(str, size)))
def test_linear_channel_grad(benchmark, size: tuple[int, int, int], selected: int, kernel: str) -> None:
    rows, _, out_features = size
    with backend(kernel):
        benchmark(linear_channel_grad, torch.randn(rows, selected), torch.randn(rows, out_features))
