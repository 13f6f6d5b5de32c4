"""A convolution's input gradient, without an input: ``convolution_backward`` asks for one that it does not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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

    Which of torch's operators is taken was measured on one core in float32, on the layers of MobileNetV2,
    EfficientNet-Lite0, ResNet and ResNeXt at batch 8: against ``convolution_backward`` the product takes 0.5 to
    0.9 of the time (a strided one 0.3 to 0.6), the transposed convolution 0.7 to 1.05 for dense and depthwise
    layers, with the same bits. It takes up to 2.7 for 1x1 kernels and 3 for groups, which therefore
    have other ways.

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
    kernel_size = weight.shape[2:]
    if grad_output.device.type != "cpu" or (groups != 1 and not groups == weight.shape[0] == shape[1]):
        grad = _by_backward(grad_output, weight, shape, memory_format, stride, padding, dilation, groups)
    elif groups == 1 and tuple(kernel_size) == (1, 1) and not any(padding):
        grad = _product(grad_output, weight, memory_format)
        if tuple(stride) != (1, 1):
            pixels = grad
            grad = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=memory_format)
            grad.zero_()[:, :, :: stride[0], :: stride[1]] = pixels
    else:
        grad = _transposed(grad_output, weight, shape, stride, padding, dilation, groups)
    return grad.contiguous(memory_format=memory_format)


def _product(
    grad_output: torch.Tensor, weight: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    # mm would be cast by an autocast around backward, where convolutions are left alone
    if memory_format == torch.channels_last and not torch._C._is_any_autocast_enabled():
        batch, out_channels, height, width = grad_output.shape
        pixels = grad_output.permute(0, 2, 3, 1).reshape(-1, out_channels)
        grad = torch.mm(pixels, weight.reshape(out_channels, -1))
        return grad.view(batch, height, width, -1).permute(0, 3, 1, 2)
    return torch.ops.aten.convolution(
        grad_output, weight.transpose(0, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
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
    rest = [
        shape[i + 2]
        - (
            (grad_output.shape[i + 2] - 1) * stride[i]
            - 2 * padding[i]
            + dilation[i] * (weight.shape[i + 2] - 1)
            + 1
        )
        for i in (0, 1)
    ]
    # not F.conv_transpose2d, which an autocast around backward would cast
    return torch.ops.aten.convolution(
        grad_output, weight, None, stride, padding, dilation, True, rest, groups
    )


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
    return torch.ops.aten.convolution_backward(
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
