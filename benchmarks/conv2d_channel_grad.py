"""``conv2d_channel_grad`` beside ATen on the compact input, under pytest-benchmark.

    pytest benchmarks/conv2d_channel_grad.py

``trady bench`` has the whole table: ratios within interleaved rounds, every number of channels, the roofline.
"""

from __future__ import annotations

import pytest

from trady_kernels.benchmark.layers import CONVS, ConvLayer, distinct
from trady_kernels.benchmark.rows import Setting, conv2d_calls
from trady_kernels.ops import conv2d_channel_grad
from trady_kernels.ops.layout import FORMATS


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 12))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layer", distinct(CONVS), ids=lambda layer: layer.label)
def test_conv2d_channel_grad(
    benchmark, layer: ConvLayer, memory_format: str, selected: int, kernel: str
) -> None:
    k = min(selected, layer.in_channels)
    (call,) = conv2d_calls(layer, Setting(memory_format), [k])
    if kernel == "auto":
        benchmark(conv2d_channel_grad, *call.arguments)
    else:
        benchmark(call.peer)
