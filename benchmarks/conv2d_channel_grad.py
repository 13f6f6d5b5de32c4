"""``conv2d_channel_grad`` beside ATen on the compact input, under pytest-benchmark.

    pytest benchmarks/conv2d_channel_grad.py

``trady bench`` has the whole table: every layer, ratios within interleaved rounds.
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.benchmark import LAYERS, ConvLayer
from trady_kernels.ops import backend, conv2d_channel_grad

FEW = [layer for layer in LAYERS if layer.network == "resnet18" and layer.size <= 28]


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 16))
@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.label)
def test_conv2d_channel_grad(benchmark, layer: ConvLayer, selected: int, kernel: str) -> None:
    x = torch.randn(8, selected, layer.size, layer.size)
    dy = torch.randn(8, layer.out_channels, layer.out_size, layer.out_size)
    geometry = tuple((v, v) for v in (layer.kernel, layer.stride, layer.padding, 1))
    with backend(kernel):
        benchmark(
            conv2d_channel_grad, x, dy, torch.arange(selected), layer.in_channels, *geometry, layer.groups
        )
