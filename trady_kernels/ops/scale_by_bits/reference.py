"""``scale_by_bits`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch


def scale_by_bits(
    input: torch.Tensor,  # (...)
    bits: torch.Tensor,  # (ceil(n / 8),)
    on: float,
    off: float | None,
) -> torch.Tensor:  # (...)
    """``on`` times the input where the bit is set; elsewhere 0, or ``off`` times the input."""
    output = torch.empty_like(input).copy_(input)
    flat = output.as_strided((output.numel(),), (1,))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = ((bits[:, None] >> places) & 1).flatten()[: flat.numel()].bool()
    flat.copy_(torch.where(mask, flat * on, torch.zeros_like(flat) if off is None else flat * off))
    return output
