"""``frozen_rms_norm``: RMS norm with a fixed affine, whose backward keeps the input in its own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.functional.apply import applied


class _FrozenRMSNorm(torch.autograd.Function):
    generate_vmap_rule = True
    #: The input is a whole tensor like any other operation's: in 8 bits where those are.
    in_eight_bits = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (..., *normalized_shape)
        weight: torch.Tensor | None,  # normalized_shape
        normalized_shape: list[int],
        eps: float | None,
    ) -> torch.Tensor:
        return F.rms_norm(input, normalized_shape, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, ctx.normalized_shape, ctx.eps = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        dtype = torch.promote_types(input.dtype, torch.float32)
        eps = torch.finfo(dtype).eps if ctx.eps is None else ctx.eps
        dims = tuple(range(-len(ctx.normalized_shape), 0))
        x, grad = input.to(dtype), grad_output.to(dtype)
        if weight is not None:
            grad = grad * weight
        inverse = x.square().mean(dims, keepdim=True).add(eps).rsqrt()
        shared = (grad * x).mean(dims, keepdim=True) * inverse.square()
        return ((grad - x * shared) * inverse).to(input.dtype), None, None, None


_frozen_rms_norm = applied(_FrozenRMSNorm)


def frozen_rms_norm(
    input: torch.Tensor,  # (..., *normalized_shape)
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,  # normalized_shape
    eps: float | None = None,
) -> torch.Tensor:  # (..., *normalized_shape)
    r"""``F.rms_norm`` whose weight gets no gradient.

    .. math:: y = x r \gamma, \qquad r = (mean(x^2) + \epsilon)^{-1/2}, \qquad
              dX = r (dY \gamma - x \, r^2 \, mean(dY \gamma x))

    Kept for backward: the input as it is, memory that a neighbour which keeps it too shares, and a reference to
    ``weight``. ``F.rms_norm`` keeps a copy in float32 of a half-precision input, and ``r``.

    Args:
        input: ``(..., *normalized_shape)``.
        normalized_shape: the last dimensions, over which the mean is taken.
        weight: gamma, of ``normalized_shape``, or None.
        eps: added to the mean square; None for the machine epsilon of the dtype that it is computed in.

    Returns:
        ``(..., *normalized_shape)``, what ``F.rms_norm`` returns.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return F.rms_norm(input, list(normalized_shape), weight, eps)
    return _frozen_rms_norm(input, weight, list(normalized_shape), eps)
