"""``linear_channel_grad`` by ATen's matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trady_kernels.ops.backend import HALVES, is_tracing
from trady_kernels.ops.squares import SQUARED_ROWS


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    """One matrix product; half types are accumulated in float32 inside."""
    if input_selected.dim() > 2:
        input_selected, grad_output = input_selected.flatten(0, -2), grad_output.flatten(0, -2)
    k = input_selected.shape[-1]
    if unaligned(input_selected, k) and k > 1:  # one alone is a product with a vector
        input_selected = F.pad(input_selected, (0, -k % 8))
    return widened_product(input_selected.t(), grad_output)[:k]


def widened_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in float32, of float64 in float64: on a GPU as it was summed, elsewhere after a rounding."""
    if left.is_cuda and left.dtype in HALVES and not is_tracing():
        # To widen the result is a launch of its own, on small maps a third of the whole. Compiled it costs none.
        return torch.mm(left, right, out_dtype=torch.float32)
    grad = torch.mm(left, right)
    return grad if grad.dtype in (torch.float32, torch.float64) else grad.float()


def unaligned(tensor: torch.Tensor, channels: int) -> bool:
    """Whether a GPU multiplies faster with zero channels up to a multiple of eight.

    The tensor cores take channels of the half types by eights, and slower kernels anything else: up to half as fast.
    """
    return tensor.is_cuda and tensor.dtype in HALVES and channels % 8 != 0


def linear_channel_grad_squares(
    input_selected: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor:  # (k,)
    """A block of features at a time, so that the gradient never exists as a whole."""
    blocks = input_selected.split(SQUARED_ROWS, -1)
    return torch.cat([linear_channel_grad(x, grad_output).square().sum(1) for x in blocks])
