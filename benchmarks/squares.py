"""``conv2d_channel_grad_squares`` beside squaring the gradient itself, under pytest-benchmark.

pytest benchmarks/squares.py
"""

from __future__ import annotations

import pytest

from trady_kernels.benchmark.layers import CONVS, ConvLayer
from trady_kernels.benchmark.rows import Setting, conv2d_calls
from trady_kernels.ops import conv2d_channel_grad, conv2d_channel_grad_squares

LAYERS = [layer for layer in CONVS if layer.network == "resnet18" and layer.in_channels >= 64]


@pytest.mark.parametrize("what", ("squares", "gradient squared"))
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_channel_grad_squares(benchmark, layer: ConvLayer, what: str) -> None:
    (call,) = conv2d_calls(layer, Setting(), [layer.in_channels])
    if what == "squares":
        benchmark(conv2d_channel_grad_squares, *call.arguments)
    else:
        benchmark(lambda: conv2d_channel_grad(*call.arguments).square().sum((1, 2, 3)))
