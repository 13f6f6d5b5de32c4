"""``max_pool2d_offsets`` and its backward in Triton: a lane takes 16 bytes of channels, or one element, at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.max_pool2d.reference import pooled_size
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

#: No loop is pipelined: its trip count is a handful, and the caches hold what neighbouring windows share.
STAGES = 1
#: Size and stride of the square windows whose loops are unrolled in the backward.
USUAL_WINDOWS = ((2, 2), (3, 2))


#: Channels and strides are counted in vectors.
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
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    lane = lanes_of_program(LANES, WIDE)
    inside = lane < count
    image, channel, row, column = place_of(lane, channels, pooled_height, pooled_width, CHANNELS_LAST)
    top = row * stride_0 - padding_0
    left = column * stride_1 - padding_1
    corner = image * batch_stride + channel * channel_stride
    corner += top.to(tl.int64) * row_stride + left.to(tl.int64) * column_stride
    # In float32 for the half types, which the interpreter cannot compare.
    DTYPE: tl.constexpr = tl.float64 if output.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full((LANES, VECTOR), float("-inf"), DTYPE)
    winner = tl.full((LANES, VECTOR), -1, tl.int32)
    first = (
        tl.full((LANES,), 0, tl.int32) + kernel_height * kernel_width
    )  # element of the window in the input
    y = top
    for i in range(kernel_height):
        held_0 = inside & (y >= 0) & (y < height)
        x = left
        place = corner
        for j in tl.range(0, kernel_width, loop_unroll_factor=3):
            held = held_0 & (x >= 0) & (x < width)
            value = tl.load(input + vectors(place, VECTOR), mask=held[:, None], other=float("-inf")).to(DTYPE)
            # ATen's rule: the first maximum, and the last NaN.
            wins = (value > best) | (value != value)
            best = tl.where(wins, value, best)
            winner = tl.where(wins, i * kernel_width + j, winner)
            first = tl.minimum(first, tl.where(held, i * kernel_width + j, first))
            x += dilation_1
            place += dilation_1 * column_stride
        y += dilation_0
        corner += dilation_0 * row_stride
    # Nothing is above -inf: of a window of nothing else the first element is the maximum.
    winner = tl.where(winner < 0, first[:, None], winner)
    place = vectors(lane, VECTOR)
    tl.store(output + place, best.to(output.dtype.element_ty), mask=inside[:, None])
    tl.store(offsets + place, winner.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _gradient(
    grad_output: tl.tensor,
    offsets: tl.tensor,
    grad_place: tl.tensor,
    offsets_place: tl.tensor,
    held: tl.tensor,
    element: tl.tensor,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Gradient of one window a lane where its winner is this element of it, elsewhere and outside the input 0."""
    winner = tl.load(offsets + vectors(offsets_place, VECTOR), mask=held[:, None], other=0)
    gradient = tl.load(grad_output + vectors(grad_place, VECTOR), mask=held[:, None], other=0.0)
    return tl.where(winner.to(tl.int32) == element, gradient.to(DTYPE), 0.0)


_BACKWARD_SIZES = [
    "count",
    "channels",
    "height",
    "width",
    "pooled_height",
    "pooled_width",
    "cell_rows",
    "cell_columns",
    "first_cell_0",
    "first_cell_1",
    "windows_0",
    "windows_1",
    "rest_0",
    "rest_1",
    *(
        f"{tensor}_{dimension}_stride"
        for tensor in ("grad", "offsets", "input")
        for dimension in ("batch", "channel", "row", "column")
    ),
    *_FORWARD_SIZES[_FORWARD_SIZES.index("kernel_width") :],
]


# Elements of the input are taken in cells of as many rows and columns as the stride has, one cell a lane: those at the
# same place of their cells lie at the same places of their windows, so that all lanes go through the same windows.
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
    cell_rows: tl.int32,
    cell_columns: tl.int32,
    first_cell_0: tl.int32,
    first_cell_1: tl.int32,
    windows_0: tl.int32,
    windows_1: tl.int32,
    rest_0: tl.int32,
    rest_1: tl.int32,
    grad_batch_stride: tl.int64,
    grad_channel_stride: tl.int64,
    grad_row_stride: tl.int64,
    grad_column_stride: tl.int64,
    offsets_batch_stride: tl.int64,
    offsets_channel_stride: tl.int64,
    offsets_row_stride: tl.int64,
    offsets_column_stride: tl.int64,
    input_batch_stride: tl.int64,
    input_channel_stride: tl.int64,
    input_row_stride: tl.int64,
    input_column_stride: tl.int64,
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
    # A cell begins with the first element of the window of its number, in the padding as well.
    cell_row += first_cell_0
    cell_column += first_cell_1
    y, x = cell_row.to(tl.int64), cell_column.to(tl.int64)
    grad_place = image * grad_batch_stride + channel * grad_channel_stride
    grad_place += y * grad_row_stride + x * grad_column_stride
    offsets_place = image * offsets_batch_stride + channel * offsets_channel_stride
    offsets_place += y * offsets_row_stride + x * offsets_column_stride
    top = cell_row * stride_0 - padding_0
    left = cell_column * stride_1 - padding_1
    input_place = image * input_batch_stride + channel * input_channel_stride
    input_place += top.to(tl.int64) * input_row_stride + left.to(tl.int64) * input_column_stride
    DTYPE: tl.constexpr = tl.float64 if grad_input.dtype.element_ty == tl.float64 else tl.float32
    if STRIDE > 0:  # a usual window, not dilated: no loop is left
        WINDOWS: tl.constexpr = (KERNEL - 1) // STRIDE + 1  # that hold an element, along an axis: one or two
        for row in tl.static_range(STRIDE):
            for column in tl.static_range(STRIDE):
                total = tl.zeros((LANES, VECTOR), DTYPE)
                for up in tl.static_range(WINDOWS - 1, -1, -1):  # windows between the cell's and this one
                    for back in tl.static_range(WINDOWS - 1, -1, -1):
                        if row + up * STRIDE < KERNEL and column + back * STRIDE < KERNEL:
                            held = inside & (cell_row >= up) & (cell_row - up < pooled_height)
                            held = held & (cell_column >= back) & (cell_column - back < pooled_width)
                            total += _gradient(
                                grad_output,
                                offsets,
                                grad_place - (up * grad_row_stride + back * grad_column_stride),
                                offsets_place - (up * offsets_row_stride + back * offsets_column_stride),
                                held,
                                (row + up * STRIDE) * KERNEL + column + back * STRIDE,
                                DTYPE,
                                VECTOR,
                            )
                            # Rounded to the dtype after each window, as ATen does it; a sum of two when it is stored.
                            if row + STRIDE < KERNEL and column + STRIDE < KERNEL:
                                total = total.to(grad_input.dtype.element_ty).to(DTYPE)
                stored = inside & (top + row >= 0) & (top + row < height)
                stored = stored & (left + column >= 0) & (left + column < width)
                tl.store(
                    grad_input
                    + vectors(input_place + (row * input_row_stride + column * input_column_stride), VECTOR),
                    total.to(grad_input.dtype.element_ty),
                    mask=stored[:, None],
                )
    else:
        for row in range(stride_0):
            rows = windows_0 + (row <= rest_0).to(tl.int32)
            stored_0 = inside & (top + row >= 0) & (top + row < height)
            for column in range(stride_1):
                columns = windows_1 + (column <= rest_1).to(tl.int32)
                total = tl.zeros((LANES, VECTOR), DTYPE)
                for i in range(rows):
                    up = rows - 1 - i
                    down = row + up * stride_0
                    held_0 = inside & (cell_row >= up) & (cell_row - up < pooled_height)
                    element_row = down.to(tl.uint32) // dilation_0.to(tl.uint32)
                    held_0 = held_0 & (element_row * dilation_0 == down)
                    for j in range(columns):
                        back = columns - 1 - j
                        right = column + back * stride_1
                        held = held_0 & (cell_column >= back) & (cell_column - back < pooled_width)
                        element_column = right.to(tl.uint32) // dilation_1.to(tl.uint32)
                        held = held & (element_column * dilation_1 == right)
                        total += _gradient(
                            grad_output,
                            offsets,
                            grad_place - (up * grad_row_stride + back * grad_column_stride),
                            offsets_place - (up * offsets_row_stride + back * offsets_column_stride),
                            held,
                            element_row * kernel_width + element_column,
                            DTYPE,
                            VECTOR,
                        )
                        total = total.to(grad_input.dtype.element_ty).to(DTYPE)
                stored = stored_0 & (left + column >= 0) & (left + column < width)
                tl.store(
                    grad_input
                    + vectors(input_place + (row * input_row_stride + column * input_column_stride), VECTOR),
                    total.to(grad_input.dtype.element_ty),
                    mask=stored[:, None],
                )


def _usual(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Kernel size and stride of a window that the backward has a variant for, otherwise zeros."""
    window = (kernel_size[0], stride[0])
    square = kernel_size[0] == kernel_size[1] and stride[0] == stride[1] and max(dilation) == 1
    return window if square and window in USUAL_WINDOWS else (0, 0)


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
    if output.numel():
        vector = vector_of(input.shape[1], input)
        count = output.numel() // vector
        with torch.cuda.device_of(input):
            launch(
                _pool,
                (ceil_div(count, LANES),),
                input,
                output,
                offsets,
                count,
                input.shape[1] // vector,
                *input.shape[2:],
                *sizes,
                *strides_in_vectors(input, vector),
                *kernel_size,
                *stride,
                *padding,
                *dilation,
                CHANNELS_LAST=memory_format is torch.channels_last,
                VECTOR=vector,
                LANES=LANES,
                WIDE=count > MOST_NARROW_LANES,
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
    if grad_input.numel():
        vector = vector_of(offsets.shape[1], grad_output, offsets, grad_input)
        channels = offsets.shape[1] // vector
        first_cells = [padding[axis] // stride[axis] for axis in (0, 1)]
        cells = [
            (input_size[axis] - 1 + padding[axis]) // stride[axis] + 1 - first_cells[axis] for axis in (0, 1)
        ]
        count = offsets.shape[0] * channels * cells[0] * cells[1]
        reach = [(kernel_size[axis] - 1) * dilation[axis] for axis in (0, 1)]
        window = _usual(kernel_size, stride, dilation)
        with torch.cuda.device_of(grad_output):
            launch(
                _pool_backward,
                (ceil_div(count, LANES),),
                grad_output,
                offsets,
                grad_input,
                count,
                channels,
                *input_size,
                *offsets.shape[2:],
                *cells,
                *first_cells,
                *(reach[axis] // stride[axis] for axis in (0, 1)),
                *(reach[axis] % stride[axis] for axis in (0, 1)),
                *strides_in_vectors(grad_output, vector),
                *strides_in_vectors(offsets, vector),
                *strides_in_vectors(grad_input, vector),
                kernel_size[1],
                *stride,
                *padding,
                *dilation,
                CHANNELS_LAST=memory_format is torch.channels_last,
                VECTOR=vector,
                KERNEL=window[0],
                STRIDE=window[1],
                LANES=LANES,
                WIDE=count > MOST_NARROW_LANES,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return grad_input


def _signature(pointers: dict[str, str], sizes: list[str]) -> dict[str, str]:
    wide = {name: "i64" for name in sizes if name == "count" or name.endswith("_stride")}
    return pointers | {name: wide.get(name, "i32") for name in sizes}


def configurations() -> list[Configuration]:
    """Every variant that ``max_pool2d_offsets`` and its backward launch."""
    sizes = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
    variants = [
        (element, {"CHANNELS_LAST": channels_last, "VECTOR": vector}, wide)
        for element, size in sizes.items()
        for channels_last, vector in ((False, 1), (True, 1), (True, VECTOR_BYTES // size))
        for wide in ((False, True) if element == "fp32" else (False,))
    ]
    return [
        *(
            Configuration(
                _pool,
                _signature(
                    {"input": f"*{element}", "output": f"*{element}", "offsets": "*u8"}, _FORWARD_SIZES
                ),
                constants | {"LANES": LANES, "WIDE": wide},
                WARPS,
                STAGES,
            )
            for element, constants, wide in variants
        ),
        *(
            Configuration(
                _pool_backward,
                _signature(
                    {"grad_output": f"*{element}", "offsets": "*u8", "grad_input": f"*{element}"},
                    _BACKWARD_SIZES,
                ),
                constants | {"KERNEL": kernel, "STRIDE": stride, "LANES": LANES, "WIDE": wide},
                WARPS,
                STAGES,
            )
            for element, constants, wide in variants
            for kernel, stride in (*USUAL_WINDOWS, (0, 0))
        ),
    ]
