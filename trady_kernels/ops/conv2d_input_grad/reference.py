"""A convolution's input gradient by ATen's ``convolution_backward``, which asks for an input that it does not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trady_kernels.ops.layout import memory_format_of


def conv2d_input_grad(
    grad_output: torch.Tensor,  # (N, C', H', W')
    weight: torch.Tensor,  # (C', C/groups, kh, kw)
    input_size: Sequence[int],  # (H, W)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (N, C, H, W)
    """Of any convolution, in the memory format of ``grad_output``."""
    # Uninitialised, never written or read. One element expanded would be smaller, but ATen calls `.contiguous()`
    # on it, a full-size copy: 3 to 4 times the time of a depthwise channels_last layer.
    stand_in = torch.empty(
        (grad_output.shape[0], weight.shape[1] * groups, *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format_of(grad_output),
    )
    return torch.ops.aten.convolution_backward.default(
        grad_output,
        stand_in,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]


def conv2d_depthwise_input_grad(
    grad_output: torch.Tensor,  # (N, C, H', W')
    weight: torch.Tensor,  # (C, 1, kh, kw)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:  # (N, C, H, W)
    """With a kernel a channel."""
    grad = conv2d_input_grad(grad_output, weight, input_size, stride, padding, dilation, weight.shape[0])
    return grad.contiguous(memory_format=memory_format_of(grad_output))
