"""``gather_channels`` by ATen's ``index_select``."""

from __future__ import annotations

import torch

from trady_kernels.ops.layout import memory_format_of


def gather_channels(
    input: torch.Tensor,  # (N, C, ...)
    channels: torch.Tensor,  # (k,)
) -> torch.Tensor:  # (N, k, ...)
    """One copy where the result is contiguous, which ``index_select``'s always is; a second in channels_last."""
    selected = input.index_select(1, channels)
    layout = memory_format_of(input)
    return selected if layout == torch.contiguous_format else selected.clone(memory_format=layout)
