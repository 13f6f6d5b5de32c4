"""``scale_by_bits``: one factor where a bit is set, another where it is not."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import FLOATING, Operator, by_device_or_fused
from trady_kernels.ops.pack_bits import bytes_of_bits
from trady_kernels.ops.scale_by_bits.reference import scale_by_bits as reference


def _fake(input: torch.Tensor, bits: torch.Tensor, on: float, off: float | None) -> torch.Tensor:
    return torch.empty_like(input)


def _validate(input: torch.Tensor, bits: torch.Tensor, on: float, off: float | None) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"input: got {input.dtype}, expected one of {', '.join(map(str, FLOATING))}")
    if bits.dtype is not torch.uint8 or bits.dim() != 1 or bits.shape[0] != bytes_of_bits(input.numel()):
        raise ValueError(
            f"bits: got shape {tuple(bits.shape)} of {bits.dtype}, expected ({bytes_of_bits(input.numel())},) of "
            f"torch.uint8, a bit for each of the {input.numel()} elements of input"
        )


_operator = Operator(
    "scale_by_bits(Tensor input, Tensor bits, float on, float? off) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device_or_fused,
    validate=_validate,
    triton=f"{__name__}.triton_kernel",
)


def scale_by_bits(
    input: torch.Tensor,  # (...)
    bits: torch.Tensor,  # (ceil(n / 8),)
    on: float,
    off: float | None = None,
) -> torch.Tensor:  # (...)
    """``on`` times the input where the bit is set; elsewhere 0, or ``off`` times the input.

    The backward pass of ``rectify``, and dropout in both directions.

    Args:
        input: ``(...)`` of n elements, float32, float64, bfloat16 or float16, in any layout.
        bits: ``(ceil(n / 8),)`` uint8 as ``rectify`` and ``pack_bits`` give it, in the memory order of the
            input, or, where that is not dense, of ``torch.empty_like(input)``.
        on: factor where the bit is set.
        off: factor elsewhere, which keeps NaN and makes infinity NaN if it is 0; None gives 0 for any input.

    Returns:
        ``(...)``, laid out as ``torch.empty_like(input)``; products are rounded once, to the input's dtype.

    Raises:
        ValueError: another dtype, or ``bits`` not one bit an element.
    """
    return _operator.call(input, bits, on, off)
