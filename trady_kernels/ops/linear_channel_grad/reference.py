"""``linear_channel_grad`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    r"""Weight gradient of a linear layer at the selected input features, one row a feature.

    .. math:: dW[c, o] = \sum_n x[n, c] \; dY[n, o]
    """
    accumulate = torch.promote_types(input_selected.dtype, torch.float32)
    x = input_selected.to(accumulate).flatten(0, -2)
    dy = grad_output.to(accumulate).flatten(0, -2)
    return torch.einsum("nk,no->ko", x, dy)


def linear_channel_grad_squares(
    input_selected: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor:  # (k,)
    r"""Squared norm of each feature's gradient, :math:`\|dW[c]\|^2 = \sum_o dW[c, o]^2`."""
    return linear_channel_grad(input_selected, grad_output).square().sum(1)
