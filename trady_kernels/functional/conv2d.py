"""``sparse_conv2d``: a convolution that trains, and keeps for backward, only selected input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.functional.apply import applied
from trady_kernels.functional.autocast import autocast_dtype, cast_input
from trady_kernels.functional.first_order import first_order_only, refuse_vmap
from trady_kernels.functional.norm import (
    FrozenNorm,
    frozen_batch_norm_input_grad,
    norm_weight_trains,
    normalize,
    sum_to_bias,
)
from trady_kernels.functional.rows import check_rows
from trady_kernels.functional.stored import Stored, check_stored, holds_no_more, pack, unpack
from trady_kernels.ops import (
    conv2d_channel_grad,
    conv2d_channel_grad_with_bias,
    conv2d_input_grad,
    fold_norm,
    gather_channels,
    shift_channels_,
)
from trady_kernels.ops.backend import is_tracing
from trady_kernels.ops.fold_norm import norm_scale
from trady_kernels.ops.layout import memory_format_of

#: Zeros around the input: (left, right, top, bottom), the order that ``F.pad`` takes.
Margins = tuple[int, int, int, int]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) == 2:
        return value
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _pair_or_margins(padding: int | Sequence[int]) -> tuple[int, int] | Margins:
    if isinstance(padding, int) or len(padding) != 4:
        return _pair(padding)
    symmetric, by_hand = _split(padding)  # type: ignore[arg-type]
    return tuple(padding) if any(by_hand) else symmetric  # type: ignore[return-value]


def margins_of(padding: str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> Margins:
    """What a convolution's ``padding`` puts around its input: a string, (height, width) or margins themselves."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":  # an odd total puts the extra element behind, as torch does
        height, width = (dilation[i] * (kernel_size[i] - 1) for i in (0, 1))
        return (width // 2, width - width // 2, height // 2, height - height // 2)
    if len(padding) == 4:
        return tuple(padding)  # type: ignore[arg-type, return-value]
    return (padding[1], padding[1], padding[0], padding[0])  # type: ignore[return-value]


def _split(margins: Margins) -> tuple[tuple[int, int], Margins]:
    """Margins as what a convolution pads, the same on both sides, and what has to be padded by hand."""
    left, right, top, bottom = margins
    height, width = min(top, bottom), min(left, right)
    return (height, width), (left - width, right - width, top - height, bottom - height)


def _convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: str | tuple[int, int] | Margins,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
    norm: FrozenNorm | None,
) -> torch.Tensor:
    """The very calls of ``nn.Conv2d.forward``, so that without margins and norm the output is bit-equal to it."""
    shift: torch.Tensor | None = None
    if norm is not None and not _scales_output(
        _output_pixels(input, weight, stride, padding, dilation), weight
    ):
        weight, _, folded = fold_norm(
            weight,
            bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            autocast_dtype(weight),
        )
        norm = None
        if _adds_bias_apart(input):
            bias, shift = None, folded.to(torch.promote_types(weight.dtype, torch.float32))
        else:
            bias = folded.to(weight.dtype)
    if padding_mode != "zeros":
        input = F.pad(input, margins_of(padding, weight.shape[2:], dilation), mode=padding_mode)
        padding = (0, 0)
    elif isinstance(padding, tuple) and len(padding) == 4:
        padding, by_hand = _split(padding)
        input = F.pad(input, by_hand)
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if shift is not None:
        shift_channels_(output, shift)
    return output if norm is None else normalize(output, norm)


def _adds_bias_apart(input: torch.Tensor) -> bool:
    """Whether our own pass adds the bias, and not ATen's behind cuDNN, which is slower.

    The compiler fuses it with what follows; transforms know ATen's alone.
    """
    return input.is_cuda and not is_tracing() and not torch._C._are_functorch_transforms_active()


def _scales_output(pixels: int, weight: torch.Tensor) -> bool:
    """Whether a norm goes over the output (or its gradient), of so many pixels, and not over a larger weight.

    Late layers are like that: in ResNet-18's last block, batch 8, the weight is 12 times its output, and a
    second, scaled one would be the peak of the step's memory.
    """
    return pixels < weight.shape[1] * weight.shape[2] * weight.shape[3]


def _output_pixels(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: str | tuple[int, int] | Margins,
    dilation: tuple[int, int],
) -> int:
    left, right, top, bottom = margins_of(padding, weight.shape[2:], dilation)
    pixels = input.shape[0]
    for axis, margin in ((0, top + bottom), (1, left + right)):
        extent = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        pixels *= (input.shape[axis + 2] + margin - extent) // stride[axis] + 1
    return pixels


def _row_scale(
    scale: torch.Tensor,  # (C',)
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    groups: int,
) -> torch.Tensor:  # (k or 1, C'/groups, 1, 1)
    """Scale of each output that a row of ``channel_weight`` goes to: those of the group its channel is in."""
    by_group = scale.view(groups, -1, 1, 1)
    return by_group if groups == 1 else by_group[channels.div(in_channels // groups, rounding_mode="floor")]


def _unpad_reflect(grad: torch.Tensor, shape: Sequence[int], margins: Margins) -> torch.Tensor:
    return torch.ops.aten.reflection_pad2d_backward(grad, grad.new_empty(1).expand(shape), list(margins))


def _unpad_replicate(grad: torch.Tensor, shape: Sequence[int], margins: Margins) -> torch.Tensor:
    return torch.ops.aten.replication_pad2d_backward(grad, grad.new_empty(1).expand(shape), list(margins))


def _unpad_circular(grad: torch.Tensor, shape: Sequence[int], margins: Margins) -> torch.Tensor:
    for dim, before, after in ((2, *margins[2:]), (3, *margins[:2])):
        size = shape[dim]
        inner = grad.narrow(dim, before, size).clone()
        inner.narrow(dim, size - before, before).add_(grad.narrow(dim, 0, before))
        inner.narrow(dim, 0, after).add_(grad.narrow(dim, before + size, after))
        grad = inner
    return grad


#: The adjoint of ``F.pad`` by mode: gradient of the padded input -> gradient of the input.
_UNPAD = {"reflect": _unpad_reflect, "replicate": _unpad_replicate, "circular": _unpad_circular}


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (N, C, H, W)
        weight: torch.Tensor,  # (C', C/groups, kh, kw)
        bias: torch.Tensor | None,  # (C',)
        channel_weight: torch.Tensor | None,  # (k, C'/groups, kh, kw)
        channels: torch.Tensor,  # (k,)
        stride: tuple[int, int],
        padding: str | tuple[int, int] | Margins,
        dilation: tuple[int, int],
        groups: int,
        padding_mode: str,
        norm_weight: torch.Tensor | None,  # (C',)
        norm_bias: torch.Tensor | None,  # (C',)
        running_mean: torch.Tensor | None,  # (C',)
        running_var: torch.Tensor | None,  # (C',)
        eps: float,
        stored: Stored,
    ) -> tuple[torch.Tensor | None, ...]:
        norm = None
        if running_mean is not None and running_var is not None:
            norm = FrozenNorm(norm_weight, norm_bias, running_mean, running_var, eps)
        output = _convolve(input, weight, bias, stride, padding, dilation, groups, padding_mode, norm)
        if channel_weight is not None and stored == "8bit":
            return output, *pack(gather_channels(input, channels))
        if channel_weight is None or (channels.shape[0] == input.shape[1] and holds_no_more(input)):
            return output, None
        return output, gather_channels(input, channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, weight, bias, channel_weight, channels, *ctx.convolution = inputs[:10]
        norm_weight, norm_bias, _, running_var, ctx.eps, _ = inputs[10:]
        _, selected, *scales = output
        if selected is not None:
            ctx.mark_non_differentiable(selected, *scales)
        elif channel_weight is not None:
            selected = input  # every channel is selected: keep the input itself, as nn.Conv2d does
        ctx.set_materialize_grads(False)
        # A change of `channels` before backward is noticed by autograd's version check.
        ctx.save_for_backward(
            selected,
            scales[0] if scales else None,
            weight if ctx.needs_input_grad[0] else None,
            channels if channel_weight is not None else None,
            norm_weight,
            running_var,
        )
        ctx.kernel_size = weight.shape[2:]
        # the output's format too: a channels_last weight alone makes everything channels_last
        formats = [memory_format_of(tensor) for tensor in (input, output[0])]
        ctx.input_layout = (
            input.shape,
            torch.channels_last if torch.channels_last in formats else torch.contiguous_format,
        )
        ctx.dtypes = (
            None if bias is None else bias.dtype,
            None if channel_weight is None else channel_weight.dtype,
            None if norm_bias is None else norm_bias.dtype,
        )

    @staticmethod
    @first_order_only("sparse_conv2d")
    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 16
        selected, scales, weight, channels, norm_weight, running_var = ctx.saved_tensors
        stride, padding, dilation, groups, padding_mode = ctx.convolution
        shape, memory_format = ctx.input_layout
        bias_dtype, rows_dtype, norm_bias_dtype = ctx.dtypes
        if padding_mode == "zeros" and len(padding) == 2:  # the usual case, at every layer of every step
            symmetric, by_hand, padded = padding, (0, 0, 0, 0), False
        else:
            margins = margins_of(padding, ctx.kernel_size, dilation)
            symmetric, by_hand = _split(margins) if padding_mode == "zeros" else ((0, 0), margins)
            padded = any(by_hand)
        mode = "constant" if padding_mode == "zeros" else padding_mode

        scale: torch.Tensor | None = None
        grad_norm_bias = None  # a plain sum of grad_output, before anything scales it
        if running_var is not None:
            pixels = grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3]
            if not ctx.needs_input_grad[0]:
                scale = norm_scale(norm_weight, running_var, ctx.eps)
            elif _scales_output(pixels, weight):
                if ctx.needs_input_grad[11]:
                    grad_norm_bias = sum_to_bias(grad_output)
                grad_output = frozen_batch_norm_input_grad(grad_output, norm_weight, running_var, ctx.eps)
            else:
                weight, scale = fold_norm(
                    weight, None, norm_weight, None, None, running_var, ctx.eps, grad_output.dtype
                )[:2]
        grad_input = grad_bias = grad_rows = sums = None
        needs_sums = ctx.needs_input_grad[2] or (ctx.needs_input_grad[11] and grad_norm_bias is None)
        if ctx.needs_input_grad[3]:
            selected = unpack(selected, scales, grad_output.dtype)
            arguments = (
                F.pad(selected, by_hand, mode=mode) if padded else selected,
                grad_output,
                channels,
                shape[1],
                ctx.kernel_size,
                stride,
                symmetric,
                dilation,
                groups,
            )
            if needs_sums and groups == 1 and channels.shape[0] > 0:
                grad_rows, sums = conv2d_channel_grad_with_bias(*arguments)
            else:
                grad_rows = conv2d_channel_grad(*arguments)
            if scale is not None:
                grad_rows = grad_rows * _row_scale(scale, channels, shape[1], groups)
            grad_rows = grad_rows.to(rows_dtype)
        if ctx.needs_input_grad[0]:
            weight = weight.to(grad_output.dtype)
            size = shape
            if padded:
                size = (*shape[:2], shape[2] + by_hand[2] + by_hand[3], shape[3] + by_hand[0] + by_hand[1])
            grad_input = conv2d_input_grad(
                grad_output, weight, size, memory_format, stride, symmetric, dilation, groups
            )
            if padded and padding_mode == "zeros":
                inner = grad_input[:, :, by_hand[2] :, by_hand[0] :][:, :, : shape[2], : shape[3]]
                grad_input = inner.clone(memory_format=memory_format)
            elif padded:
                grad_input = _UNPAD[padding_mode](grad_input, shape, by_hand)
        if needs_sums:
            if sums is None:
                sums = sum_to_bias(grad_output)
            if ctx.needs_input_grad[2]:
                grad_bias = (sums if scale is None else sums * scale).to(bias_dtype)
            if ctx.needs_input_grad[11] and grad_norm_bias is None:
                grad_norm_bias = sums
        if grad_norm_bias is not None:
            grad_norm_bias = grad_norm_bias.to(norm_bias_dtype)
        return grad_input, None, grad_bias, grad_rows, *(None,) * 7, grad_norm_bias, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        refuse_vmap("sparse_conv2d")


_sparse_conv2d = applied(_SparseConv2d)


def sparse_conv2d(
    input: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    weight: torch.Tensor,  # (C', C/groups, kh, kw)
    bias: torch.Tensor | None,  # (C',)
    channel_weight: torch.Tensor | None,  # (k, C'/groups, kh, kw)
    channels: torch.Tensor,  # (k,)
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    norm: FrozenNorm | None = None,
    stored: Stored = "exact",
) -> torch.Tensor:  # (N, C', H', W') or (C', H', W')
    r"""``F.conv2d`` whose weight gradient goes to the rows of the selected input channels alone.

    .. math:: dW[c, o, i, j] = \sum_{n, h, w} x_{pad}[n, c, h s_h + i d_h, w s_w + j d_w] \; dY[n, o, h, w]

    With a norm folded in, :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` scales the weight on its way into the
    convolution, or the output where it is the smaller one: :math:`dX` is that of :math:`s[o] W`, and

    .. math:: dW[c, o, i, j] = s[o] \; dW'[c, o, i, j], \qquad db[o] = s[o] \; d\beta[o], \qquad
              d\beta[o] = \sum_{n, h, w} dY[n, o, h, w]

    Kept for backward: the selected channels of the input where ``channel_weight`` requires grad, and
    references: to ``weight`` where the input does, and to the norm's weight and variance (TraDy, arXiv
    2510.19675, section 3).

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(C', C/groups, kh, kw)``, the whole weight. It must already hold the values of
            ``channel_weight`` at ``channels``; it gets no gradient itself.
        bias: ``(C',)`` or None.
        channel_weight: ``(k, C'/groups, kh, kw)``, what the gradient of the selected channels goes to, one
            row an input channel; None where nothing but the input and the biases get a gradient. Its
            values are not read.
        channels: ``(k,)`` int64, sorted and unique, the input channel of each row.
        stride, padding, dilation, groups: as ``F.conv2d`` takes them, ``'same'`` and ``'valid'`` included;
            ``padding`` also as (left, right, top, bottom), as ``F.pad`` takes them.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        norm: a batch norm in evaluation mode that the output goes through. Its bias gets a gradient where it
            requires grad. While its weight does it is not folded, and the convolution's output is kept for it.
        stored: how the selected channels are kept, see ``Stored``. In 8 bits each value is off by at most 1/254 of
            the largest among the 64 in a row with it, and so is what the gradient of ``channel_weight`` is made of.

    Returns:
        ``(N, C', H', W')`` or ``(C', H', W')``, without ``norm`` bit-equal to ``nn.Conv2d``'s.

    Raises:
        TypeError: ``input`` or ``channels`` is not a tensor.
        ValueError: ``input`` does not have the weight's number of channels, or not 3 or 4 dimensions;
            ``channel_weight`` has another number of rows than there are ``channels``; ``stored`` is none of
            ``Stored``.
        RuntimeError: when a gradient of the gradient is asked for.
        NotImplementedError: under ``torch.vmap`` while something requires grad.
    """
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"input: got {type(input).__name__}, expected a tensor (N, C, H, W) or (C, H, W)")
    shape = input.shape
    dim = len(shape)
    in_channels = weight.shape[1] * groups
    if dim not in (3, 4) or shape[-3] != in_channels:
        raise ValueError(
            f"input: got shape {tuple(shape)}, expected (N, {in_channels}, H, W) or "
            f"({in_channels}, H, W), since the layer has {in_channels} input channels"
        )
    check_stored(stored)
    stride, dilation = _pair(stride), _pair(dilation)
    if not isinstance(padding, str):
        padding = _pair_or_margins(padding)
    input = input if dim == 4 else input.unsqueeze(0)
    if norm is not None and norm_weight_trains(norm):
        output = sparse_conv2d(
            input,
            weight,
            bias,
            channel_weight,
            channels,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            stored=stored,
        )
        output = normalize(output, norm)
        return output if dim == 4 else output.squeeze(0)
    if channel_weight is not None:
        check_rows(channel_weight, channels)
        if not channel_weight.requires_grad:
            channel_weight = None
    if not torch.is_grad_enabled() or not (
        channel_weight is not None
        or input.requires_grad
        or (bias is not None and bias.requires_grad)
        or (norm is not None and norm.bias is not None and norm.bias.requires_grad)
    ):
        output = _convolve(input, weight, bias, stride, padding, dilation, groups, padding_mode, norm)
        return output if dim == 4 else output.squeeze(0)
    output = _sparse_conv2d(
        cast_input(input),
        weight,
        bias,
        channel_weight,
        channels,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        *((None, None, None, None, 0.0) if norm is None else norm),
        stored,
    )
    return output if dim == 4 else output.squeeze(0)
