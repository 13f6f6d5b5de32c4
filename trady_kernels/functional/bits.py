"""What the Functions share that keep one bit an element: when bits will do, and the gradient from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from trady_kernels.functional.apply import applied
from trady_kernels.ops import scale_by_bits
from trady_kernels.ops.backend import FLOATING, is_tracing


def keeps_bits(input: torch.Tensor) -> bool:
    """Whether a backward pass of this call is possible, and bits are enough for it.

    Without a gradient nothing is kept, so torch's own function is as lean. It is also taken for dtypes that bits
    are not made for, and under ``vmap`` and forward-mode transforms, which it knows the rules of.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return False
    if input.dtype not in FLOATING or input.layout is not torch.strided:
        return False
    if is_tracing() or not torch._C._are_functorch_transforms_active():
        return True
    return all(i.key() == TransformType.Grad for i in retrieve_all_functorch_interpreters())


def overwritable(input: torch.Tensor) -> bool:
    """Whether a Function may write its output into ``input`` itself.

    Elsewhere the output is copied into it: a copy knows what views, leaves, transforms and compilation need, and
    compiled it costs nothing.
    """
    if is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return not input.is_leaf and not input._is_view()


def in_memory_order(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:  # (...) -> (n,)
    """The elements in the memory order that the strides ``stride`` tell.

    For compiled graphs, where inductor gives a tensor other strides than those that were traced, and the bits
    would meet the wrong elements: one dimension has one order only.
    """
    return tensor.permute(_outermost_first(stride)).reshape(-1)


def from_memory_order(flat: torch.Tensor, like: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """``in_memory_order`` undone: ``(n,)`` in the shape of ``like``."""
    order = _outermost_first(stride)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[d] for d in order]).permute(inverse)


def _outermost_first(stride: Sequence[int]) -> list[int]:
    return sorted(range(len(stride)), key=lambda d: -stride[d])


def keep_bits(ctx: Any, output: tuple[torch.Tensor, torch.Tensor], on: float, off: float | None) -> None:
    """``setup_context`` of a Function that returns its result and, for ``input_gradient``, the bits."""
    result, bits = output
    ctx.factors, ctx.stride = (on, off), result.stride()
    ctx.mark_non_differentiable(bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(bits)


def input_gradient(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """``backward`` of such a Function, whose first argument alone gets a gradient: ``on`` or ``off`` times it."""
    others = (None,) * (len(ctx.needs_input_grad) - 1)
    if grad_output is None:
        return None, *others
    (bits,) = ctx.saved_tensors
    on, off = ctx.factors
    return scale_gradient(grad_output, bits, on, off, ctx.stride), *others


def scale_gradient(
    grad_output: torch.Tensor,  # (...)
    bits: torch.Tensor,  # (ceil(n / 8),)
    on: float,
    off: float | None,
    stride: tuple[int, ...],
) -> torch.Tensor:  # (...)
    """``scale_by_bits`` of a gradient in any layout; linear in it, and so differentiable any number of times.

    Args:
        grad_output: ``(...)`` of n elements.
        bits: ``(ceil(n / 8),)`` uint8, in the memory order of the output.
        on, off: as ``scale_by_bits`` takes them.
        stride: the output's strides, which tell the memory order; the result has them too where they are dense.
    """
    if torch.is_grad_enabled() and grad_output.requires_grad:
        return _scale_gradient(grad_output, bits, on, off, stride)
    return _scale(grad_output, bits, on, off, stride)


def _scale(
    grad_output: torch.Tensor, bits: torch.Tensor, on: float, off: float | None, stride: tuple[int, ...]
) -> torch.Tensor:
    if is_tracing():
        flat = scale_by_bits(in_memory_order(grad_output, stride), bits, on, off)
        return from_memory_order(flat, grad_output, stride)
    if grad_output.stride() != stride:
        ordered = torch.empty_strided(
            grad_output.shape, stride, dtype=grad_output.dtype, device=grad_output.device
        )
        grad_output = ordered.copy_(grad_output)
    return scale_by_bits(grad_output, bits, on, off)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        grad_output: torch.Tensor, bits: torch.Tensor, on: float, off: float | None, stride: tuple[int, ...]
    ) -> torch.Tensor:
        return _scale(grad_output, bits, on, off, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, bits, *ctx.rest = inputs
        ctx.save_for_backward(bits)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (bits,) = ctx.saved_tensors
        return scale_gradient(grad_output, bits, *ctx.rest), None, None, None, None


_scale_gradient = applied(_ScaleGradient)
