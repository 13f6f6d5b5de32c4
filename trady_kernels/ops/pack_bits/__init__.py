"""``pack_bits``: a mask in one bit an element."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import Operator, by_device_or_fused
from trady_kernels.ops.pack_bits.reference import pack_bits as reference


def bytes_of_bits(count: int) -> int:
    """Bytes that ``count`` bits take."""
    return (count + 7) // 8


def _fake(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(bytes_of_bits(mask.numel()), dtype=torch.uint8)


def _validate(mask: torch.Tensor) -> None:
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask: got {mask.dtype}, expected torch.bool")


_operator = Operator(
    "pack_bits(Tensor mask) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device_or_fused,
    validate=_validate,
    triton=f"{__name__}.triton_kernel",
)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:  # (...) -> (ceil(n / 8),)
    """A bool tensor in one bit an element.

    Args:
        mask: ``(...)`` bool of n elements.

    Returns:
        ``(ceil(n / 8),)`` uint8. Bit ``i`` of byte ``j`` is element ``8 j + i`` in the memory order of the mask,
        or, where that is not dense, of ``torch.empty_like(mask)``; bits past the last element are 0.

    Raises:
        ValueError: ``mask`` is not bool.
    """
    return _operator.call(mask)
