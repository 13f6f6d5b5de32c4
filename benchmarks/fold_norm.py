"""``fold_norm`` beside its reference, which takes ATen eight launches, under pytest-benchmark; on a GPU where there is one.

    pytest benchmarks/fold_norm.py

Every sparse convolution with a frozen norm behind it is folded twice a step.
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.ops import fold_norm
from trady_kernels.ops.backend import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ((96, 1, 3, 3), (96, 16, 1, 1), (64, 64, 3, 3), (2048, 512, 1, 1))


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_fold_norm(benchmark, shape: tuple[int, ...], kernel: str) -> None:
    weight = torch.randn(shape, device=DEVICE)
    values = [torch.rand(shape[0], device=DEVICE) for _ in range(5)]
    call = fold_norm if kernel == "auto" else OPERATORS["fold_norm"].kernels["reference"]

    def run() -> None:
        call(weight, *values, 1e-5, torch.bfloat16)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
