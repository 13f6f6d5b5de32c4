"""``scatter_channels_`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch


def scatter_channels_(
    weight: torch.Tensor,  # (C', C/groups, ...)
    channels: torch.Tensor,  # (k,)
    rows: torch.Tensor,  # (k, C'/groups, ...)
    groups: int,
) -> None:
    """Row ``j`` becomes the weights of input channel ``channels[j]``."""
    if groups == 1:
        weight.transpose(0, 1).index_copy_(0, channels, rows)
        return
    # (groups, C/groups, C'/groups, ...): what belongs to each input channel
    by_channel = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    per_group = weight.shape[1]
    position = channels.div(per_group, rounding_mode="floor"), channels.remainder(per_group)
    by_channel.index_put_(position, rows)
