"""``gather_channels``: a compact copy of the selected channels."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import FLOATING, Operator, by_device
from trady_kernels.ops.gather_channels.reference import gather_channels as reference
from trady_kernels.ops.layout import memory_format_of


def _fake(input: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    shape = [input.shape[0], channels.shape[0], *input.shape[2:]]
    return torch.empty(
        shape, dtype=dtype or input.dtype, device=input.device, memory_format=memory_format_of(input)
    )


def _validate(input: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    if input.dim() < 2:
        raise ValueError(f"input: got {input.dim()} dimensions, expected at least 2, (N, C, ...)")
    if channels.dim() != 1 or channels.dtype != torch.int64:
        raise ValueError(
            f"channels: got shape {tuple(channels.shape)} of {channels.dtype}, expected a 1-D int64 tensor"
        )
    if dtype is not None and dtype != input.dtype and not (dtype in FLOATING and input.dtype in FLOATING):
        raise ValueError(
            f"dtype: got {dtype} for an input of {input.dtype}, expected None or float32, float64, bfloat16 or "
            "float16 for both"
        )


_operator = Operator(
    "gather_channels(Tensor input, Tensor channels, ScalarType? dtype=None) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


def gather_channels(
    input: torch.Tensor,  # (N, C, ...)
    channels: torch.Tensor,  # (k,)
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # (N, k, ...)
    """Copy of the selected channels of dimension 1, in the input's memory format.

    Args:
        input: ``(N, C, ...)``, any floating dtype, contiguous, channels_last or strided.
        channels: ``(k,)`` int64 indices into dimension 1, ``0 <= k <= C``, on the input's device.
        dtype: of the result, for floating input; None for the input's own. Converted in the same pass over memory,
            rounded as ``Tensor.to`` rounds.

    Returns:
        ``(N, k, ...)`` in ``dtype``; a fresh tensor also where all channels are selected.

    Raises:
        ValueError: fewer than two dimensions, ``channels`` not a 1-D int64 tensor, or a conversion from or to a dtype that
            is not floating.
        IndexError: an index is out of range (on the CPU).
    """
    try:
        return _operator.call(input, channels) if dtype is None else _operator.call(input, channels, dtype)
    except (IndexError, RuntimeError):
        # Looked at only once something has failed: a check before every call costs more than the copy.
        wrong = [] if channels.is_cuda else [c for c in channels.tolist() if not 0 <= c < input.shape[1]]
        if wrong:
            raise IndexError(
                f"channels: got index {wrong[0]}, expected 0 <= index < {input.shape[1]}, the channels of input"
            ) from None
        raise
