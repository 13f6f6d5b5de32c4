"""``gather_channels`` beside ``index_select``, under pytest-benchmark.

pytest benchmarks/gather_channels.py
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.ops import backend, gather_channels

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("selected", (1, 4, 16))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gather_channels(benchmark, memory_format: str, selected: int, kernel: str) -> None:
    input = torch.randn(8, 64, 56, 56).contiguous(memory_format=FORMATS[memory_format])
    with backend(kernel):
        benchmark(gather_channels, input, torch.arange(0, 64, 64 // selected))
