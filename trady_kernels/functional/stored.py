"""How the selected channels are stored until backward: as they are, or in 8 bits an element."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from trady_kernels.ops import dequantize_blocks, quantize_blocks
from trady_kernels.ops.backend import is_tracing
from trady_kernels.ops.layout import flat_view

#: ``"exact"`` keeps the values, ``"8bit"`` a code of one byte for each and a scale for each 64 (``quantize_blocks``).
Stored = Literal["exact", "8bit"]
STORED = get_args(Stored)


def check_stored(stored: str) -> None:
    """Check that ``stored`` is one of ``Stored``.

    Raises:
        ValueError: it is not.
    """
    if stored not in STORED:
        raise ValueError(f"stored: got {stored!r}, expected {' or '.join(map(repr, STORED))}")


def holds_no_more(input: torch.Tensor) -> bool:
    """Whether to keep the tensor keeps nothing but its own elements: it is no part of a larger one.

    A compiler decides on its own what is kept.
    """
    if is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return input.untyped_storage().nbytes() <= input.numel() * input.element_size()


def pack(
    selected: torch.Tensor,  # (...)
) -> tuple[torch.Tensor, torch.Tensor]:  # (...) int8, (ceil(n / 64),) float32
    """Codes, in the shape and memory format of ``selected``, which is dense, and their scales."""
    codes, scales = quantize_blocks(selected)
    return codes.as_strided(selected.shape, selected.stride()), scales


def unpack(
    kept: torch.Tensor,  # (...)
    scales: torch.Tensor | None,  # (ceil(n / 64),) float32
    dtype: torch.dtype,
) -> torch.Tensor:  # (...)
    """The selected channels again: ``kept`` itself, or what its codes stand for in ``dtype``."""
    if scales is None:
        return kept
    return dequantize_blocks(flat_view(kept), scales, dtype).as_strided(kept.shape, kept.stride())
