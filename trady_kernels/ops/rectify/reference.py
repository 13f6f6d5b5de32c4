"""``rectify`` and ``rectify_`` in plain PyTorch: what the operators mean."""

from __future__ import annotations

import torch

from trady_kernels.ops.pack_bits.reference import pack_bits


def rectify(
    input: torch.Tensor,  # (...)
    min: float,
    max: float | None,
    slope: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # (...), (ceil(n / 8),)
    """The input between ``min`` and ``max``; elsewhere the nearer bound, or ``slope`` times the input."""
    # Compared as ATen's backward does it: in float32 for the half types, with the bounds not rounded to them.
    compared = input if input.dtype is torch.float64 else input.float()
    if slope is None:
        outside = compared <= min
        if max is not None:
            outside = outside | (compared >= max)
        output = input.clamp(min, max)
        inside = ~outside
    else:
        inside = compared > min
        output = torch.where(inside, input, input * slope)
    # The results of several operations need not have the strides that a copy has.
    return torch.empty_like(input).copy_(output), pack_bits(
        torch.empty_like(input, dtype=torch.bool).copy_(inside)
    )


def rectify_(input: torch.Tensor, min: float, max: float | None, slope: float | None) -> torch.Tensor:
    """``rectify`` whose output overwrites the input."""
    output, bits = rectify(input, min, max, slope)
    input.copy_(output)
    return bits
