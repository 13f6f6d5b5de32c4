"""``linear_channel_grad`` by ATen's matrix product."""

from __future__ import annotations

import torch

from trady_kernels.ops.squares import SQUARED_ROWS


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    """One matrix product; half types are accumulated in float32 inside and widened afterwards."""
    if input_selected.dim() > 2:
        input_selected, grad_output = input_selected.flatten(0, -2), grad_output.flatten(0, -2)
    grad = torch.mm(input_selected.t(), grad_output)
    return grad if grad.dtype in (torch.float32, torch.float64) else grad.float()


def linear_channel_grad_squares(
    input_selected: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor:  # (k,)
    """A block of features at a time, so that the gradient never exists as a whole."""
    blocks = input_selected.split(SQUARED_ROWS, -1)
    return torch.cat([linear_channel_grad(x, grad_output).square().sum(1) for x in blocks])
