"""``conv2d_channel_grad``: a convolution's weight gradient at the selected input channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trady_kernels.ops.backend import Operator
from trady_kernels.ops.choice import limited, own_or_aten
from trady_kernels.ops.conv2d_channel_grad.aten import conv2d_channel_grad as aten
from trady_kernels.ops.conv2d_channel_grad.aten import conv2d_channel_grad_squares as aten_squares
from trady_kernels.ops.conv2d_channel_grad.aten import conv2d_channel_grad_with_bias as aten_with_bias
from trady_kernels.ops.conv2d_channel_grad.reference import conv2d_channel_grad as reference
from trady_kernels.ops.conv2d_channel_grad.reference import (
    conv2d_channel_grad_squares as reference_squares,
)
from trady_kernels.ops.conv2d_channel_grad.reference import (
    conv2d_channel_grad_with_bias as reference_with_bias,
)
from trady_kernels.ops.layout import memory_format_of


def _of_geometry(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as the operator is called: its four pairs of integers, from kernel_size to dilation, in one list.

    Four lists take torch's dispatcher 1.1 us longer than one, at which small layers take 10 us altogether.
    """

    @functools.wraps(function)
    def spread(
        input_selected: torch.Tensor,
        grad_output: torch.Tensor,
        channels: torch.Tensor,
        in_channels: int,
        geometry: Sequence[int],
        groups: int,
    ) -> Any:
        pairs = geometry[:2], geometry[2:4], geometry[4:6], geometry[6:]
        return function(input_selected, grad_output, channels, in_channels, *pairs, groups)

    return spread


@_of_geometry
def _fake(
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    shape = (channels.shape[0], grad_output.shape[1] // groups, *kernel_size)
    return grad_output.new_empty(shape, dtype=torch.promote_types(grad_output.dtype, torch.float32))


@_of_geometry
def _validate(
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if len(dilation) != 2:
        raise ValueError(
            "kernel_size, stride, padding, dilation: expected pairs (height, width), got "
            f"{6 + len(dilation)} integers together"
        )
    shape, out = input_selected.shape, grad_output.shape
    if len(shape) != 4 or len(out) != 4:
        raise ValueError(
            f"input_selected, grad_output: got {len(shape)} and {len(out)} dimensions, "
            "expected (N, k, H, W) and (N, out_channels, H', W')"
        )
    if channels.shape != shape[1:2]:
        raise ValueError(
            f"channels: got shape {tuple(channels.shape)}, expected ({shape[1]},), one index "
            "for each channel of input_selected"
        )
    if input_selected.dtype != grad_output.dtype:
        raise ValueError(
            f"grad_output: got {grad_output.dtype}, expected {input_selected.dtype}, the dtype of input_selected"
        )
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(pair) < least:
            raise ValueError(f"{name}: got {tuple(pair)}, expected integers of at least {least}")
    if groups < 1 or in_channels % groups or out[1] % groups:
        raise ValueError(
            f"groups: got {groups}, expected a divisor of in_channels ({in_channels}) and of grad_output's "
            f"channels ({out[1]})"
        )
    height = (shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    width = (shape[3] + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    if out[0] != shape[0] or out[2] != height or out[3] != width:
        axis, expected = (2, height) if out[0] != shape[0] or out[2] != height else (3, width)
        raise ValueError(
            f"grad_output: got shape {tuple(out)}, expected batch {shape[0]} and "
            f"size {expected} along dimension {axis}, which the convolution's arguments give"
        )


def family(kernel_size: Sequence[int], stride: Sequence[int], groups: int) -> str:
    """The kind of convolution, as the choice between kernels names it."""
    if groups != 1:
        return "grouped"
    if kernel_size[0] != 1 or kernel_size[1] != 1:
        return "kxk"
    return "1x1" if stride[0] == 1 and stride[1] == 1 else "1x1 strided"


def channels_to_choose_by(family: str, selected: int, outputs: int) -> int:
    """What a :class:`~trady_kernels.ops.choice.Limit` of the family counts."""
    return min(selected, outputs) if family in ("1x1", "1x1 strided") else selected


#: Taps of a kernel up to which Triton is faster than cuDNN in float32 and channels_last. An H200 takes 1.6 times as long
#: for 49 of them; between them and 9 nothing was measured.
MOST_TAPS_OF_PIXELS = 25


def _choose(
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    geometry: Sequence[int],
    groups: int,
) -> str:
    on_gpu = input_selected.is_cuda
    if not on_gpu and (
        groups != 1 or not limited("conv2d_channel_grad")
    ):  # the CPU's has no limits for groups
        return "cpp"
    kind, memory_format = family(geometry[:2], geometry[2:4], groups), memory_format_of(grad_output)
    if on_gpu and kind == "kxk" and geometry[0] * geometry[1] > MOST_TAPS_OF_PIXELS:
        if memory_format == torch.channels_last and input_selected.dtype == torch.float32:
            return "aten"
    return own_or_aten(
        "cuda" if on_gpu else "cpu",
        "conv2d_channel_grad",
        kind,
        memory_format,
        input_selected.dtype,
        channels_to_choose_by(kind, channels.shape[0], grad_output.shape[1]),
        grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3],
    )


def _choose_but_products(input_selected: torch.Tensor, grad_output: torch.Tensor, *args: Any) -> str:
    """Of the operators that are no products in CUDA C++: Triton stands in for them where it is faster than ATen."""
    name = _choose(input_selected, grad_output, *args)
    planes = args[-1] == 1 and memory_format_of(grad_output) == torch.contiguous_format
    return "aten" if name == "cuda" and planes else name


def _fake_squares(*args: Any) -> torch.Tensor:
    grad = _fake(*args)
    return grad.new_empty(grad.shape[0])


def _fake_with_bias(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grad = _fake(*args)
    return grad, grad.new_empty(grad.shape[1])


def _validate_with_bias(*args: Any) -> None:
    _validate(*args)
    channels, groups = args[2], args[-1]
    if groups != 1:
        raise ValueError(
            f"groups: got {groups}, expected 1: selected channels of a grouped layer do not read every output, "
            "sum grad_output instead"
        )
    if channels.shape[0] == 0:
        raise ValueError("channels: got none, expected at least one; sum grad_output instead")


_ARGUMENTS = "(Tensor input_selected, Tensor grad_output, Tensor channels, SymInt in_channels, int[] geometry, int groups)"
_operator = Operator(
    f"conv2d_channel_grad{_ARGUMENTS} -> Tensor",
    reference=_of_geometry(reference),
    fake=_fake,
    kernels={"aten": _of_geometry(aten)},
    choose=_choose,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


_with_bias = Operator(
    f"conv2d_channel_grad_with_bias{_ARGUMENTS} -> (Tensor, Tensor)",
    reference=_of_geometry(reference_with_bias),
    fake=_fake_with_bias,
    kernels={"aten": _of_geometry(aten_with_bias)},
    choose=_choose_but_products,
    validate=_validate_with_bias,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


_squares = Operator(
    f"conv2d_channel_grad_squares{_ARGUMENTS} -> Tensor",
    reference=_of_geometry(reference_squares),
    fake=_fake_squares,
    kernels={"aten": _of_geometry(aten_squares)},
    choose=_choose_but_products,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


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

    Args:
        input_selected: ``(N, k, H, W)``, the selected channels of the convolution's input.
        grad_output: ``(N, C', H', W')``, same dtype.
        channels: ``(k,)`` int64, which channels of the layer's ``in_channels`` these are; decides the
            group each one belongs to.
        in_channels: the layer's input channels.
        kernel_size, stride, padding, dilation: pairs of ints, (height, width).
        groups: the layer's groups.

    Returns:
        ``(k, C'/groups, kh, kw)``, contiguous, accumulated and returned in float32 (float64 for
        float64 input).

    Raises:
        ValueError: shapes, dtypes or groups that do not belong to one convolution.
    """
    geometry = (*kernel_size, *stride, *padding, *dilation)
    return _operator.call(input_selected, grad_output, channels, in_channels, geometry, groups)


def conv2d_channel_grad_with_bias(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # (k, C', kh, kw), (C',)
    r""":func:`conv2d_channel_grad` of a layer without groups, and its bias's gradient from the same pass.

    .. math:: db[o] = \sum_{n, h, w} dY[n, o, h, w]

    Args:
        input_selected, grad_output, channels, in_channels, kernel_size, stride, padding, dilation: as
            :func:`conv2d_channel_grad` takes them, at least one channel.
        groups: 1.

    Returns:
        ``(k, C', kh, kw)`` and ``(C',)``, both contiguous, accumulated and returned in float32 (float64 for
        float64 input).

    Raises:
        ValueError: shapes or dtypes that do not belong to one convolution, groups, or no channel.
    """
    geometry = (*kernel_size, *stride, *padding, *dilation)
    return _with_bias.call(input_selected, grad_output, channels, in_channels, geometry, groups)


def conv2d_channel_grad_squares(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (k,)
    r"""Squared norm of each selected channel's weight gradient, which never exists as a whole.

    .. math:: \|dW[c]\|_2^2 = \sum_{o, i, j} dW[c, o, i, j]^2

    What RGN sums the roots of (TraDy, arXiv 2510.19675, equation 8).

    Args:
        input_selected, grad_output, channels, in_channels, kernel_size, stride, padding, dilation, groups: as
            :func:`conv2d_channel_grad` takes them.

    Returns:
        ``(k,)`` in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or groups that do not belong to one convolution.
    """
    geometry = (*kernel_size, *stride, *padding, *dilation)
    return _squares.call(input_selected, grad_output, channels, in_channels, geometry, groups)
