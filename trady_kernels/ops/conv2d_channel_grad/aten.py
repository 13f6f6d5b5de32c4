"""``conv2d_channel_grad`` by ATen's own weight gradient on the compact input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.ops.linear_channel_grad.aten import unaligned, widened_product
from trady_kernels.ops.squares import SQUARED_ROWS


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
    points = groups == 1 and tuple(kernel_size) == (1, 1)
    if groups == 1 and unaligned(input_selected, k) and not (points and k == 1):
        input_selected = F.pad(input_selected, (0, 0, 0, 0, 0, -k % 8))
    if points:
        return _rows(_of_points(input_selected, grad_output, stride, padding), k, accumulate)
    if groups > 1:
        outputs = channels.div(in_channels // groups, rounding_mode="floor") * out_per_group
        outputs = (outputs[:, None] + torch.arange(out_per_group, device=channels.device)).flatten()
        grad_output = grad_output.index_select(1, outputs)
        shape, conv_groups = (k * out_per_group, 1, *kernel_size), k
    else:
        shape, conv_groups = (out_per_group, input_selected.shape[1], *kernel_size), 1
    grad = _convolution_backward(
        grad_output, input_selected, shape, stride, padding, dilation, groups=conv_groups
    )
    if groups > 1:
        return grad.to(accumulate).reshape(k, out_per_group, *kernel_size)
    return _rows(grad.transpose(0, 1), k, accumulate)


def _rows(grad: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The first ``k`` rows, contiguous and in ``dtype``, in one pass: on a GPU each is a launch."""
    grad = grad[:k]
    if grad.dtype == dtype:
        return grad.contiguous()
    return grad.new_empty(grad.shape, dtype=dtype).copy_(grad)


def _of_points(
    input_selected: torch.Tensor, grad_output: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:  # (k, C', 1, 1)
    """Of a 1x1 kernel, in any layout and dtype: in channels_last a product of matrices that lie there as they are."""
    k, outputs = input_selected.shape[1], grad_output.shape[1]
    if tuple(padding) != (0, 0):
        input_selected = F.pad(input_selected, (padding[1], padding[1], padding[0], padding[0]))
    if tuple(stride) != (1, 1):
        # oneDNN's own strided 1x1 gradient crashes or errs with few channels in channels_last (oneDNN#6035; with
        # torch 2.13 at 1 and 4 channels of 56x56, stride 2). The strided pixels alone are the same problem.
        input_selected = input_selected[:, :, :: stride[0], :: stride[1]]
    if grad_output.stride(1) == 1:
        rows = input_selected.movedim(1, 3).reshape(-1, k)
        grad_rows = grad_output.movedim(1, 3).reshape(-1, outputs)
        # Into rows of few results MKL multiplies more slowly.
        if outputs <= min(k, 128) and not grad_output.is_cuda:
            grad = widened_product(grad_rows.t(), rows).t()
        else:
            grad = widened_product(rows.t(), grad_rows)
        return grad.reshape(k, outputs, 1, 1)
    # The gradient's transpose is that of input and grad_output exchanged, whose results come in their order; for few
    # channels oneDNN takes far longer for it.
    if 4 * k >= outputs:
        return _convolution_backward(input_selected, grad_output, (k, outputs, 1, 1))
    return _convolution_backward(grad_output, input_selected, (outputs, k, 1, 1)).transpose(0, 1)


def _convolution_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    shape: Sequence[int],  # of the weight
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """The weight's gradient, in the inputs' dtype."""
    return torch.ops.aten.convolution_backward.default(
        grad_output,
        input,
        input.new_empty(shape),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [False, True, False],
    )[1]


def conv2d_channel_grad_squares(
    input_selected: torch.Tensor, grad_output: torch.Tensor, channels: torch.Tensor, *args: Any
) -> torch.Tensor:  # (k,)
    """A block of channels at a time, so that the gradient never exists as a whole."""
    pairs = zip(input_selected.split(SQUARED_ROWS, 1), channels.split(SQUARED_ROWS), strict=True)
    blocks = [conv2d_channel_grad(x, grad_output, of, *args).square().sum((1, 2, 3)) for x, of in pairs]
    return torch.cat(blocks)


def conv2d_channel_grad_with_bias(
    input_selected: torch.Tensor, grad_output: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:  # (k, C', kh, kw), (C',)
    """Two calls: ATen's own weight gradient sums the bias's in another pass too."""
    accumulate = torch.promote_types(grad_output.dtype, torch.float32)
    bias = grad_output.sum((0, 2, 3), dtype=accumulate)
    return conv2d_channel_grad(input_selected, grad_output, *args), bias
