"""``max_pool2d_offsets`` and its backward: max pooling that keeps one byte for each pooled element."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trady_kernels.ops.backend import FLOATING, Operator, by_device
from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.max_pool2d.reference import max_pool2d_offsets as reference
from trady_kernels.ops.max_pool2d.reference import max_pool2d_offsets_backward as reference_backward
from trady_kernels.ops.max_pool2d.reference import pooled_size

#: Elements of the largest window whose offsets fit a byte.
LARGEST_WINDOW = 256


def _validate(
    input: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> None:
    if input.dim() != 4 or input.dtype not in FLOATING:
        raise ValueError(
            f"input: got shape {tuple(input.shape)} of {input.dtype}, expected (N, C, H, W) of a floating dtype"
        )
    if min(kernel_size) < 1 or kernel_size[0] * kernel_size[1] > LARGEST_WINDOW:
        raise ValueError(
            f"kernel_size: got {tuple(kernel_size)}, expected a window of 1 to {LARGEST_WINDOW} elements, whose "
            "offsets fit a byte"
        )
    if min(stride) < 1 or min(dilation) < 1:
        raise ValueError(
            f"stride, dilation: got {tuple(stride)} and {tuple(dilation)}, expected at least 1 each"
        )
    for axis in (0, 1):
        size = input.shape[axis + 2]
        arguments = (kernel_size[axis], stride[axis], padding[axis], dilation[axis])
        most = kernel_size[axis] // 2
        if not 0 <= padding[axis] <= most:
            raise ValueError(
                f"padding: got {padding[axis]} along dimension {axis + 2}, expected 0 to {most}, half of kernel_size"
            )
        if dilation[axis] > size or pooled_size(size, *arguments, ceil_mode) < 1:
            raise ValueError(
                f"input: got size {size} along dimension {axis + 2}, expected one that holds an element of every "
                f"window of kernel_size, stride, padding, dilation {arguments}"
            )


def _fake(
    input: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [
        pooled_size(
            input.shape[axis + 2], kernel_size[axis], stride[axis], padding[axis], dilation[axis], ceil_mode
        )
        for axis in (0, 1)
    ]
    output, offsets = (
        torch.empty(
            (*input.shape[:2], *sizes),
            dtype=dtype,
            device=input.device,
            memory_format=memory_format_of(input),
        )
        for dtype in (input.dtype, torch.uint8)
    )
    return output, offsets


_operator = Operator(
    "max_pool2d_offsets(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode) -> (Tensor output, Tensor offsets)",
    reference=reference,
    fake=_fake,
    kernels={},
    choose=by_device,
    validate=_validate,
    triton=f"{__name__}.triton_kernel",
)


def _validate_backward(
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    if grad_output.dim() != 4 or grad_output.shape != offsets.shape or grad_output.dtype not in FLOATING:
        raise ValueError(
            f"grad_output: got shape {tuple(grad_output.shape)} of {grad_output.dtype}, expected "
            f"{tuple(offsets.shape)}, the shape of offsets, of a floating dtype"
        )
    if offsets.dtype != torch.uint8:
        raise ValueError(f"offsets: got {offsets.dtype}, expected torch.uint8")
    for axis in (0, 1):
        arguments = (input_size[axis], kernel_size[axis], stride[axis], padding[axis], dilation[axis])
        if offsets.shape[axis + 2] not in (pooled_size(*arguments, False), pooled_size(*arguments, True)):
            raise ValueError(
                f"input_size: got {tuple(input_size)}, expected one that pooling makes {tuple(offsets.shape[2:])} of"
            )


def _fake_backward(
    grad_output: torch.Tensor,
    offsets: torch.Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    return torch.empty(
        (*offsets.shape[:2], *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format_of(offsets),
    )


_operator_backward = Operator(
    "max_pool2d_offsets_backward(Tensor grad_output, Tensor offsets, SymInt[2] input_size, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    reference=reference_backward,
    fake=_fake_backward,
    kernels={},
    choose=by_device,
    validate=_validate_backward,
    triton=f"{__name__}.triton_kernel",
)


def max_pool2d_offsets(
    input: torch.Tensor,  # (N, C, H, W)
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # (N, C, H', W'), (N, C, H', W')
    """Max pooling, and where in its window each maximum was.

    The winner is the first maximum in scan order, the last NaN where there is one, as in ATen's kernels.

    Args:
        input: ``(N, C, H, W)`` float32, float64, bfloat16 or float16, contiguous, channels_last or strided.
        kernel_size: height and width of the window, at most 256 elements.
        stride, padding, dilation, ceil_mode: as ``F.max_pool2d`` takes them, both axes given. An input
            smaller than the dilation is refused: a window could hold none of it.

    Returns:
        The pooled input ``(N, C, H', W')``, and of the same shape in uint8 ``kernel_width * row + column`` of
        the winner, counted in the window, padding included. Both in the input's memory format.

    Raises:
        ValueError: an argument is out of its range, or not 4 dimensions of a floating dtype.
    """
    return _operator.call(input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_offsets_backward(
    grad_output: torch.Tensor,  # (N, C, H', W')
    offsets: torch.Tensor,  # (N, C, H', W')
    input_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:  # (N, C, H, W)
    """Gradient of ``max_pool2d_offsets`` with respect to its input.

    Args:
        grad_output: ``(N, C, H', W')``, any memory format.
        offsets: ``(N, C, H', W')`` uint8, what the forward gave.
        input_size: ``(H, W)`` of the forward's input.
        kernel_size, stride, padding, dilation: the forward's.

    Returns:
        ``(N, C, H, W)`` in the dtype of ``grad_output`` and the memory format of ``offsets``. Where windows overlap
        their gradients are added to zero in the windows' scan order, each sum rounded to the dtype: bit-equal
        to ATen's, and the same for any number of threads.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _operator_backward.call(grad_output, offsets, input_size, kernel_size, stride, padding, dilation)
