"""``pack_bits`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trady_kernels.ops.layout import flat_view


def pack_bits(mask: torch.Tensor) -> torch.Tensor:  # (...) -> (ceil(n / 8),)
    """Bit ``i`` of byte ``j`` is element ``8 j + i`` of the dense mask, in memory order."""
    flat = flat_view(torch.empty_like(mask).copy_(mask))
    octets = F.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (octets << places).sum(1, dtype=torch.uint8)
