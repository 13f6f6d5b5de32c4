"""``gather_channels``: a compact copy of the selected channels."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import Operator, by_device
from trady_kernels.ops.gather_channels.reference import gather_channels as reference
from trady_kernels.ops.layout import memory_format_of


def _fake(input: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    shape = [input.shape[0], channels.shape[0], *input.shape[2:]]
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _validate(input: torch.Tensor, channels: torch.Tensor) -> None:
    if input.dim() < 2:
        raise ValueError(f"input: got {input.dim()} dimensions, expected at least 2, (N, C, ...)")
    if channels.dim() != 1 or channels.dtype != torch.int64:
        raise ValueError(
            f"channels: got shape {tuple(channels.shape)} of {channels.dtype}, expected a 1-D int64 tensor"
        )


_operator = Operator(
    "gather_channels(Tensor input, Tensor channels) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device,
    validate=_validate,
)


def gather_channels(
    input: torch.Tensor,  # (N, C, ...)
    channels: torch.Tensor,  # (k,)
) -> torch.Tensor:  # (N, k, ...)
    """Copy of the selected channels of dimension 1, in the input's memory format.

    Args:
        input: ``(N, C, ...)``, any floating dtype, contiguous, channels_last or strided.
        channels: ``(k,)`` int64 indices into dimension 1, ``0 <= k <= C``, on the input's device.

    Returns:
        ``(N, k, ...)`` in the input's dtype; a fresh tensor also where all channels are selected.

    Raises:
        ValueError: fewer than two dimensions, or ``channels`` not a 1-D int64 tensor.
        IndexError: an index is out of range (on the CPU).
    """
    try:
        return _operator(input, channels)
    except (IndexError, RuntimeError):
        # Looked at only once something has failed: a check before every call costs more than the copy.
        wrong = [] if channels.is_cuda else [c for c in channels.tolist() if not 0 <= c < input.shape[1]]
        if wrong:
            raise IndexError(
                f"channels: got index {wrong[0]}, expected 0 <= index < {input.shape[1]}, the channels of input"
            ) from None
        raise
