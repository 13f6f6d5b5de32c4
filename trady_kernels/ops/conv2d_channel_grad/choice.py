"""Which kernel ``auto`` takes for ``conv2d_channel_grad``, by shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trady_kernels.ops.layout import memory_format_of

ANY = 1 << 62


@dataclass(frozen=True)
class Limit:
    """Up to how many selected channels the C++ kernel is taken; above, ATen on the compact input."""

    family: str
    memory_format: torch.memory_format  # of grad_output
    most_selected: int


#: Measured in float32 on one thread with AVX-512 against oneDNN (torch 2.13), on the layers of MobileNetV2,
#: ResNet-18 and EfficientNet-Lite0 at batch 8 (benchmarks/results). ``ANY`` in channels_last is also where oneDNN is
#: not to be trusted: strided 1x1 with few channels (oneDNN#6035), strided and padded depthwise (pytorch#50042).
LIMITS = (
    Limit("1x1", torch.contiguous_format, 16),
    Limit("1x1", torch.channels_last, 16),
    Limit("1x1 strided", torch.contiguous_format, 48),
    Limit("1x1 strided", torch.channels_last, ANY),
    Limit("kxk", torch.contiguous_format, 12),
    Limit("kxk", torch.channels_last, 4),
    Limit("grouped", torch.contiguous_format, ANY),
    Limit("grouped", torch.channels_last, ANY),
)
_MOST = {(limit.family, limit.memory_format): limit.most_selected for limit in LIMITS}


def family(kernel_size: Sequence[int], stride: Sequence[int], groups: int) -> str:
    """The convolution's row of the table."""
    if groups != 1:
        return "grouped"
    if kernel_size[0] != 1 or kernel_size[1] != 1:
        return "kxk"
    return "1x1" if stride[0] == 1 and stride[1] == 1 else "1x1 strided"


def choose(
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str:
    """Backend for these arguments. Simple comparisons only: it is traced with symbolic sizes."""
    if input_selected.is_cuda:
        return "aten"
    # ATen rounds the half types' sums to the half type before they can be widened, and has no blocked float64 kernel.
    if input_selected.dtype != torch.float32:
        return "cpp"
    most = _MOST[family(kernel_size, stride, groups), memory_format_of(grad_output)]
    return "cpp" if channels.shape[0] <= most else "aten"
