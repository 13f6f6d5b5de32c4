"""``scale_by_bits`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch

from trady_kernels.ops.layout import flat_view


def scale_by_bits(
    input: torch.Tensor,  # (...)
    bits: torch.Tensor,  # (ceil(n / 8),)
    on: float,
    off: float | None,
) -> torch.Tensor:  # (...)
    """``on`` times the input where the bit is set; elsewhere 0, or ``off`` times the input."""
    output = torch.empty_like(input).copy_(input)
    flat = flat_view(output)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = ((bits[:, None] >> places) & 1).flatten()[: flat.numel()].bool()
    scaled = torch.where(mask, flat * on, torch.zeros_like(flat) if off is None else flat * off)
    if input.dim() == 1:
        return scaled
    flat.copy_(scaled)
    return output
