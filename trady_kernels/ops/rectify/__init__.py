"""``rectify``: ReLU and its kin, with one bit an element for the backward pass."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import FLOATING, Operator, by_device_or_fused
from trady_kernels.ops.pack_bits import bytes_of_bits
from trady_kernels.ops.rectify.reference import rectify as reference
from trady_kernels.ops.rectify.reference import rectify_ as reference_


def _fake_bits(input: torch.Tensor, min: float, max: float | None, slope: float | None) -> torch.Tensor:
    return input.new_empty(bytes_of_bits(input.numel()), dtype=torch.uint8)


def _fake(
    input: torch.Tensor, min: float, max: float | None, slope: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(input), _fake_bits(input, min, max, slope)


def _validate(input: torch.Tensor, min: float, max: float | None, slope: float | None) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"input: got {input.dtype}, expected one of {', '.join(map(str, FLOATING))}")
    if slope is not None and max is not None:
        raise ValueError(f"max: got {max} beside slope {slope}, expected one of them to be None")


_operator = Operator(
    "rectify(Tensor input, float min, float? max, float? slope) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device_or_fused,
    validate=_validate,
    triton=f"{__name__}.triton_kernel",
)
_operator_ = Operator(
    "rectify_(Tensor(a!) input, float min, float? max, float? slope) -> Tensor",
    reference=reference_,
    fake=_fake_bits,
    kernels={},
    choose=by_device_or_fused,
    validate=_validate,
    triton=f"{__name__}.triton_kernel",
)


def rectify(
    input: torch.Tensor,  # (...)
    min: float,
    max: float | None = None,
    slope: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # (...), (ceil(n / 8),)
    r"""An activation that is the identity inside an interval, and one bit an element that says where.

    .. math:: y = x \text{ where the bit is set, elsewhere } \min(\max(x, min), max)
              \text{, or } slope \cdot x

    The bit is ``not (x <= min or x >= max)`` without a slope, so that NaN passes, and ``x > min`` with one: what
    the backward passes of torch's ``relu``, ``hardtanh`` and ``leaky_relu`` test.

    Args:
        input: ``(...)`` of n elements, float32, float64, bfloat16 or float16, in any layout.
        min: lower end of the interval.
        max: upper end, None where there is none: +inf is then inside.
        slope: what the input is multiplied by outside; None clamps it. Not together with ``max``.

    Returns:
        The output, laid out as ``torch.empty_like(input)``, and ``(ceil(n / 8),)`` uint8: bit ``i`` of byte
        ``j`` is element ``8 j + i`` in the memory order of the output.

    Raises:
        ValueError: another dtype, or ``slope`` together with ``max``.
    """
    return _operator.call(input, min, max, slope)


def rectify_(
    input: torch.Tensor,  # (...)
    min: float,
    max: float | None = None,
    slope: float | None = None,
) -> torch.Tensor:  # (ceil(n / 8),)
    """``rectify`` whose output overwrites the input; returns the bits.

    The bits are in the memory order of the input, or, where that is not dense, of ``torch.empty_like(input)``.
    """
    return _operator_.call(input, min, max, slope)
