"""Pooling that keeps no input: max pooling a byte for each pooled element, average pooling only shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.functional.apply import applied
from trady_kernels.functional.first_order import first_order_only, refuse_vmap
from trady_kernels.ops import max_pool2d_offsets, max_pool2d_offsets_backward
from trady_kernels.ops.backend import FLOATING, is_tracing
from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.max_pool2d import LARGEST_WINDOW
from trady_kernels.ops.max_pool2d.reference import pooled_size

_Size = int | Sequence[int]


def _sizes(value: _Size, count: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        return tuple(value) * count if len(value) == 1 else tuple(value)
    return (value,) * count


def _adaptive_size(
    input: torch.Tensor, output_size: int | Sequence[int | None] | None, count: int
) -> tuple[int, ...]:
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * count
    own = input.shape[-len(sizes) :]
    return tuple(mine if size is None else size for size, mine in zip(sizes, own, strict=False))


# ---- max pooling ----------------------------------------------------------------------------------------


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (N, C, H, W)
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return max_pool2d_offsets(input, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, *ctx.window, _ = inputs
        _, offsets = output
        ctx.input_size = tuple(input.shape[2:])
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(offsets)

    @staticmethod
    @first_order_only("max_pool2d")
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 6
        (offsets,) = ctx.saved_tensors
        grad_input = max_pool2d_offsets_backward(grad_output, offsets, ctx.input_size, *ctx.window)
        return grad_input, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        refuse_vmap("max_pool2d")


_max_pool2d = applied(_MaxPool2d)


def _fits_a_byte(
    input: torch.Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> bool:
    """Whether the operator takes these arguments; what is wrong with others, torch's own function says."""
    if input.dim() not in (3, 4) or input.dtype not in FLOATING or input.layout != torch.strided:
        return False
    if not len(kernel_size) == len(stride) == len(padding) == len(dilation) == 2:
        return False
    if min(*kernel_size, *stride, *dilation) < 1 or kernel_size[0] * kernel_size[1] > LARGEST_WINDOW:
        return False
    if input.shape[-3] == 0:
        return False
    for axis in (0, 1):
        size, kernel = input.shape[axis - 2], kernel_size[axis]
        if not 0 <= padding[axis] <= kernel // 2:
            return False
        # a window of larger dilation may step over the whole input
        if dilation[axis] > size:
            return False
        if pooled_size(size, kernel, stride[axis], padding[axis], dilation[axis], ceil_mode) < 1:
            return False
    return True


def max_pool2d(
    input: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:  # (N, C, H', W') or (C, H', W')
    """``F.max_pool2d`` that keeps for backward one byte for each pooled element: the winner's place in its window.

    Values, winners (NaN included) and the order in which overlapping windows' gradients are summed are ATen's. What
    a byte cannot hold goes to ``F.max_pool2d``: windows of more than 256 elements, integers, an input smaller than
    the dilation.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        kernel_size, stride, padding, dilation, ceil_mode: as ``F.max_pool2d`` takes them.

    Returns:
        ``(N, C, H', W')`` or ``(C, H', W')``, bit-equal to ``F.max_pool2d``'s.

    Raises:
        RuntimeError: what ``F.max_pool2d`` raises on bad arguments; when a gradient of the gradient is asked for.
        NotImplementedError: under ``torch.vmap`` while the input requires grad.
    """
    kernel, stride_, padding_, dilation_ = (
        _sizes(value, 2)
        for value in (kernel_size, kernel_size if stride is None else stride, padding, dilation)
    )
    if not (
        torch.is_grad_enabled()
        and input.requires_grad
        and _fits_a_byte(input, kernel, stride_, padding_, dilation_, ceil_mode)
    ):
        return F.max_pool2d(input, kernel, stride_, padding_, dilation_, ceil_mode)
    images = input if input.dim() == 4 else input.unsqueeze(0)
    output = _max_pool2d(images, kernel, stride_, padding_, dilation_, ceil_mode)
    return output if input.dim() == 4 else output.squeeze(0)


def adaptive_max_pool2d(
    input: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    output_size: int | Sequence[int | None] | None,
) -> torch.Tensor:  # (N, C, H', W') or (C, H', W')
    """``F.adaptive_max_pool2d``, as ``max_pool2d`` where the output size divides the input's.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        output_size: ``(H', W')``, one number for both, None for the input's. Where it does not divide the
            input's size, the windows are of different sizes and torch's own function keeps the input.

    Returns:
        ``(N, C, H', W')`` or ``(C, H', W')``, bit-equal to ``F.adaptive_max_pool2d``'s.

    Raises:
        RuntimeError, NotImplementedError: as ``max_pool2d``.
    """
    sizes = _adaptive_size(input, output_size, 2)
    if input.dim() in (3, 4) and all(
        size > 0 and input.shape[axis - 2] % size == 0 for axis, size in enumerate(sizes)
    ):
        window = tuple(input.shape[axis - 2] // size for axis, size in enumerate(sizes))
        if 0 < window[0] * window[1] <= LARGEST_WINDOW:
            return max_pool2d(input, window)
    return F.adaptive_max_pool2d(input, output_size)  # type: ignore[arg-type]


# ---- average pooling ------------------------------------------------------------------------------------


def _stand_in(
    grad_output: torch.Tensor, shape: Sequence[int], memory_format: torch.memory_format
) -> torch.Tensor:
    """A tensor of the input's shape and memory format without its memory.

    ATen's backward of an average looks at nothing else of the input. Strides of zero count as contiguous.
    """
    if memory_format == torch.contiguous_format:
        return grad_output.new_empty(1).expand(shape)
    stand_in = torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format
    )
    if not (is_tracing() or torch._C._are_functorch_transforms_active()):
        stand_in.untyped_storage().resize_(0)  # freed before anything was written
    return stand_in


@dataclass(frozen=True)
class _Average:
    """An average's forward, and its backward from the gradient, an input's shape and the same arguments."""

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., torch.Tensor]


_AVERAGES = {
    "avg_pool2d": _Average(F.avg_pool2d, torch.ops.aten.avg_pool2d_backward.default),
    "avg_pool3d": _Average(F.avg_pool3d, torch.ops.aten.avg_pool3d_backward.default),
    "adaptive_avg_pool2d": _Average(
        F.adaptive_avg_pool2d,
        lambda grad, input, _: torch.ops.aten._adaptive_avg_pool2d_backward(grad, input),
    ),
    "adaptive_avg_pool3d": _Average(
        F.adaptive_avg_pool3d,
        lambda grad, input, _: torch.ops.aten._adaptive_avg_pool3d_backward(grad, input),
    ),
}


class _AveragePool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: torch.Tensor, name: str, arguments: tuple[Any, ...]) -> torch.Tensor:  # type: ignore[override]
        return _AVERAGES[name].forward(input, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, ctx.name, ctx.arguments = inputs
        ctx.shape, ctx.memory_format = input.shape, memory_format_of(input)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        stand_in = _stand_in(grad_output, ctx.shape, ctx.memory_format)
        return _AVERAGES[ctx.name].backward(grad_output, stand_in, *ctx.arguments), None, None


_average_pool = applied(_AveragePool)


def _average(name: str, input: torch.Tensor, *arguments: Any) -> torch.Tensor:
    if not (torch.is_grad_enabled() and input.requires_grad):
        return _AVERAGES[name].forward(input, *arguments)
    return _average_pool(input, name, arguments)


def avg_pool1d(
    input: torch.Tensor,  # (N, C, L) or (C, L)
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:  # (N, C, L') or (C, L')
    """``F.avg_pool1d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        kernel_size, stride, padding, ceil_mode, count_include_pad: as ``F.avg_pool1d`` takes them.

    Returns:
        ``(N, C, L')`` or ``(C, L')``, bit-equal to ``F.avg_pool1d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.avg_pool1d`` raises on bad arguments.
    """
    arguments = [
        _sizes(value, 1) for value in (kernel_size, kernel_size if stride is None else stride, padding)
    ]
    if input.dim() not in (2, 3) or any(len(value) != 1 for value in arguments):
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)  # type: ignore[arg-type]
    kernel, stride_, padding_ = ((first, *value) for first, value in zip((1, 1, 0), arguments, strict=True))
    rows = input.unsqueeze(-2)  # as torch's own does
    return _average(
        "avg_pool2d", rows, kernel, stride_, padding_, ceil_mode, count_include_pad, None
    ).squeeze(-2)


def avg_pool2d(
    input: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:  # (N, C, H', W') or (C, H', W')
    """``F.avg_pool2d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as ``F.avg_pool2d``
            takes them.

    Returns:
        ``(N, C, H', W')`` or ``(C, H', W')``, bit-equal to ``F.avg_pool2d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.avg_pool2d`` raises on bad arguments.
    """
    window = (_sizes(value, 2) for value in (kernel_size, kernel_size if stride is None else stride, padding))
    return _average("avg_pool2d", input, *window, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: torch.Tensor,  # (N, C, D, H, W) or (C, D, H, W)
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:  # (N, C, D', H', W') or (C, D', H', W')
    """``F.avg_pool3d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as ``F.avg_pool3d``
            takes them.

    Returns:
        ``(N, C, D', H', W')`` or ``(C, D', H', W')``, bit-equal to ``F.avg_pool3d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.avg_pool3d`` raises on bad arguments.
    """
    window = (_sizes(value, 3) for value in (kernel_size, kernel_size if stride is None else stride, padding))
    return _average("avg_pool3d", input, *window, ceil_mode, count_include_pad, divisor_override)


def _adaptive_average(
    dimensions: int, input: torch.Tensor, output_size: int | Sequence[int | None] | None
) -> torch.Tensor:
    sizes = _adaptive_size(input, output_size, dimensions)
    if all(size == 1 for size in sizes):
        # torch takes the mean, whose backward keeps nothing
        return _AVERAGES[f"adaptive_avg_pool{dimensions}d"].forward(input, sizes)
    return _average(f"adaptive_avg_pool{dimensions}d", input, sizes)


def adaptive_avg_pool1d(
    input: torch.Tensor,  # (N, C, L) or (C, L)
    output_size: int | Sequence[int],
) -> torch.Tensor:  # (N, C, L') or (C, L')
    """``F.adaptive_avg_pool1d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``.
        output_size: ``L'``.

    Returns:
        ``(N, C, L')`` or ``(C, L')``, bit-equal to ``F.adaptive_avg_pool1d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.adaptive_avg_pool1d`` raises on bad arguments.
    """
    size = _sizes(output_size, 1)
    if input.dim() not in (2, 3) or len(size) != 1:
        return F.adaptive_avg_pool1d(input, output_size)  # type: ignore[arg-type]
    return _adaptive_average(2, input.unsqueeze(-2), (1, *size)).squeeze(-2)  # as torch's own does


def adaptive_avg_pool2d(
    input: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    output_size: int | Sequence[int | None] | None,
) -> torch.Tensor:  # (N, C, H', W') or (C, H', W')
    """``F.adaptive_avg_pool2d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        output_size: ``(H', W')``, one number for both, None for the input's.

    Returns:
        ``(N, C, H', W')`` or ``(C, H', W')``, bit-equal to ``F.adaptive_avg_pool2d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.adaptive_avg_pool2d`` raises on bad arguments.
    """
    return _adaptive_average(2, input, output_size)


def adaptive_avg_pool3d(
    input: torch.Tensor,  # (N, C, D, H, W) or (C, D, H, W)
    output_size: int | Sequence[int | None] | None,
) -> torch.Tensor:  # (N, C, D', H', W') or (C, D', H', W')
    """``F.adaptive_avg_pool3d`` that keeps only its input's shape for backward.

    Args:
        input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        output_size: ``(D', H', W')``, one number for all, None for the input's.

    Returns:
        ``(N, C, D', H', W')`` or ``(C, D', H', W')``, bit-equal to ``F.adaptive_avg_pool3d``'s, its gradient too.

    Raises:
        RuntimeError: what ``F.adaptive_avg_pool3d`` raises on bad arguments.
    """
    return _adaptive_average(3, input, output_size)
