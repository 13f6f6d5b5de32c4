"""A convolution's input gradient by a product or a transposed convolution: what oneDNN is faster at than at its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: What oneDNN computes on every CPU with AVX-512; other dtypes have slower transposed convolutions.
ONEDNN = (torch.float32, torch.bfloat16)


def points(
    grad_output: torch.Tensor,  # (N, C', H', W')
    weight: torch.Tensor,  # (C', C, 1, 1)
    input_size: Sequence[int],
    stride: Sequence[int],
    memory_format: torch.memory_format,
) -> torch.Tensor:  # (N, C, H, W)
    """Of a dense 1x1 kernel without padding: a product of the pixels that it reads, zeros elsewhere."""
    pixels = _product(grad_output, weight, memory_format)
    if tuple(stride) == (1, 1):
        return pixels
    grad = torch.empty(
        (*pixels.shape[:2], *input_size),
        dtype=pixels.dtype,
        device=pixels.device,
        memory_format=memory_format,
    )
    grad.zero_()[:, :, :: stride[0], :: stride[1]] = pixels
    return grad


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


def transposed(
    grad_output: torch.Tensor,  # (N, C', H', W')
    weight: torch.Tensor,  # (C', C/groups, kh, kw)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (N, C, H, W)
    """Of any convolution, without the full-size tensor that ``convolution_backward`` asks for."""
    rest = [
        input_size[axis]
        - (grad_output.shape[axis + 2] - 1) * stride[axis]
        + 2 * padding[axis]
        - dilation[axis] * (weight.shape[axis + 2] - 1)
        - 1
        for axis in (0, 1)
    ]
    # not F.conv_transpose2d, which an autocast around backward would cast
    return torch.convolution(grad_output, weight, None, stride, padding, dilation, True, rest, groups)


def conv2d_depthwise_input_grad(
    grad_output: torch.Tensor,  # (N, C, H', W')
    weight: torch.Tensor,  # (C, 1, kh, kw)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:  # (N, C, H, W)
    """With a kernel a channel."""
    return transposed(grad_output, weight, input_size, stride, padding, dilation, weight.shape[0])
