"""``gather_channels`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch

from trady_kernels.ops.layout import memory_format_of


def gather_channels(
    input: torch.Tensor,  # (N, C, ...)
    channels: torch.Tensor,  # (k,)
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # (N, k, ...)
    """Copy of the selected channels, in the input's memory format, converted to ``dtype``."""
    # clone, not contiguous: with one channel or one pixel both formats hold, and only clone gives the strides asked for.
    selected = input.index_select(1, channels).to(input.dtype if dtype is None else dtype)
    return selected.clone(memory_format=memory_format_of(input))
