"""``conv2d_channel_grad`` in Triton: a matrix product of taps and outputs, without a buffer of taps; planes alone where a
group has few outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from trady_kernels.ops.linear_channel_grad.triton_kernel import (
    VECTOR,
    VECTOR_BYTES,
    WARPS,
    Tile,
    aligned_to_vectors,
    multiply,
    operand,
    precision_of_taps,
    strided,
    tile,
    variants,
    vector_length,
    x_vectors,
)
from trady_kernels.ops.squares import SQUARED_ROWS
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch, remembered
from trady_kernels.ops.triton_sums import (
    TYPES,
    Split,
    Squares,
    Sums,
    check,
    conv_precision,
    divide,
    divisor,
    locate,
    multiprocessors,
    split,
)

#: Outputs of a group from which on they are worth the side of a matrix.
LEAST_OUTPUTS = 8
#: Tile of a program without a matrix product: taps, and lanes that go through pixels, or through pixels and channels.
TAPS, LANES = 16, 128
#: Channels of such a tile, where they are adjacent in memory.
CHANNELS = 16
PLANE_STAGES = 1
#: Programs without a matrix product that a launch aims at, for each multiprocessor.
PLANE_PROGRAMS = 4


@dataclass(frozen=True)
class Taps:
    """What a launch over taps is.

    Attributes:
        tile: block of one program; None without a matrix product.
        sections: parts of the results that have their own outputs: one, or with groups every channel.
        row_tiles, output_tiles: blocks along the two sides of a section.
        split: of the pixels.
        along_channels: whether lanes go along channels where they load, not along pixels.
        pixel_vector, output_vector: pixels, and outputs, of one access to grad_output.
        x_vector: channels of one access to the input.
        dy_pixel: stride of grad_output's pixels where lanes go along channels.
        precision: of ``tl.dot``.
    """

    tile: Tile | None
    sections: int
    row_tiles: int
    output_tiles: int
    split: Split
    along_channels: bool
    pixel_vector: int = 1
    output_vector: int = 1
    x_vector: int = 1
    dy_pixel: int = 0
    precision: str = "ieee"

    @property
    def programs(self) -> int:
        """Of one part."""
        return self.sections * self.row_tiles * self.output_tiles

    @property
    def block_pixels(self) -> int:
        """Pixels that a program takes at a time."""
        if self.tile is not None:
            return self.tile.pixels
        return LANES // CHANNELS if self.along_channels else LANES


@remembered
def plan(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    taps: int,
    groups: int,
    with_bias: bool,
    precision: str,
    multiprocessors: int,
) -> Taps:
    """The launch for one convolution."""
    k, outputs = input_selected.shape[1], grad_output.shape[1] // groups
    pixels = grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3]
    along_channels = grad_output.stride(1) == 1
    if groups > 1 and outputs < LEAST_OUTPUTS:
        # Lanes along the few pixels of a small map would be idle, and along few channels.
        adjacent = along_channels and input_selected.stride(1) == 1
        along_channels = k * outputs >= CHANNELS // 2 and (adjacent or pixels <= LANES // 4)
        channels = CHANNELS if along_channels else 1
        sections, tap_tiles = ceil_div(k * outputs, channels), ceil_div(taps, TAPS)
        programs = PLANE_PROGRAMS * multiprocessors
        parts = split(pixels, LANES // channels, sections * tap_tiles, programs)
        return Taps(None, sections, tap_tiles, 1, parts, along_channels)
    vector = VECTOR_BYTES // grad_output.element_size()
    # Every group's outputs start with a whole vector. Others than these are rare: they do without lanes along channels.
    along_channels = along_channels and outputs % vector == 0 and aligned_to_vectors(grad_output, 1, vector)
    # There pixels are one after the other, and places in an image of the input count in 32 bits.
    dy_pixel = stride_of_pixels(grad_output)
    along_channels = along_channels and dy_pixel is not None and _extent(input_selected) < 2**31
    output_vector, x_vector, pixel_vector = 1, 1, 1
    if along_channels:
        output_vector = vector
        x_vector = vector_length(input_selected, 1, x_vectors(grad_output.dtype)) if groups == 1 else 1
    elif planes_are_dense(grad_output):
        pixel_vector = vector_length(grad_output.flatten(2), 2, (VECTOR,))
    sections, rows = (1, k * taps + with_bias) if groups == 1 else (k, taps)
    aligned = pixel_vector * output_vector > 1
    precision = precision_of_taps(precision, grad_output.dtype, x_vector)
    block = tile(
        rows, outputs, grad_output.dtype, precision, along_channels, aligned, x_vector > 1, taps=True
    )
    row_tiles, output_tiles = ceil_div(rows, block.rows), ceil_div(outputs, block.outputs)
    programs = block.programs * multiprocessors
    parts = split(pixels, block.pixels, sections * row_tiles * output_tiles, programs)
    vectors = pixel_vector, output_vector, x_vector
    return Taps(
        block, sections, row_tiles, output_tiles, parts, along_channels, *vectors, dy_pixel or 0, precision
    )


def in_vectors(
    input_selected: torch.Tensor, grad_output: torch.Tensor, taps: int, groups: int
) -> torch.Tensor:
    """The input with channels of zeros behind, up to a multiple of a vector where several of them are adjacent.

    On an H200 two channels of a 3x3 kernel in float32, each loaded alone, take 1.5 times as long as four.
    """
    k = input_selected.shape[1]
    alone = k == 1 or k % VECTOR == 0 or grad_output.stride(1) != 1 or input_selected.stride(1) != 1
    if alone or groups > 1 or taps == 1 or grad_output.dtype != torch.float32:
        return input_selected
    return F.pad(input_selected, (0, 0, 0, 0, 0, -k % VECTOR))


def planes_are_dense(tensor: torch.Tensor) -> bool:
    """Whether the pixels of a channel follow each other at one stride, row after row."""
    height, width = tensor.shape[2:]
    return height == 1 or width == 1 or tensor.stride(2) == width * tensor.stride(3)


def stride_of_pixels(tensor: torch.Tensor) -> int | None:
    """The stride at which the pixels of all images follow each other; None where there is not one."""
    found, count = None, 1
    for dimension in (3, 2, 0):
        size, stride = tensor.shape[dimension], tensor.stride(dimension)
        if size == 1:
            continue
        if found is None:
            found = stride
        elif stride != count * found:
            return None
        count *= size
    return 0 if found is None else found


def _extent(tensor: torch.Tensor) -> int:
    """Elements from an image's first to its last, with a row and a column more all around."""
    return sum((tensor.shape[d] + 2) * tensor.stride(d) for d in (1, 2, 3))


#: Integers of both kernels: what a convolution is, and where its tensors' elements lie.
_CONVOLUTION = {
    "taps": "i32",
    "kernel_width": "i32",
    "outputs": "i32",
    "group_channels": "i32",
    "in_channels": "i32",
    "pixels": "i32",
    "image_pixels": "i32",
    "image_factor": "i64",
    "image_shift": "i32",
    "out_width": "i32",
    "width_factor": "i64",
    "width_shift": "i32",
    "height": "i32",
    "width": "i32",
    "stride_height": "i32",
    "stride_width": "i32",
    "padding_height": "i32",
    "padding_width": "i32",
    "dilation_height": "i32",
    "dilation_width": "i32",
    "index_stride": "i64",
    "x_image": "i64",
    "x_channel": "i64",
    "x_row": "i64",
    "x_column": "i64",
    "dy_image": "i64",
    "dy_channel": "i64",
    "dy_row": "i64",
    "dy_column": "i64",
    "part_blocks": "i32",
    "step": "i64",
}
_SECTIONS = {
    "section_channels": "i32",
    "row_tiles": "i32",
    "section_tiles": "i32",
    "output_step": "i32",
    "tap_step": "i32",
}
_PLANES = {"pairs": "i32", "tap_tiles": "i32"}
#: A coordinate that is outside of every image, and so is the sum of two.
OUTSIDE = tl.constexpr(2**30)


@triton.jit
def _within(coordinate: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Whether ``0 <= coordinate < size``."""
    return coordinate.to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=[*_CONVOLUTION, *_SECTIONS])
def _multiply_taps(
    input_selected: tl.tensor,
    grad_output: tl.tensor,
    channels: tl.tensor,
    grad: tl.tensor,  # (k, outputs, taps), outputs and taps at strides of their own, one every `step` elements
    bias: tl.tensor,  # (outputs,), likewise
    taps: tl.int32,
    kernel_width: tl.int32,
    outputs: tl.int32,  # of a group
    group_channels: tl.int32,
    in_channels: tl.int32,
    pixels: tl.int32,  # of all images
    image_pixels: tl.int32,
    image_factor: tl.int64,  # of a division by this
    image_shift: tl.int32,
    out_width: tl.int32,
    width_factor: tl.int64,  # of one by out_width
    width_shift: tl.int32,
    height: tl.int32,
    width: tl.int32,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_height: tl.int32,
    padding_width: tl.int32,
    dilation_height: tl.int32,
    dilation_width: tl.int32,
    index_stride: tl.int64,
    x_image: tl.int64,
    x_channel: tl.int64,
    x_row: tl.int64,
    x_column: tl.int64,
    dy_image: tl.int64,
    dy_channel: tl.int64,
    dy_row: tl.int64,
    dy_column: tl.int64,
    part_blocks: tl.int32,
    step: tl.int64,
    section_channels: tl.int32,  # all of them, or with groups one
    row_tiles: tl.int32,
    section_tiles: tl.int32,
    output_step: tl.int32,
    tap_step: tl.int32,
    PRECISION: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    ALONG_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
) -> None:
    PIXEL_VECTOR: tl.constexpr = 1 if ALONG_CHANNELS else VECTOR
    OUTPUT_VECTOR: tl.constexpr = VECTOR if ALONG_CHANNELS else 1
    # Multiplied by a constant here, so that the compiler knows which accesses are aligned and whole.
    pixels = pixels * PIXEL_VECTOR
    image_pixels = image_pixels * PIXEL_VECTOR
    outputs = outputs * OUTPUT_VECTOR
    section = tl.program_id(0) // section_tiles
    program = tl.program_id(0) % section_tiles
    part = tl.program_id(1)
    output = program // row_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    in_outputs = output < outputs

    # A row is a tap of a channel. Neighbours go along what is adjacent in memory.
    row = program % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    section_channels = section_channels * X_VECTOR
    rows = section_channels * taps
    if ALONG_CHANNELS:
        channel, tap = row % section_channels, row // section_channels
    else:
        channel, tap = row // taps, row % taps
    channel += section * X_VECTOR  # of several sections only one by one
    tap_y = tap // kernel_width * dilation_height
    tap_x = tap % kernel_width * dilation_width
    # Along channels, offsets inside an image count in 32 bits: addresses are what a thread has most of to compute.
    if ALONG_CHANNELS:
        x_row = x_row.to(tl.int32) * X_VECTOR
        x_column = x_column.to(tl.int32) * X_VECTOR
        x_rows = tap_y * x_row + tap_x * x_column
        if X_VECTOR > 1:
            x_rows += channel
        else:
            x_rows += channel * x_channel.to(tl.int32)
    else:
        x_row = x_row * X_VECTOR
        x_column = x_column * X_VECTOR
        x_rows = (
            strided(channel, x_channel, 1, X_VECTOR)
            + tap_y.to(tl.int64) * x_row
            + tap_x.to(tl.int64) * x_column
        )
    tap_y = tl.where(row < rows, tap_y, OUTSIDE)

    # Without groups every channel is of the first one, and nothing is read.
    grouped = group_channels < in_channels
    index = tl.load(channels + section * index_stride, mask=grouped, other=0)
    known = (index >= 0) & (index < in_channels)
    first_output = tl.where(known, index // group_channels, 0) * outputs
    dy_first = grad_output + first_output * (dy_channel * PIXEL_VECTOR)
    lane = tl.arange(0, BLOCK_PIXELS)
    if ALONG_CHANNELS:  # then all pixels follow each other at one stride
        dy_column = dy_column * OUTPUT_VECTOR
        dy_block = lane[:, None] * dy_column.to(tl.int32) + output[None, :]
    else:
        dy_outputs = dy_first + strided(output, dy_channel, PIXEL_VECTOR, OUTPUT_VECTOR)

    # Many outputs are the better first side of a product on the tensor cores.
    if ALONG_CHANNELS:
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    begin = part * part_blocks * BLOCK_PIXELS
    for start in range(begin, tl.minimum(begin + part_blocks * BLOCK_PIXELS, pixels), BLOCK_PIXELS):
        pixel = start + lane
        in_pixels = pixel < pixels
        image, place = locate(pixel, image_pixels, image_factor, image_shift, PIXEL_VECTOR)
        y = divide(place, width_factor, width_shift)
        x = place - y * out_width
        if ALONG_CHANNELS:
            y = y * stride_height - padding_height
            x = x * stride_width - padding_width
            x_pixels = image * (x_image * X_VECTOR) + (y * x_row + x * x_column)
            y = tl.where(in_pixels, y, OUTSIDE)
            meets = _within(y[:, None] + tap_y[None, :], height) & _within(x[:, None] + tap_x[None, :], width)
            values = tl.load(input_selected + (x_pixels[:, None] + x_rows[None, :]), mask=meets, other=0.0).T
            dy_mask = in_pixels[:, None] & in_outputs[None, :]
            dy = tl.load(dy_first + start * dy_column + dy_block, mask=dy_mask, other=0.0)
        else:
            dy_pixels = image * (dy_image * PIXEL_VECTOR)
            if PIXEL_VECTOR > 1:
                dy_pixels += place
            else:
                dy_pixels += y.to(tl.int64) * dy_row + x.to(tl.int64) * dy_column
            y = y * stride_height - padding_height
            x = x * stride_width - padding_width
            x_pixels = image * (x_image * X_VECTOR) + y.to(tl.int64) * x_row + x.to(tl.int64) * x_column
            y = tl.where(in_pixels, y, OUTSIDE)
            meets = _within(tap_y[:, None] + y[None, :], height) & _within(tap_x[:, None] + x[None, :], width)
            values = tl.load(input_selected + x_rows[:, None] + x_pixels[None, :], mask=meets, other=0.0)
            dy_mask = in_outputs[:, None] & in_pixels[None, :]
            dy = tl.load(dy_outputs[:, None] + dy_pixels[None, :], mask=dy_mask, other=0.0).T
        values = operand(values, row == rows, WITH_BIAS)
        if ALONG_CHANNELS:
            total = tl.dot(dy.to(values.dtype).T, values.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(values, dy.to(values.dtype), total, input_precision=PRECISION)
    if ALONG_CHANNELS:
        total = total.T

    # An index out of range would be a read beyond grad_output: it is not made, and shows.
    total = tl.where(known, total, float("nan"))
    start = part.to(tl.int64) * step
    place = channel.to(tl.int64) * (outputs * taps) + tap * tap_step
    place = place[:, None] + output[None, :] * output_step
    tl.store(grad + start + place, total, mask=(row < rows)[:, None] & in_outputs[None, :])
    if WITH_BIAS:  # the row behind the last one
        tl.store(
            bias + start + tl.zeros_like(row)[:, None] + output[None, :],
            total,
            mask=(row == rows)[:, None] & in_outputs[None, :],
        )


@triton.jit(do_not_specialize=[*_CONVOLUTION, *_PLANES])
def _add_planes(
    input_selected: tl.tensor,
    grad_output: tl.tensor,
    channels: tl.tensor,
    grad: tl.tensor,  # (pairs, taps), contiguous, one every `step` elements
    taps: tl.int32,
    kernel_width: tl.int32,
    outputs: tl.int32,  # of a group
    group_channels: tl.int32,
    in_channels: tl.int32,
    pixels: tl.int32,  # of all images
    image_pixels: tl.int32,
    image_factor: tl.int64,  # of a division by this
    image_shift: tl.int32,
    out_width: tl.int32,
    width_factor: tl.int64,  # of one by out_width
    width_shift: tl.int32,
    height: tl.int32,
    width: tl.int32,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_height: tl.int32,
    padding_width: tl.int32,
    dilation_height: tl.int32,
    dilation_width: tl.int32,
    index_stride: tl.int64,
    x_image: tl.int64,
    x_channel: tl.int64,
    x_row: tl.int64,
    x_column: tl.int64,
    dy_image: tl.int64,
    dy_channel: tl.int64,
    dy_row: tl.int64,
    dy_column: tl.int64,
    part_blocks: tl.int32,
    step: tl.int64,
    pairs: tl.int32,  # of a channel and an output of its group
    tap_tiles: tl.int32,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    BLOCK_PIXELS: tl.constexpr = LANES // CHANNELS
    part = tl.program_id(1)
    tap = tl.program_id(0) % tap_tiles * TAPS + tl.arange(0, TAPS)
    tap_y = tap // kernel_width * dilation_height
    tap_x = tap % kernel_width * dilation_width
    x_taps = tap_y.to(tl.int64) * x_row + tap_x.to(tl.int64) * x_column
    tap_y = tl.where(tap < taps, tap_y, OUTSIDE)

    first_pair = tl.program_id(0) // tap_tiles * CHANNELS
    lane = tl.arange(0, LANES)
    pair = first_pair + lane % CHANNELS
    in_pairs = pair < pairs
    channel = (pair // outputs).to(tl.int64)
    index = tl.load(channels + channel * index_stride, mask=in_pairs, other=0)
    known = (index >= 0) & (index < in_channels)
    output = index // group_channels * outputs + pair % outputs
    x_lanes = input_selected + channel * x_channel
    dy_lanes = grad_output + output * dy_channel
    in_pairs = in_pairs & known

    total = tl.zeros((TAPS, LANES), tl.float32)
    begin = part * part_blocks * BLOCK_PIXELS
    for start in range(begin, tl.minimum(begin + part_blocks * BLOCK_PIXELS, pixels), BLOCK_PIXELS):
        pixel = start + lane // CHANNELS
        inside = in_pairs & (pixel < pixels)
        image, place = locate(pixel, image_pixels, image_factor, image_shift, 1)
        y = divide(place, width_factor, width_shift)
        x = place - y * out_width
        dy_pixels = image * dy_image + y.to(tl.int64) * dy_row + x.to(tl.int64) * dy_column
        dy = tl.load(dy_lanes + dy_pixels, mask=inside, other=0.0).to(tl.float32)
        y = y * stride_height - padding_height
        x = x * stride_width - padding_width
        x_pixels = image * x_image + y.to(tl.int64) * x_row + x.to(tl.int64) * x_column
        y = tl.where(inside, y, OUTSIDE)
        meets = _within(tap_y[:, None] + y[None, :], height) & _within(tap_x[:, None] + x[None, :], width)
        values = tl.load((x_lanes + x_pixels)[None, :] + x_taps[:, None], mask=meets, other=0.0)
        total += values.to(tl.float32) * dy[None, :]

    # An index out of range would be a read beyond grad_output: it is not made, and shows.
    total = tl.where(known[None, :], total, float("nan"))
    result = tl.sum(tl.reshape(total, (TAPS, BLOCK_PIXELS, CHANNELS)), axis=1)
    pair = first_pair + tl.arange(0, CHANNELS)
    place = pair.to(tl.int64)[None, :] * taps + tap[:, None]
    mask = (tap < taps)[:, None] & (pair < pairs)[None, :]
    tl.store(grad + part.to(tl.int64) * step + place, result, mask=mask)


def _sum_taps(
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    geometry: Sequence[int],
    groups: int,
    sums: Sums,
) -> None:
    """Write the gradient, with the bias's where it is wanted, or its squares."""
    precision = conv_precision(grad_output.dtype)
    kernel_size, pairs = geometry[:2], geometry[2:]
    points = groups == 1 and tuple(geometry[:6]) == (1, 1, 1, 1, 0, 0)
    if points and planes_are_dense(input_selected) and planes_are_dense(grad_output):
        multiply(input_selected.flatten(2), grad_output.flatten(2), sums, precision)
        return
    taps = kernel_size[0] * kernel_size[1]
    k, (out_height, out_width) = input_selected.shape[1], grad_output.shape[2:]
    outputs = grad_output.shape[1] // groups
    planned = plan(
        input_selected,
        grad_output,
        taps,
        groups,
        sums.with_bias,
        precision,
        multiprocessors(grad_output.device),
    )
    by_pixel, by_output, by_channel = planned.pixel_vector, planned.output_vector, planned.x_vector
    sums.cut(planned.split.parts, taps if planned.tile is not None else 1)
    x_image, x_channel, x_row, x_column = input_selected.stride()
    dy_image, dy_channel, dy_row, dy_column = grad_output.stride()
    if planned.tile is not None and planned.along_channels:
        dy_column = planned.dy_pixel
    integers = (
        taps,
        kernel_size[1],
        outputs // by_output,
        in_channels // groups,
        in_channels,
        grad_output.shape[0] * out_height * out_width // by_pixel,
        out_height * out_width // by_pixel,
        *divisor(out_height * out_width // by_pixel),
        out_width,
        *divisor(out_width),
        *input_selected.shape[2:],
        *pairs,
        channels.stride(0),
        x_image // by_channel,
        x_channel,
        x_row // by_channel,
        x_column // by_channel,
        dy_image // (by_pixel * by_output),
        dy_channel // by_pixel,
        dy_row // by_output,
        dy_column // by_output,
        planned.split.pixels // planned.block_pixels,
        sums.step,
    )
    tensors = (input_selected, grad_output, channels)
    grid = (planned.programs, planned.split.parts)
    if planned.tile is None:
        launch(
            _add_planes,
            grid,
            *tensors,
            sums.targets[0],
            *integers,
            k * outputs,
            planned.row_tiles,
            TAPS=TAPS,
            LANES=LANES,
            CHANNELS=LANES // planned.block_pixels,
            num_warps=WARPS,
            num_stages=PLANE_STAGES,
        )
    else:
        section_channels = k // planned.sections
        launch(
            _multiply_taps,
            grid,
            *tensors,
            sums.targets[0],
            sums.targets[-1],
            *integers,
            section_channels // by_channel,
            planned.row_tiles,
            planned.row_tiles * planned.output_tiles,
            sums.output_step,
            sums.tap_step,
            PRECISION=planned.precision,
            WITH_BIAS=sums.with_bias,
            ALONG_CHANNELS=planned.along_channels,
            VECTOR=by_pixel * by_output,
            X_VECTOR=by_channel,
            BLOCK_ROWS=planned.tile.rows,
            BLOCK_OUTPUTS=planned.tile.outputs,
            BLOCK_PIXELS=planned.tile.pixels,
            num_warps=WARPS,
            num_stages=planned.tile.stages,
        )
    sums.add()


def _channel_grad(
    with_bias: bool,
    input_selected: torch.Tensor,
    grad_output: torch.Tensor,
    channels: torch.Tensor,
    in_channels: int,
    geometry: Sequence[int],
    groups: int,
) -> tuple[torch.Tensor, ...]:
    batch, out_channels, out_height, out_width = grad_output.shape
    check(input_selected, batch * out_height * out_width)
    k = input_selected.shape[1]
    input_selected = in_vectors(input_selected, grad_output, geometry[0] * geometry[1], groups)
    shape = (input_selected.shape[1], out_channels // groups, geometry[0], geometry[1])
    shapes: tuple[tuple[int, ...], ...] = (shape, (out_channels,)) if with_bias else (shape,)
    empty = k == 0 or grad_output.numel() == 0
    make = grad_output.new_zeros if empty else grad_output.new_empty
    results = tuple(make(shape, dtype=torch.float32) for shape in shapes)
    if not empty:
        with torch.cuda.device_of(grad_output):
            _sum_taps(input_selected, grad_output, channels, in_channels, geometry, groups, Sums(results))
    return results if shape[0] == k else (results[0][:k], *results[1:])


def conv2d_channel_grad(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    geometry: Sequence[int],  # kernel_size, stride, padding, dilation
    groups: int,
) -> torch.Tensor:  # (k, C'/groups, kh, kw)
    """Triton kernel of ``torch.ops.trady.conv2d_channel_grad``.

    With groups, the gradient of a channel whose index is out of range is NaN.

    Raises:
        NotImplementedError: float64, or pixels beyond 32 bits.
    """
    return _channel_grad(False, input_selected, grad_output, channels, in_channels, geometry, groups)[0]


def conv2d_channel_grad_with_bias(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    geometry: Sequence[int],  # kernel_size, stride, padding, dilation
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # (k, C', kh, kw), (C',)
    """Triton kernel of ``torch.ops.trady.conv2d_channel_grad_with_bias``; the bias is one row more of the product.

    Raises:
        NotImplementedError: float64, or pixels beyond 32 bits.
    """
    grad, bias = _channel_grad(True, input_selected, grad_output, channels, in_channels, geometry, groups)
    return grad, bias


def conv2d_channel_grad_squares(
    input_selected: torch.Tensor,  # (N, k, H, W)
    grad_output: torch.Tensor,  # (N, C', H', W')
    channels: torch.Tensor,  # (k,)
    in_channels: int,
    geometry: Sequence[int],  # kernel_size, stride, padding, dilation
    groups: int,
) -> torch.Tensor:  # (k,)
    """Triton kernel of ``torch.ops.trady.conv2d_channel_grad_squares``.

    Raises:
        NotImplementedError: float64, or pixels beyond 32 bits.
    """
    batch, out_channels, out_height, out_width = grad_output.shape
    check(input_selected, batch * out_height * out_width)
    k = input_selected.shape[1]
    input_selected = in_vectors(input_selected, grad_output, geometry[0] * geometry[1], groups)
    squares = grad_output.new_empty(input_selected.shape[1], dtype=torch.float32)
    if squares.numel() == 0 or grad_output.numel() == 0:
        return squares.zero_()[:k]
    length = out_channels // groups * geometry[0] * geometry[1]
    blocks = (
        tensor.split(SQUARED_ROWS, d) for tensor, d in ((input_selected, 1), (channels, 0), (squares, 0))
    )
    with torch.cuda.device_of(grad_output):
        for x, of, part in zip(*blocks, strict=True):
            _sum_taps(x, grad_output, of, in_channels, geometry, groups, Squares(part, length))
    return squares[:k]


def configurations() -> list[Configuration]:
    """Every variant that the two operators launch for themselves; those of 1x1 layers are the linear layer's."""

    def tensors(name: str) -> dict[str, str]:
        return {"input_selected": f"*{name}", "grad_output": f"*{name}", "channels": "*i64", "grad": "*fp32"}

    return [
        *(
            Configuration(
                _multiply_taps,
                {**tensors(name), "bias": "*fp32", **_CONVOLUTION, **_SECTIONS},
                constants,
                WARPS,
                block.stages,
            )
            for name, constants, block in variants(taps=True)
            if constants["VECTOR"] > 1 or not constants["ALONG_CHANNELS"]
        ),
        *(
            Configuration(
                _add_planes,
                {**tensors(name), **_CONVOLUTION, **_PLANES},
                {"TAPS": TAPS, "LANES": LANES, "CHANNELS": channels},
                WARPS,
                PLANE_STAGES,
            )
            for name in TYPES.values()
            for channels in (1, CHANNELS)
        ),
    ]
