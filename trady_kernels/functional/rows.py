"""``check_rows``: what the sparse functions are given beside the weight."""

from __future__ import annotations

import torch


def check_rows(channel_weight: torch.Tensor, channels: torch.Tensor) -> None:
    """Check that each selected channel has its row, which otherwise shows in the backward pass alone.

    Args:
        channel_weight: ``(k, ...)``.
        channels: ``(k,)``.

    Raises:
        TypeError: ``channels`` is not a tensor.
        ValueError: the shapes are not these.
    """
    if not isinstance(channels, torch.Tensor):
        raise TypeError(
            f"channels: got {type(channels).__name__}, expected a tensor (k,) of int64, as torch.tensor([0, 2]) is"
        )
    if channels.shape != channel_weight.shape[:1]:
        raise ValueError(
            f"channel_weight: got shape {tuple(channel_weight.shape)} beside channels of shape "
            f"{tuple(channels.shape)}, expected (k, ...) beside (k,), one row for each channel"
        )
