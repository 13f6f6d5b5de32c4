"""ReLU and its kin, whose backward keeps one bit an element."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.functional.apply import applied
from trady_kernels.functional.bits import (
    from_memory_order,
    in_memory_order,
    input_gradient,
    keep_bits,
    keeps_bits,
    overwritable,
)
from trady_kernels.ops import pack_bits, rectify, rectify_
from trady_kernels.ops.backend import is_tracing

#: ATen's backward pass of hardsigmoid has this constant in float32, for float64 too.
_SIXTH = 0.1666666716337204


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (...)
        min: float,
        max: float | None,
        slope: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_tracing():
            return rectify(input, min, max, slope)
        flat, bits = rectify(in_memory_order(input, input.stride()), min, max, slope)
        # Autograd lets nobody write to a view that was made in here. The compiler makes one pass of it all.
        return from_memory_order(flat, input, input.stride()).clone(), bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        keep_bits(ctx, output, on=1.0, off=inputs[3])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return input_gradient(ctx, grad_output)


class _RectifyInPlace(_Rectify):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor, min: float, max: float | None, slope: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return input, rectify_(input, min, max, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _Rectify.setup_context(ctx, inputs, output)
        ctx.mark_dirty(output[0])


_rectify, _rectify_ = applied(_Rectify), applied(_RectifyInPlace)


def _rectified(
    input: torch.Tensor, inplace: bool, min: float, max: float | None = None, slope: float | None = None
) -> torch.Tensor:
    if inplace and overwritable(input):
        return _rectify_(input, min, max, slope)
    output = _rectify(input, min, max, slope)
    return input.copy_(output) if inplace else output


class _Hardsigmoid(torch.autograd.Function):
    @staticmethod
    def forward(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        output, inside = F.hardsigmoid(input), input.abs() < 3
        if is_tracing():
            inside = in_memory_order(inside, output.stride())
        return output, pack_bits(inside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        keep_bits(ctx, output, on=_SIXTH, off=None)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return input_gradient(ctx, grad_output)


class _HardsigmoidInPlace(_Hardsigmoid):
    @staticmethod
    def forward(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        bits = pack_bits(input.abs() < 3)
        return F.hardsigmoid(input, inplace=True), bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _Hardsigmoid.setup_context(ctx, inputs, output)
        ctx.mark_dirty(output[0])


_hardsigmoid, _hardsigmoid_ = applied(_Hardsigmoid), applied(_HardsigmoidInPlace)


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # (...) -> (...)
    """``F.relu`` that keeps one bit an element for backward, and nothing where no gradient is needed.

    Args:
        input: ``(...)`` of n elements; another dtype than float32, float64, bfloat16 or float16 takes torch's own.
        inplace: overwrite the input.

    Returns:
        ``(...)``. Kept: ``ceil(n / 8)`` bytes. The gradient is torch's, bit for bit.
    """
    if not keeps_bits(input):
        return F.relu(input, inplace)
    return _rectified(input, inplace, 0.0)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # (...) -> (...)
    """``F.relu6`` that keeps one bit an element for backward; arguments and result as for ``relu``."""
    if not keeps_bits(input):
        return F.relu6(input, inplace)
    return _rectified(input, inplace, 0.0, 6.0)


def hardtanh(
    input: torch.Tensor,  # (...)
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> torch.Tensor:  # (...)
    """``F.hardtanh`` that keeps one bit an element for backward; result as for ``relu``.

    Args:
        input: ``(...)``.
        min_val, max_val: the bounds of the output.
        inplace: overwrite the input.

    Raises:
        ValueError: ``min_val`` is greater than ``max_val``.
    """
    if min_val > max_val or not keeps_bits(input):
        return F.hardtanh(input, min_val, max_val, inplace)
    return _rectified(input, inplace, min_val, max_val)


def leaky_relu(
    input: torch.Tensor,  # (...)
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> torch.Tensor:  # (...)
    """``F.leaky_relu`` that keeps one bit an element for backward; result as for ``relu``.

    Args:
        input: ``(...)``.
        negative_slope: what the input is multiplied by where it is not positive.
        inplace: overwrite the input; unlike torch's also with a negative slope.
    """
    if not keeps_bits(input):
        return F.leaky_relu(input, negative_slope, inplace)
    return _rectified(input, inplace, 0.0, slope=negative_slope)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # (...) -> (...)
    """``F.hardsigmoid`` that keeps one bit an element for backward; arguments and result as for ``relu``."""
    if not keeps_bits(input):
        return F.hardsigmoid(input, inplace)
    if inplace and overwritable(input):
        return _hardsigmoid_(input)
    output = _hardsigmoid(input)
    return input.copy_(output) if inplace else output
