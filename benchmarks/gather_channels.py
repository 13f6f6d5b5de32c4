"""``gather_channels`` beside ``index_select``, under pytest-benchmark.

    pytest benchmarks/gather_channels.py

``trady bench --operator gather_channels`` has every layer, in interleaved rounds and beside the roofline.
"""

from __future__ import annotations

import pytest

from trady_kernels.benchmark.layers import CONVS, ConvLayer
from trady_kernels.benchmark.rows import Setting, gather_calls
from trady_kernels.ops import gather_channels
from trady_kernels.ops.layout import FORMATS

FEW = [layer for layer in CONVS if layer.network == "resnet18" and layer.kernel == 3]


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 12))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.label)
def test_gather_channels(benchmark, layer: ConvLayer, memory_format: str, selected: int, kernel: str) -> None:
    (call,) = gather_calls(layer, Setting(memory_format), [selected])
    if kernel == "auto":
        benchmark(gather_channels, *call.arguments)
    else:
        benchmark(call.peer)
