"""``linear_channel_grad`` beside a matrix product on the compact input, under pytest-benchmark.

    pytest benchmarks/linear_channel_grad.py

``trady bench --family linear`` has every number of channels, in interleaved rounds and beside the roofline.
"""

from __future__ import annotations

import pytest

from trady_kernels.benchmark.layers import LINEARS, LinearLayer, distinct
from trady_kernels.benchmark.rows import Setting, linear_calls
from trady_kernels.ops import linear_channel_grad


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 12))
@pytest.mark.parametrize("layer", distinct(LINEARS), ids=lambda layer: layer.label)
def test_linear_channel_grad(benchmark, layer: LinearLayer, selected: int, kernel: str) -> None:
    (call,) = linear_calls(layer, Setting(), [selected])
    if kernel == "auto":
        benchmark(linear_channel_grad, *call.arguments)
    else:
        benchmark(call.peer)
