"""``frozen_batch_norm``: batch norm with fixed statistics, whose backward keeps no activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trady_kernels.functional.apply import applied


def _scale_and_shift(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, True)


class FrozenNorm(NamedTuple):
    """A batch norm in evaluation mode: what a convolution needs to fold it in.

    Attributes:
        weight, bias: ``(C,)`` or None, gamma and beta.
        running_mean, running_var: ``(C,)``.
        eps: added to the variance.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    eps: float


# Functions and not methods: torch.compile of torch 2.10 knows nothing but the fields of a named tuple.


def norm_weight_trains(norm: FrozenNorm) -> bool:
    """Whether gamma gets a gradient, which takes the norm's input."""
    return norm.weight is not None and norm.weight.requires_grad


def normalize(input: torch.Tensor, norm: FrozenNorm) -> torch.Tensor:  # (N, C, ...) -> (N, C, ...)
    """The norm, with torch's own gradients."""
    return _scale_and_shift(input, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def frozen_batch_norm_input_grad(
    grad_output: torch.Tensor,  # (N, C, ...)
    weight: torch.Tensor | None,  # (C,)
    running_var: torch.Tensor,  # (C,)
    eps: float,
) -> torch.Tensor:  # (N, C, ...)
    """Gradient of ``frozen_batch_norm`` with respect to its input."""
    # The same affine without the shift: one pass, accumulated as the forward is, in its memory format.
    mean = torch.zeros_like(running_var)
    return _scale_and_shift(grad_output, weight, None, mean, running_var, eps)


def sum_to_bias(grad_output: torch.Tensor) -> torch.Tensor:  # (N, C, ...) -> (C,)
    """Gradient of what is added to every element of a channel, in float32 at least."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    return grad_output.sum([0, *range(2, grad_output.dim())], dtype=dtype)


class _FrozenBatchNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (N, C, ...)
        weight: torch.Tensor | None,  # (C,)
        bias: torch.Tensor | None,  # (C,)
        running_mean: torch.Tensor,  # (C,)
        running_var: torch.Tensor,  # (C,)
        eps: float,
    ) -> torch.Tensor:
        return _scale_and_shift(input, weight, bias, running_mean, running_var, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, weight, bias, _, running_var, ctx.eps = inputs
        ctx.save_for_backward(weight, running_var)  # references, no copies
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight, running_var = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = frozen_batch_norm_input_grad(grad_output, weight, running_var, ctx.eps)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_to_bias(grad_output).to(ctx.bias_dtype)
        return grad_input, None, grad_bias, None, None, None


_frozen_batch_norm = applied(_FrozenBatchNorm)


def frozen_batch_norm(
    input: torch.Tensor,  # (N, C, ...)
    weight: torch.Tensor | None,  # (C,)
    bias: torch.Tensor | None,  # (C,)
    running_mean: torch.Tensor,  # (C,)
    running_var: torch.Tensor,  # (C,)
    eps: float = 1e-5,
) -> torch.Tensor:  # (N, C, ...)
    r"""Batch norm in evaluation mode with a fixed scale; only the input and the bias get a gradient.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta, \qquad
              dX = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} dY, \qquad d\beta = \sum_{n, ...} dY

    Kept for backward: references to ``weight`` and ``running_var``.

    Args:
        input: ``(N, C, ...)``.
        weight: ``(C,)`` or None, gamma; it gets no gradient.
        bias: ``(C,)`` or None, beta; it gets one where it requires grad.
        running_mean, running_var: ``(C,)``.
        eps: added to the variance.

    Returns:
        ``(N, C, ...)``, what ``F.batch_norm(..., training=False)`` returns.

    Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 2.
    """
    trains = input.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and trains):
        return _scale_and_shift(input, weight, bias, running_mean, running_var, eps)
    return _frozen_batch_norm(input, weight, bias, running_mean, running_var, eps)
