"""Max pooling that tells winners by their offset in the window, in plain PyTorch: what the operators mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from trady_kernels.ops.layout import memory_format_of


def pooled_size(
    size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one axis of ``size`` elements; none begins behind the input."""
    reach = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if not ceil_mode:
        return reach // stride + 1
    count = (reach + stride - 1) // stride + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def _corners(
    pooled: torch.Tensor,  # (N, C, H', W')
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ``(H', 1)`` and column ``(W',)`` of each window's first element, negative in the padding."""
    height, width = pooled.shape[2:]
    rows = torch.arange(height, device=pooled.device)[:, None] * stride[0] - padding[0]
    return rows, torch.arange(width, device=pooled.device) * stride[1] - padding[1]


def max_pool2d_offsets(
    input: torch.Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # (N, C, H', W'), (N, C, H', W')
    """The pooled input, and for each element ``kernel_width * row + column`` of the winner in its window."""
    output, indices = F.max_pool2d(
        input,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        ceil_mode,
        return_indices=True,
    )
    width = input.shape[3]
    rows, columns = _corners(output, stride, padding)
    row = (indices // width - rows) // dilation[0]
    column = (indices % width - columns) // dilation[1]
    memory_format = memory_format_of(input)
    offsets = (row * kernel_size[1] + column).to(torch.uint8)
    return output.clone(memory_format=memory_format), offsets.clone(memory_format=memory_format)


def max_pool2d_offsets_backward(
    grad_output: torch.Tensor,  # (N, C, H', W')
    offsets: torch.Tensor,  # (N, C, H', W')
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:  # (N, C, H, W)
    """Each gradient to its window's winner; what several windows give is summed in their order, rounded each time."""
    height, width = input_size
    rows, columns = _corners(offsets, stride, padding)
    wide = offsets.to(torch.int64)
    row = rows + wide // kernel_size[1] * dilation[0]
    column = columns + wide % kernel_size[1] * dilation[1]
    memory_format = memory_format_of(offsets)
    shape = (*offsets.shape[:2], height, width)
    if offsets.numel() == 0:
        return torch.empty(
            shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format
        )
    ceil_mode = any(
        offsets.shape[axis + 2]
        != pooled_size(
            input_size[axis], kernel_size[axis], stride[axis], padding[axis], dilation[axis], False
        )
        for axis in (0, 1)
    )
    # ATen's backward looks at its input's shape alone
    grad_input = torch.ops.aten.max_pool2d_with_indices_backward(
        grad_output.contiguous(),
        grad_output.new_empty(1).expand(shape),
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        ceil_mode,
        (row * width + column).contiguous(),
    )
    return grad_input.clone(memory_format=memory_format)
