"""``dropout``, whose backward keeps one bit an element."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from trady_kernels.functional.apply import applied
from trady_kernels.functional.bits import (
    from_memory_order,
    in_memory_order,
    input_gradient,
    keep_bits,
    keeps_bits,
    overwritable,
)
from trady_kernels.ops import pack_bits, scale_by_bits
from trady_kernels.ops.backend import is_tracing


@functools.cache
def rounded_scale(p: float, dtype: torch.dtype) -> float:
    """``1 / (1 - p)`` as ``F.dropout`` has it on the CPU: divided in the dtype, and rounded to it."""
    with _disable_current_modes():  # a fake tensor would have no number to give
        return torch.ones((), dtype=dtype, device="cpu").div_(1 - p).item()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (...)
        p: float,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if input.is_cuda:
            output, mask = torch.native_dropout(input, p, True)
            if is_tracing():
                mask = in_memory_order(mask, output.stride())
            return output, pack_bits(mask)
        if is_tracing():
            stride = input.stride()
            kept = torch.empty(input.numel(), dtype=torch.bool, device=input.device).bernoulli_(1 - p)
            bits = pack_bits(kept)
            flat = scale_by_bits(in_memory_order(input, stride), bits, scale, 0.0)
            return from_memory_order(flat, input, stride).clone(), bits  # no view, see _Rectify
        bits = pack_bits(torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p))
        return scale_by_bits(input, bits, scale, 0.0), bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        keep_bits(ctx, output, on=inputs[2], off=0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return input_gradient(ctx, grad_output)


class _DropoutInPlace(_Dropout):
    @staticmethod
    def forward(input: torch.Tensor, p: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        output, bits = _Dropout.forward(input, p, scale)
        return input.copy_(output), bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _Dropout.setup_context(ctx, inputs, output)
        ctx.mark_dirty(output[0])


_dropout, _dropout_ = applied(_Dropout), applied(_DropoutInPlace)


def dropout(
    input: torch.Tensor,  # (...)
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:  # (...)
    """``F.dropout`` that keeps one bit an element for backward, and nothing where no gradient is needed.

    It draws the random numbers that ``F.dropout`` draws: the same seed drops the same elements.

    Args:
        input: ``(...)`` of n elements; another dtype than float32, float64, bfloat16 or float16 takes torch's own.
        p: probability of an element to become 0.
        training: False returns the input.
        inplace: overwrite the input.

    Returns:
        ``(...)``. Kept: ``ceil(n / 8)`` bytes. Output and gradient are torch's, bit for bit.

    Raises:
        ValueError: ``p`` is not in [0, 1].

    Source: Srivastava et al., JMLR 15 (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting.
    """
    if not (training and 0 < p < 1 and keeps_bits(input)) or input.numel() == 0:
        return F.dropout(input, p, training, inplace)
    exact = is_tracing() or input.is_cuda
    scale = 1 / (1 - p) if exact else rounded_scale(p, input.dtype)
    if inplace and overwritable(input):
        return _dropout_(input, p, scale)
    output = _dropout(input, p, scale)
    return input.copy_(output) if inplace else output
