"""``scatter_channels_``: rows written into the weight of a layer at the input channels they belong to."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import Operator, by_device, is_tracing
from trady_kernels.ops.scatter_channels.reference import scatter_channels_ as reference


def _fake(weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor, groups: int) -> None:
    return None


def _validate(weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor, groups: int) -> None:
    if weight.dim() < 2:
        raise ValueError(f"weight: got {weight.dim()} dimensions, expected at least 2, (C', C/groups, ...)")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups: got {groups}, expected a divisor of {weight.shape[0]}, the outputs of weight"
        )
    if channels.dim() != 1 or channels.dtype != torch.int64:
        raise ValueError(
            f"channels: got shape {tuple(channels.shape)} of {channels.dtype}, expected a 1-D int64 tensor"
        )
    shape = (channels.shape[0], weight.shape[0] // groups, *weight.shape[2:])
    if rows.shape != shape or rows.dtype != weight.dtype:
        raise ValueError(
            f"rows: got shape {tuple(rows.shape)} of {rows.dtype}, expected {shape} of {weight.dtype}, a row for each "
            f"of {channels.shape[0]} channels"
        )


_operator = Operator(
    "scatter_channels_(Tensor(a!) weight, Tensor channels, Tensor rows, int groups) -> ()",
    reference=reference,
    fake=_fake,
    kernels={"aten": reference},
    choose=by_device,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


def scatter_channels_(
    weight: torch.Tensor,  # (C', C/groups, ...)
    channels: torch.Tensor,  # (k,)
    rows: torch.Tensor,  # (k, C'/groups, ...)
    groups: int = 1,
) -> None:
    """Write ``rows`` into ``weight`` at the input channels ``channels``, in place.

    .. math:: W_{g C'/groups + o,\\ p} = R_{j, o} \\text{ where } g = \\lfloor c_j / (C/groups) \\rfloor,
              \\ p = c_j \\bmod (C/groups)

    Args:
        weight: ``(C', C/groups, ...)`` as ``nn.Conv2d`` has it, or ``(O, I)``; any dtype and strides. Its version is
            counted up, as every in-place operation of torch does.
        channels: ``(k,)`` int64 indices of input channels, ``0 <= c < C``, each once (otherwise it is left open which
            row wins), on the weight's device.
        rows: ``(k, C'/groups, ...)`` in the weight's dtype, any strides.
        groups: of the convolution.

    Raises:
        ValueError: ``groups`` does not divide the outputs, ``channels`` is not a 1-D int64 tensor, or ``rows`` has
            another shape or dtype.
        IndexError: an index is out of range (on the CPU); nothing has been written then.
    """
    try:
        _operator.call(weight, channels, rows, groups)
    except (IndexError, RuntimeError):
        # Looked at only once something has failed: a check before every call costs as much as the copy.
        count = weight.shape[1] * groups
        wrong = [] if channels.is_cuda else [c for c in channels.tolist() if not 0 <= c < count]
        if wrong:
            raise IndexError(
                f"channels: got index {wrong[0]}, expected 0 <= index < {count}, the input channels of weight"
            ) from None
        raise
    if not is_tracing():
        # An operator whose schema lives in Python has no kernel that does it.
        torch.autograd.graph.increment_version(weight)
