"""``conv2d_depthwise_input_grad`` in Triton: a lane takes 16 bytes of channels, or one element, of a cell of the input.

A depthwise layer's input gradient reads grad_output once and writes as much or more. Each of its elements is in up to as
many sums as the kernel has taps: they meet in registers where one lane has them, otherwise in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trady_kernels.ops.conv2d_input_grad import USUAL_KERNELS, is_usual
from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_lanes import (
    LANES,
    MOST_NARROW_LANES,
    VECTOR_BYTES,
    WARPS,
    lanes_of_program,
    place_of,
    strides_in_vectors,
    vector_of,
    vectors,
)
from trady_kernels.ops.triton_launch import ceil_div, launch

#: No loop is pipelined: those that there are have a handful of turns.
STAGES = 1

_SIZES = [
    "count",
    "channels",
    "height",
    "width",
    "out_height",
    "out_width",
    "cell_rows",
    "cell_columns",
    "first_cell_0",
    "first_cell_1",
    *(
        f"{tensor}_{dimension}_stride"
        for tensor in ("grad", "input")
        for dimension in ("batch", "channel", "row", "column")
    ),
    "kernel_height",
    "kernel_width",
    "stride_0",
    "stride_1",
    "padding_0",
    "padding_1",
    "dilation_0",
    "dilation_1",
]


@triton.jit
def _weight(
    taps: tl.tensor,
    tap: tl.tensor,
    channels: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    return tl.load(taps + vectors(tap * channels + channel, VECTOR), mask=inside[:, None], other=0.0).to(
        DTYPE
    )


# Elements of the input are taken in cells of as many rows and columns as the stride has: those at the same place of their
# cells meet the same taps. A lane has one cell, or two that lie below one another where the stride is 1, which share
# most of what they read.
@triton.jit(do_not_specialize=_SIZES)
def _depthwise_input_grad(
    grad_output: tl.tensor,
    taps: tl.tensor,
    grad_input: tl.tensor,
    count: tl.int64,
    channels: tl.int32,
    height: tl.int32,
    width: tl.int32,
    out_height: tl.int32,
    out_width: tl.int32,
    cell_rows: tl.int32,
    cell_columns: tl.int32,
    first_cell_0: tl.int32,
    first_cell_1: tl.int32,
    grad_batch_stride: tl.int64,
    grad_channel_stride: tl.int64,
    grad_row_stride: tl.int64,
    grad_column_stride: tl.int64,
    input_batch_stride: tl.int64,
    input_channel_stride: tl.int64,
    input_row_stride: tl.int64,
    input_column_stride: tl.int64,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_0: tl.int32,
    stride_1: tl.int32,
    padding_0: tl.int32,
    padding_1: tl.int32,
    dilation_0: tl.int32,
    dilation_1: tl.int32,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    lane = lanes_of_program(LANES, WIDE)
    inside = lane < count
    image, channel, cell_row, cell_column = place_of(lane, channels, cell_rows, cell_columns, CHANNELS_LAST)
    DTYPE: tl.constexpr = tl.float64 if grad_input.dtype.element_ty == tl.float64 else tl.float32
    grad_place = image * grad_batch_stride + channel * grad_channel_stride
    input_place = image * input_batch_stride + channel * input_channel_stride
    if STRIDE > 0:
        CELLS: tl.constexpr = 2 if STRIDE == 1 else 1
        REACH: tl.constexpr = (KERNEL - 1) // STRIDE + 1  # outputs that hold an element, along an axis
        # A cell begins with the first element of the output of its number, in the padding as well.
        cell_row = cell_row * CELLS + first_cell_0
        cell_column += first_cell_1
        y, x = cell_row.to(tl.int64), cell_column.to(tl.int64)
        grad_place += y * grad_row_stride + x * grad_column_stride
        top = cell_row * STRIDE - padding_0
        left = cell_column * STRIDE - padding_1
        input_place += top.to(tl.int64) * input_row_stride + left.to(tl.int64) * input_column_stride
        for row in tl.static_range(STRIDE):
            for column in tl.static_range(STRIDE):
                total = tl.zeros((LANES, VECTOR), DTYPE)
                below = tl.zeros((LANES, VECTOR), DTYPE)
                # Outputs between the lane's last cell and this one; the compiler loads each tap once for both cells.
                for up in tl.static_range(REACH + CELLS - 1):
                    for back in tl.static_range(REACH):
                        if column + back * STRIDE < KERNEL:
                            out_row = cell_row + (CELLS - 1 - up)
                            held = inside & (cell_column >= back) & (cell_column - back < out_width)
                            held = held & (out_row >= 0) & (out_row < out_height)
                            place = grad_place + (
                                (CELLS - 1 - up) * grad_row_stride - back * grad_column_stride
                            )
                            gradient = tl.load(
                                grad_output + vectors(place, VECTOR), mask=held[:, None], other=0.0
                            ).to(DTYPE)
                            tap = (row + up * STRIDE) * KERNEL + column + back * STRIDE
                            if CELLS == 2 and up < KERNEL:
                                below += gradient * _weight(
                                    taps, tap, channels, channel, inside, DTYPE, VECTOR
                                )
                            if CELLS == 2 and up > 0:
                                tap -= KERNEL
                                total += gradient * _weight(
                                    taps, tap, channels, channel, inside, DTYPE, VECTOR
                                )
                            if CELLS == 1 and row + up * STRIDE < KERNEL:
                                total += gradient * _weight(
                                    taps, tap, channels, channel, inside, DTYPE, VECTOR
                                )
                stored_1 = inside & (left + column >= 0) & (left + column < width)
                stored = stored_1 & (top + row >= 0) & (top + row < height)
                place = input_place + (row * input_row_stride + column * input_column_stride)
                tl.store(
                    grad_input + vectors(place, VECTOR),
                    total.to(grad_input.dtype.element_ty),
                    mask=stored[:, None],
                )
                if CELLS == 2:
                    stored = stored_1 & (top + 1 >= 0) & (top + 1 < height)
                    tl.store(
                        grad_input + vectors(place + input_row_stride, VECTOR),
                        below.to(grad_input.dtype.element_ty),
                        mask=stored[:, None],
                    )
    else:  # cells of one element
        total = tl.zeros((LANES, VECTOR), DTYPE)
        for i in range(kernel_height):
            y = cell_row + padding_0 - i * dilation_0
            held_0 = inside & (y >= 0)
            out_row = y // stride_0
            held_0 = held_0 & (out_row * stride_0 == y) & (out_row < out_height)
            for j in range(kernel_width):
                x = cell_column + padding_1 - j * dilation_1
                held = held_0 & (x >= 0)
                out_column = x // stride_1
                held = held & (out_column * stride_1 == x) & (out_column < out_width)
                place = grad_place + out_row.to(tl.int64) * grad_row_stride
                place += out_column.to(tl.int64) * grad_column_stride
                gradient = tl.load(grad_output + vectors(place, VECTOR), mask=held[:, None], other=0.0).to(
                    DTYPE
                )
                tap = i * kernel_width + j
                total += gradient * _weight(taps, tap, channels, channel, inside, DTYPE, VECTOR)
        place = input_place + cell_row.to(tl.int64) * input_row_stride
        place += cell_column.to(tl.int64) * input_column_stride
        tl.store(
            grad_input + vectors(place, VECTOR),
            total.to(grad_input.dtype.element_ty),
            mask=inside[:, None],
        )


def conv2d_depthwise_input_grad(
    grad_output: torch.Tensor,  # (N, C, H', W')
    weight: torch.Tensor,  # (C, 1, kh, kw)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:  # (N, C, H, W)
    """Triton kernel of ``torch.ops.trady.conv2d_depthwise_input_grad``."""
    batch, channels, *out_size = grad_output.shape
    kernel_size = weight.shape[2:]
    memory_format = memory_format_of(grad_output)
    grad_input = torch.empty(
        (batch, channels, *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format,
    )
    if not grad_input.numel():
        return grad_input
    vector = vector_of(channels, grad_output, grad_input)
    if is_usual(kernel_size, stride, dilation):
        usual = (kernel_size[0], stride[0])
        first_cells = [padding[axis] // stride[axis] for axis in (0, 1)]
        cells = [
            (input_size[axis] - 1 + padding[axis]) // stride[axis] + 1 - first_cells[axis] for axis in (0, 1)
        ]
        cells[0] = ceil_div(cells[0], 2 if stride[0] == 1 else 1)
    else:
        usual, first_cells, cells = (0, 0), [0, 0], list(input_size)
    # A tap's weights side by side, as the channels are.
    taps = weight.reshape(channels, -1).t().contiguous()
    count = batch * channels // vector * cells[0] * cells[1]
    with torch.cuda.device_of(grad_output):
        launch(
            _depthwise_input_grad,
            (ceil_div(count, LANES),),
            grad_output,
            taps,
            grad_input,
            count,
            channels // vector,
            *input_size,
            *out_size,
            *cells,
            *first_cells,
            *strides_in_vectors(grad_output, vector),
            *strides_in_vectors(grad_input, vector),
            *kernel_size,
            *stride,
            *padding,
            *dilation,
            CHANNELS_LAST=memory_format is torch.channels_last,
            VECTOR=vector,
            KERNEL=usual[0],
            STRIDE=usual[1],
            LANES=LANES,
            WIDE=count > MOST_NARROW_LANES,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return grad_input


def configurations() -> list[Configuration]:
    """Every variant that ``conv2d_depthwise_input_grad`` launches."""
    sizes = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
    wide = {name: "i64" for name in _SIZES if name == "count" or name.endswith("_stride")}
    return [
        Configuration(
            _depthwise_input_grad,
            {name: f"*{element}" for name in ("grad_output", "taps", "grad_input")}
            | {name: wide.get(name, "i32") for name in _SIZES},
            {
                "CHANNELS_LAST": channels_last,
                "VECTOR": vector,
                "KERNEL": kernel,
                "STRIDE": stride,
                "LANES": LANES,
                "WIDE": is_wide,
            },
            WARPS,
            STAGES,
        )
        for element, size in sizes.items()
        for channels_last, vector in ((False, 1), (True, 1), (True, VECTOR_BYTES // size))
        for kernel, stride in (*USUAL_KERNELS, (0, 0))
        for is_wide in ((False, True) if element == "fp32" else (False,))
    ]
