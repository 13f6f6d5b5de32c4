"""``shift_channels_`` beside ATen's sum with a bias, under pytest-benchmark; on a GPU where there is one.

    pytest benchmarks/shift_channels.py

A convolution's bias is added to its output, of MobileNetV2 and ResNet-50 at batch 128 (2 on a CPU).
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.ops import shift_channels_

DEVICE, BATCH = ("cuda", 128) if torch.cuda.is_available() else ("cpu", 2)
OUTPUTS = ((96, 112), (64, 56), (256, 56), (384, 14), (2048, 7))


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize(("channels", "size"), OUTPUTS)
def test_shift_channels(
    benchmark, channels: int, size: int, memory_format: torch.memory_format, kernel: str
) -> None:
    output = torch.randn(BATCH, channels, size, size, device=DEVICE).bfloat16()
    output = output.contiguous(memory_format=memory_format)
    shift = torch.randn(channels, device=DEVICE)
    bias = shift.bfloat16().view(1, -1, 1, 1)

    def call() -> None:
        if kernel == "auto":
            shift_channels_(output, shift)
        else:
            output.add_(bias)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
