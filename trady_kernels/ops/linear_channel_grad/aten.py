"""``linear_channel_grad`` by ATen's matrix product."""

from __future__ import annotations

import torch


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    """One matrix product; half types are accumulated in float32 inside and widened afterwards."""
    if input_selected.dim() > 2:
        input_selected, grad_output = input_selected.flatten(0, -2), grad_output.flatten(0, -2)
    grad = torch.mm(input_selected.t(), grad_output)
    return grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
