"""The one table by which ``auto`` takes a C++ kernel or ATen on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ANY = 1 << 62

_FLOAT = (torch.float32,)


@dataclass(frozen=True)
class Limit:
    """Up to how many selected channels a C++ kernel is taken; above, ATen on the compact input.

    Attributes:
        operator: name of the operator.
        family: kind of call, as the operator names it.
        memory_format: of the tensor that has all channels.
        most_selected: the limit.
        dtypes: what the limit holds for; other dtypes always run in C++. ATen rounds the sums of the half types to
            the half type before they can be widened.
    """

    operator: str
    family: str
    memory_format: torch.memory_format
    most_selected: int
    dtypes: tuple[torch.dtype, ...] = _FLOAT


_CONTIGUOUS, _CHANNELS_LAST = torch.contiguous_format, torch.channels_last

#: Measured with AVX-512 on one thread against torch 2.13 (oneDNN and MKL), on the layers of MobileNetV2, ResNet-18 and
#: EfficientNet-Lite0 at batch 8 (``trady bench``, benchmarks/results).
#:
#: * ``ANY`` for convolutions in channels_last is also where oneDNN is not to be trusted: strided 1x1 with few channels
#:   (oneDNN#6035), strided and padded depthwise (pytorch#50042).
#: * linear: torch.mm takes 1.06 to 3.5 times as long up to 12 features, 0.95 to 1.3 times from 48 to all of 3072.
LIMITS = (
    Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, 16),
    Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, 16),
    Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, 48),
    Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, ANY),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, 12),
    Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, 4),
    Limit("conv2d_channel_grad", "grouped", _CONTIGUOUS, ANY),
    Limit("conv2d_channel_grad", "grouped", _CHANNELS_LAST, ANY),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, ANY),
)
_TABLE = {(limit.operator, limit.family, limit.memory_format): limit for limit in LIMITS}


def cpp_or_aten(
    operator: str, family: str, memory_format: torch.memory_format, dtype: torch.dtype, selected: int
) -> str:
    """``"cpp"`` or ``"aten"`` by the table. Simple comparisons only: sizes may be symbolic.

    Args:
        operator, family, memory_format: the row.
        dtype: of the input.
        selected: number of selected channels.
    """
    limit = _TABLE[operator, family, memory_format]
    return "aten" if dtype in limit.dtypes and selected > limit.most_selected else "cpp"
