"""``shift_channels_``: a convolution's bias, added to its output in place."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import FLOATING, Operator
from trady_kernels.ops.layout import in_a_memory_format
from trady_kernels.ops.shift_channels.reference import shift_channels_ as reference


def _fake(input: torch.Tensor, shift: torch.Tensor) -> None:
    return None


def _validate(input: torch.Tensor, shift: torch.Tensor) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"input: got {input.dtype}, expected one of {', '.join(map(str, FLOATING))}")
    if input.dim() < 2 or shift.shape != input.shape[1:2]:
        raise ValueError(
            f"shift: got shape {tuple(shift.shape)} for input {tuple(input.shape)}, expected (C,) for (N, C, ...)"
        )
    expected = torch.float64 if input.dtype is torch.float64 else torch.float32
    if shift.dtype is not expected:
        raise ValueError(f"shift: got {shift.dtype}, expected {expected} for an input of {input.dtype}")


def _choose(input: torch.Tensor, shift: torch.Tensor) -> str:
    return "cuda" if input.is_cuda and in_a_memory_format(input) else "reference"


_operator = Operator(
    "shift_channels_(Tensor(a!) input, Tensor shift) -> ()",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=_choose,
    validate=_validate,
    stands_in=True,
    cpp_checks=True,
)


def shift_channels_(input: torch.Tensor, shift: torch.Tensor) -> None:  # (N, C, ...), (C,)
    """Add ``shift[c]`` to channel ``c`` of ``input``, in place.

    For GPUs, where ATen adds a convolution's bias in a pass of its own, in channels_last an element at a time; on a
    CPU the bias goes with the convolution.

    Args:
        input: ``(N, C, ...)``, float32, float64, bfloat16 or float16, in any layout.
        shift: ``(C,)`` float32, or float64 for an input of float64.

    Raises:
        ValueError: another dtype, or not one value a channel.
    """
    _operator.call(input, shift)
