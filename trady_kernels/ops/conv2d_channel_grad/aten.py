"""``conv2d_channel_grad`` by ATen's own weight gradient on the compact input."""

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
    """A grouped layer becomes a depthwise one: channel ``c`` alone with the outputs of its group."""
    k = input_selected.shape[1]
    out_per_group = grad_output.shape[1] // groups
    accumulate = torch.promote_types(input_selected.dtype, torch.float32)
    if k == 0 or grad_output.numel() == 0:
        return grad_output.new_zeros((k, out_per_group, *kernel_size), dtype=accumulate)
    if tuple(kernel_size) == (1, 1) and tuple(stride) != (1, 1):
        # oneDNN's own strided 1x1 gradient crashes or errs with few channels in channels_last (oneDNN#6035; with
        # torch 2.13 at 1 and 4 channels of 56x56, stride 2). The strided pixels alone are the same problem.
        if tuple(padding) != (0, 0):
            input_selected = F.pad(input_selected, (padding[1], padding[1], padding[0], padding[0]))
        input_selected = input_selected[:, :, :: stride[0], :: stride[1]]
        stride, padding = (1, 1), (0, 0)
    # Of pixels that are each other's, the gradient's transpose is that of input and grad_output exchanged. Many results
    # are better had in their order: to transpose them takes up to the time of the call itself.
    point = groups == 1 and tuple(kernel_size) == (1, 1) and tuple(padding) == (0, 0)
    exchanged = point and k * out_per_group >= 1 << 16
    if exchanged:
        input_selected, grad_output = grad_output, input_selected
        out_per_group, k = k, out_per_group
    if groups > 1:
        outputs = channels.div(in_channels // groups, rounding_mode="floor") * out_per_group
        outputs = (outputs[:, None] + torch.arange(out_per_group, device=channels.device)).flatten()
        grad_output = grad_output.index_select(1, outputs)
        shape, conv_groups = (k * out_per_group, 1, *kernel_size), k
    else:
        shape, conv_groups = (out_per_group, k, *kernel_size), 1
    _, grad, _ = torch.ops.aten.convolution_backward.default(
        grad_output,
        input_selected,
        grad_output.new_empty(1, dtype=input_selected.dtype).expand(shape),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        conv_groups,
        [False, True, False],
    )
    grad = grad.to(accumulate)
    if groups > 1:
        return grad.reshape(k, out_per_group, *kernel_size)
    if exchanged:
        return grad.contiguous()
    return grad.transpose(0, 1).contiguous()


def conv2d_channel_grad_with_bias(
    input_selected: torch.Tensor, grad_output: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:  # (k, C', kh, kw), (C',)
    """Two calls: ATen's own weight gradient sums the bias's in another pass too."""
    accumulate = torch.promote_types(grad_output.dtype, torch.float32)
    bias = grad_output.sum((0, 2, 3), dtype=accumulate)
    return conv2d_channel_grad(input_selected, grad_output, *args), bias
