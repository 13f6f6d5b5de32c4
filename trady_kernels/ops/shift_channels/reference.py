"""``shift_channels_`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch


def shift_channels_(input: torch.Tensor, shift: torch.Tensor) -> None:  # (N, C, ...), (C,)
    """Each channel's shift is added to it, and the sum rounded once."""
    computed = torch.promote_types(input.dtype, torch.float32)
    shift = shift.to(computed).view(-1, *(1,) * (input.dim() - 2))
    input.copy_(input.to(computed) + shift)
