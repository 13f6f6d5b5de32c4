"""``fold_norm`` in plain PyTorch: what the operator means."""

from __future__ import annotations

import torch


def norm_scale(weight: torch.Tensor | None, running_var: torch.Tensor, eps: float) -> torch.Tensor:
    r""":math:`\gamma / \sqrt{\sigma^2 + \epsilon}` in the statistics' dtype, in float32 for half types."""
    variance = running_var.to(torch.promote_types(running_var.dtype, torch.float32))
    scale = torch.rsqrt(variance + eps)
    return scale if weight is None else scale * weight


def fold_norm(
    weight: torch.Tensor,  # (C', ...)
    bias: torch.Tensor | None,  # (C',)
    norm_weight: torch.Tensor | None,  # (C',)
    norm_bias: torch.Tensor | None,  # (C',)
    running_mean: torch.Tensor | None,  # (C',)
    running_var: torch.Tensor,  # (C',)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (C', ...), (C',), (C',) or (0,)
    """The weight with the norm's scale in it, that scale, and the bias with the norm's shift in it."""
    scale = norm_scale(norm_weight, running_var, eps)
    scaled = (weight * scale.view(-1, *(1,) * (weight.dim() - 1))).to(dtype)
    if running_mean is None:
        return scaled, scale, scale.new_empty(0)
    mean = running_mean if bias is None else running_mean - bias
    shift = -mean * scale if norm_bias is None else torch.addcmul(norm_bias, mean, scale, value=-1)
    return scaled, scale, shift
