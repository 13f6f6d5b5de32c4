"""``conv2d_channel_grad`` in plain PyTorch: what the operator means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def conv2d_channel_grad(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (k, C'/groups, kh, kw)
    r"""Weight gradient of a convolution at the selected input channels.

    .. math::
        dW[c, o, i, j] = \sum_{n, h, w} x_{pad}[n, c, h s_h + i d_h, w s_w + j d_w] \; dY[n, o, h, w]

    where ``o`` runs over the ``C'/groups`` outputs of the group that channel ``c`` belongs to
    (TraDy, arXiv 2510.19675, section 3; Sparse Update's input-channel gradient).
    """
    accumulate = torch.promote_types(input_selected.dtype, torch.float32)
    x = F.pad(input_selected.to(accumulate), (padding[1], padding[1], padding[0], padding[0]))
    dy = grad_output.to(accumulate)
    out_height, out_width = dy.shape[2:]
    if groups == 1:
        equation = "nkhw,nohw->ko"
    else:
        equation = "nkhw,nkohw->ko"
        dy = dy.unflatten(1, (groups, -1))[:, channels // (in_channels // groups)]
    grad = x.new_empty(x.shape[1], grad_output.shape[1] // groups, *kernel_size)
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            top, left = i * dilation[0], j * dilation[1]
            bottom = top + (out_height - 1) * stride[0] + 1
            right = left + (out_width - 1) * stride[1] + 1
            taps = x[:, :, top : bottom : stride[0], left : right : stride[1]]
            grad[:, :, i, j] = torch.einsum(equation, taps, dy)
    return grad


def conv2d_channel_grad_squares(*args: Any) -> torch.Tensor:  # (k,)
    r"""Squared norm of each channel's gradient, :math:`\|dW[c]\|^2 = \sum_{o, i, j} dW[c, o, i, j]^2`."""
    return conv2d_channel_grad(*args).square().sum((1, 2, 3))


def conv2d_channel_grad_with_bias(
    input_selected: torch.Tensor, grad_output: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:  # (k, C', kh, kw), (C',)
    r"""Beside :func:`conv2d_channel_grad` the bias's gradient, :math:`db[o] = \sum_{n, h, w} dY[n, o, h, w]`."""
    accumulate = torch.promote_types(grad_output.dtype, torch.float32)
    bias = grad_output.sum((0, 2, 3), dtype=accumulate)
    return conv2d_channel_grad(input_selected, grad_output, *args), bias
