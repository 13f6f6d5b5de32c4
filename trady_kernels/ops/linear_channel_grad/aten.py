"""``linear_channel_grad`` by ATen's matrix product."""

from __future__ import annotations

import torch


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    """One matrix product; half types are accumulated in float32 inside and widened afterwards."""
    accumulate = torch.promote_types(input_selected.dtype, torch.float32)
    x, dy = input_selected.flatten(0, -2), grad_output.flatten(0, -2)
    return torch.mm(x.t(), dy).to(accumulate)
