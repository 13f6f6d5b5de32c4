"""``scatter_channels_`` beside ATen's ``index_copy_``, on weights of MobileNetV2 and ResNet-18, under pytest-benchmark.

    pytest benchmarks/scatter_channels.py

Every step of an optimiser writes the rows of each sparse layer into its weight.
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.benchmark.layers import CONVS, ConvLayer, distinct
from trady_kernels.ops import scatter_channels_

DENSE = [
    layer
    for layer in distinct(CONVS)
    if layer.dense and layer.network in ("mobilenet_v2", "resnet18") and layer.in_channels >= 16
]


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("share", (20, 4))
@pytest.mark.parametrize("layer", DENSE, ids=lambda layer: layer.label)
def test_scatter_channels(benchmark, layer: ConvLayer, share: int, kernel: str) -> None:
    k = max(1, layer.in_channels // share)
    weight = torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    channels = torch.randperm(layer.in_channels)[:k].sort().values
    rows = torch.randn(k, layer.out_channels, layer.kernel, layer.kernel)
    if kernel == "auto":
        benchmark(scatter_channels_, weight, channels, rows, 1)
    else:
        benchmark(weight.transpose(0, 1).index_copy_, 0, channels, rows)
