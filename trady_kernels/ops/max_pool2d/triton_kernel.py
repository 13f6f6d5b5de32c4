"""``max_pool2d_offsets`` and its backward in Triton: one element of the result a lane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.max_pool2d.reference import pooled_size
from trady_kernels.ops.triton_configuration import Configuration

#: Elements of one program, one a thread, which loads a whole window.
ELEMENTS = 128
WARPS = 4
#: No loop is pipelined: its trip count is a handful, and the caches hold what neighbouring windows share.
STAGES = 1
#: Elements that are counted in 32 bits; a division in 64 takes several times longer.
MOST_NARROW_ELEMENTS = 2**31 - ELEMENTS


@triton.jit
def _place(
    element: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Image, channel, row and column of an element by its place in memory."""
    if CHANNELS_LAST:
        channel = element % channels
        element = element // channels
    column = element % width
    element = element // width
    row = element % height
    element = element // height
    if not CHANNELS_LAST:
        channel = element % channels
        element = element // channels
    return element.to(tl.int64), channel.to(tl.int64), row.to(tl.int32), column.to(tl.int32)


@triton.jit
def _first_element(ELEMENTS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * ELEMENTS + tl.arange(0, ELEMENTS)


_FORWARD_SIZES = [
    "count",
    "channels",
    "height",
    "width",
    "pooled_height",
    "pooled_width",
    "batch_stride",
    "channel_stride",
    "row_stride",
    "column_stride",
    "kernel_height",
    "kernel_width",
    "stride_0",
    "stride_1",
    "padding_0",
    "padding_1",
    "dilation_0",
    "dilation_1",
]


@triton.jit(do_not_specialize=_FORWARD_SIZES)
def _pool(
    input: tl.tensor,
    output: tl.tensor,
    offsets: tl.tensor,
    count: tl.int64,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    pooled_height: tl.int32,
    pooled_width: tl.int32,
    batch_stride: tl.int64,
    channel_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_0: tl.int32,
    stride_1: tl.int32,
    padding_0: tl.int32,
    padding_1: tl.int32,
    dilation_0: tl.int32,
    dilation_1: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    element = _first_element(ELEMENTS, WIDE)
    inside = element < count
    image, channel, row, column = _place(element, channels, pooled_height, pooled_width, CHANNELS_LAST)
    input += image * batch_stride + channel * channel_stride
    # In float32 for the half types, which the interpreter cannot compare.
    DTYPE: tl.constexpr = tl.float64 if output.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full((ELEMENTS,), float("-inf"), DTYPE)
    winner = tl.full((ELEMENTS,), -1, tl.int32)
    for i in range(kernel_height):
        y = row * stride_0 - padding_0 + i * dilation_0
        for j in range(kernel_width):
            x = column * stride_1 - padding_1 + j * dilation_1
            held = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
            value = tl.load(input + place, mask=held, other=0.0).to(DTYPE)
            # ATen's rule: the first maximum, and the last NaN.
            wins = held & ((value > best) | (value != value) | (winner < 0))
            best = tl.where(wins, value, best)
            winner = tl.where(wins, i * kernel_width + j, winner)
    tl.store(output + element, best.to(output.dtype.element_ty), mask=inside)
    tl.store(offsets + element, winner.to(tl.uint8), mask=inside)


_BACKWARD_SIZES = [
    *_FORWARD_SIZES[:6],
    "grad_batch_stride",
    "grad_channel_stride",
    "grad_row_stride",
    "grad_column_stride",
    *_FORWARD_SIZES[6:],
]


@triton.jit(do_not_specialize=_BACKWARD_SIZES)
def _pool_backward(
    grad_output: tl.tensor,
    offsets: tl.tensor,
    grad_input: tl.tensor,
    count: tl.int64,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    pooled_height: tl.int32,
    pooled_width: tl.int32,
    grad_batch_stride: tl.int64,
    grad_channel_stride: tl.int64,
    grad_row_stride: tl.int64,
    grad_column_stride: tl.int64,
    batch_stride: tl.int64,
    channel_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_0: tl.int32,
    stride_1: tl.int32,
    padding_0: tl.int32,
    padding_1: tl.int32,
    dilation_0: tl.int32,
    dilation_1: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    element = _first_element(ELEMENTS, WIDE)
    inside = element < count
    image, channel, row, column = _place(element, channels, height, width, CHANNELS_LAST)
    grad_output += image * grad_batch_stride + channel * grad_channel_stride
    offsets += image * batch_stride + channel * channel_stride
    DTYPE: tl.constexpr = tl.float64 if grad_input.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((ELEMENTS,), DTYPE)
    reach_0 = (kernel_height - 1) * dilation_0
    reach_1 = (kernel_width - 1) * dilation_1
    # The first window that can hold the element, along each axis.
    first_0 = (tl.maximum(row + padding_0 - reach_0, 0) + stride_0 - 1) // stride_0
    first_1 = (tl.maximum(column + padding_1 - reach_1, 0) + stride_1 - 1) // stride_1
    for i in range(reach_0 // stride_0 + 1):
        pooled_row = first_0 + i
        down = row + padding_0 - pooled_row * stride_0
        held_0 = inside & (pooled_row < pooled_height) & (down >= 0) & (down % dilation_0 == 0)
        for j in range(reach_1 // stride_1 + 1):
            pooled_column = first_1 + j
            right = column + padding_1 - pooled_column * stride_1
            held = held_0 & (pooled_column < pooled_width) & (right >= 0) & (right % dilation_1 == 0)
            y, x = pooled_row.to(tl.int64), pooled_column.to(tl.int64)
            winner = tl.load(offsets + y * row_stride + x * column_stride, mask=held, other=0)
            won = held & (winner.to(tl.int32) == down // dilation_0 * kernel_width + right // dilation_1)
            gradient = tl.load(
                grad_output + y * grad_row_stride + x * grad_column_stride, mask=won, other=0.0
            )
            # Rounded to the dtype after each window, as ATen does it.
            total = (total + gradient.to(DTYPE)).to(grad_input.dtype.element_ty).to(DTYPE)
    tl.store(grad_input + element, total.to(grad_input.dtype.element_ty), mask=inside)


def max_pool2d_offsets(
    input: torch.Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # (N, C, H', W'), (N, C, H', W')
    """Triton kernel of ``torch.ops.trady.max_pool2d_offsets``."""
    memory_format = memory_format_of(input)
    sizes = [
        pooled_size(
            input.shape[axis + 2], kernel_size[axis], stride[axis], padding[axis], dilation[axis], ceil_mode
        )
        for axis in (0, 1)
    ]
    output, offsets = (
        torch.empty((*input.shape[:2], *sizes), dtype=dtype, device=input.device, memory_format=memory_format)
        for dtype in (input.dtype, torch.uint8)
    )
    count = output.numel()
    if count:
        with torch.cuda.device_of(input):
            _pool[(triton.cdiv(count, ELEMENTS),)](
                input,
                output,
                offsets,
                count,
                *input.shape[1:],
                *sizes,
                *input.stride(),
                *kernel_size,
                *stride,
                *padding,
                *dilation,
                CHANNELS_LAST=memory_format is torch.channels_last,
                ELEMENTS=ELEMENTS,
                WIDE=count > MOST_NARROW_ELEMENTS,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return output, offsets


def max_pool2d_offsets_backward(
    grad_output: torch.Tensor,  # (N, C, H', W')
    offsets: torch.Tensor,  # (N, C, H', W')
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:  # (N, C, H, W)
    """Triton kernel of ``torch.ops.trady.max_pool2d_offsets_backward``."""
    memory_format = memory_format_of(offsets)
    grad_input = torch.empty(
        (*offsets.shape[:2], *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format,
    )
    count = grad_input.numel()
    if count:
        with torch.cuda.device_of(grad_output):
            _pool_backward[(triton.cdiv(count, ELEMENTS),)](
                grad_output,
                offsets,
                grad_input,
                count,
                offsets.shape[1],
                *input_size,
                *offsets.shape[2:],
                *grad_output.stride(),
                *offsets.stride(),
                *kernel_size,
                *stride,
                *padding,
                *dilation,
                CHANNELS_LAST=memory_format is torch.channels_last,
                ELEMENTS=ELEMENTS,
                WIDE=count > MOST_NARROW_ELEMENTS,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return grad_input


def _signature(pointers: dict[str, str], sizes: list[str]) -> dict[str, str]:
    wide = {name: "i64" for name in sizes if name == "count" or name.endswith("_stride")}
    return pointers | {name: wide.get(name, "i32") for name in sizes}


def configurations() -> list[Configuration]:
    """Every variant that ``max_pool2d_offsets`` and its backward launch."""
    variants = [
        (element, channels_last, wide)
        for element in ("fp32", "fp64", "bf16", "fp16")
        for channels_last in (False, True)
        for wide in ((False, True) if element == "fp32" else (False,))
    ]

    def constants(channels_last: bool, wide: bool) -> dict[str, int]:
        return {"CHANNELS_LAST": channels_last, "ELEMENTS": ELEMENTS, "WIDE": wide}

    return [
        *(
            Configuration(
                _pool,
                _signature(
                    {"input": f"*{element}", "output": f"*{element}", "offsets": "*u8"}, _FORWARD_SIZES
                ),
                constants(channels_last, wide),
                WARPS,
                STAGES,
            )
            for element, channels_last, wide in variants
        ),
        *(
            Configuration(
                _pool_backward,
                _signature(
                    {"grad_output": f"*{element}", "offsets": "*u8", "grad_input": f"*{element}"},
                    _BACKWARD_SIZES,
                ),
                constants(channels_last, wide),
                WARPS,
                STAGES,
            )
            for element, channels_last, wide in variants
        ),
    ]
