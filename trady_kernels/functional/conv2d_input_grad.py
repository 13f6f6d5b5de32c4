"""A convolution's input gradient, without an input: ``convolution_backward`` asks for one that it does not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: What oneDNN computes on every CPU with AVX-512; other dtypes have slower transposed convolutions.
_ONEDNN = (torch.float32, torch.bfloat16)


def conv2d_input_grad(
    grad_output: torch.Tensor,  # (N, C', H', W')
    weight: torch.Tensor,  # (C', C/groups, kh, kw)
    shape: Sequence[int],  # (N, C, H, W)
    memory_format: torch.memory_format,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (N, C, H, W)
    """Gradient of a convolution with respect to its input.

    A product takes 0.5 to 0.9 of ``convolution_backward``'s time on 1x1 layers, a transposed convolution 0.94 to
    1.07 on the others (geometric means by family, worst layer 1.17; benchmarks/conv2d_input_grad.py, its results
    beside it), both without the full-size tensor. Groups and dtypes outside of oneDNN, where transposed
    convolutions are slower, stay with ``convolution_backward``. All give the same bits but for a few roundings.

    Args:
        grad_output: ``(N, C', H', W')``.
        weight: ``(C', C/groups, kh, kw)``, of the same dtype.
        shape: of the input, ``(N, C, H, W)``.
        memory_format: of the result.
        stride, padding, dilation: pairs of ints, (height, width).
        groups: the layer's groups.

    Returns:
        ``(N, C, H, W)``.
    """
    grad_output = grad_output.contiguous(memory_format=memory_format)
    is_dense = groups == 1
    is_depthwise = groups == weight.shape[0] == shape[1]
    on_cpu = grad_output.device.type == "cpu"
    if on_cpu and is_dense and tuple(weight.shape[2:]) == (1, 1) and not any(padding):
        grad = _product(grad_output, weight, memory_format)
        if tuple(stride) != (1, 1):
            pixels = grad
            grad = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=memory_format)
            grad.zero_()[:, :, :: stride[0], :: stride[1]] = pixels
    elif on_cpu and (is_dense or is_depthwise) and grad_output.dtype in _ONEDNN:
        grad = _transposed(grad_output, weight, shape, stride, padding, dilation, groups)
    else:
        grad = _by_backward(grad_output, weight, shape, memory_format, stride, padding, dilation, groups)
    return grad.contiguous(memory_format=memory_format)


def _product(
    grad_output: torch.Tensor, weight: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    # An autocast around backward would cast mm, and leaves this operator alone. In bfloat16 mm is slower.
    if (
        memory_format == torch.channels_last
        and grad_output.dtype != torch.bfloat16
        and not torch._C._is_any_autocast_enabled()
    ):
        batch, out_channels, height, width = grad_output.shape
        pixels = grad_output.permute(0, 2, 3, 1).reshape(-1, out_channels)
        grad = torch.mm(pixels, weight.reshape(out_channels, -1))
        return grad.view(batch, height, width, weight.shape[1]).permute(0, 3, 1, 2)
    return torch.convolution(
        grad_output, weight.transpose(0, 1), None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1
    )


def _transposed(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    (height, width), (out_height, out_width) = shape[2:], grad_output.shape[2:]
    kernel_height, kernel_width = weight.shape[2:]
    rest = (
        height - (out_height - 1) * stride[0] + 2 * padding[0] - dilation[0] * (kernel_height - 1) - 1,
        width - (out_width - 1) * stride[1] + 2 * padding[1] - dilation[1] * (kernel_width - 1) - 1,
    )
    # not F.conv_transpose2d, which an autocast around backward would cast
    return torch.convolution(grad_output, weight, None, stride, padding, dilation, True, rest, groups)


def _by_backward(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    memory_format: torch.memory_format,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    # Uninitialised, never written or read. One element expanded would be smaller, but ATen calls `.contiguous()`
    # on it, a full-size copy: 3 to 4 times the time of a depthwise channels_last layer.
    stand_in = torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format
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
