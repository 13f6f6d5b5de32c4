"""``linear_channel_grad`` in Triton: a matrix product summed over pixels, which 1x1 convolutions share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from trady_kernels.ops.backend import TRITON_INTERPRETED
from trady_kernels.ops.squares import SQUARED_ROWS
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch, remembered
from trady_kernels.ops.triton_sums import (
    TYPES,
    Split,
    Squares,
    Sums,
    check,
    divisor,
    locate,
    matmul_precision,
    multiprocessors,
    split,
)
from trady_kernels.ops.triton_sums import configurations as configurations_of_sums

#: Rows of a tile of results: channels, or taps of channels in a convolution of larger kernels. Few channels are the rule.
ROWS, TAP_ROWS = (16, 64), (16, 32, 64)
#: Outputs of a tile: grad_output, by far the larger operand, is read once for each tile of rows.
OUTPUTS = (32, 64, 128)
#: Pixels that one access takes: a map of 14x14 is no multiple of more.
VECTOR = 4
#: Bytes of outputs, and the most of channels of the input, that one access takes.
VECTOR_BYTES = 16
WARPS = 4

INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


@dataclass(frozen=True)
class Tile:
    """Block of one program of a matrix product summed over pixels.

    Attributes:
        rows, outputs: of results.
        pixels: that are loaded and multiplied at a time.
        stages: of the pipeline of loads.
        programs: that a launch aims at, for each multiprocessor.
    """

    rows: int
    outputs: int
    pixels: int
    stages: int
    programs: int


def tile(
    rows: int,
    outputs: int,
    dtype: torch.dtype,
    precision: str,
    along_channels: bool,
    aligned: bool,
    x_aligned: bool = False,
    taps: bool = False,
) -> Tile:
    """The tile for numbers of rows and outputs.

    Args:
        rows, outputs: of results.
        dtype, precision: of the product.
        along_channels: whether lanes go along channels where they load, not along pixels.
        aligned, x_aligned: whether grad_output, and channels of the input, are loaded in vectors.
        taps: whether rows are taps, each with a mask of its own.
    """
    sizes = TAP_ROWS if taps else ROWS
    block = next((block for block in sizes if block >= rows), sizes[-1])
    smallest, largest = block == sizes[0], block == sizes[-1]
    half, width = dtype != torch.float32, _width(outputs)
    if (not half and (taps or largest)) or (taps and largest and not x_aligned):
        width = min(width, 64)  # what registers hold
    # The vectorised ones are those that an H200 was fastest with: what they have in flight together counts, hardly their shape.
    if aligned and along_channels and taps:
        # Vectors of both operands on their way take registers, on GPUs before Hopper more than others leave.
        few = x_aligned and (smallest or width != 64)
        least = x_aligned and smallest and width == 128
        pixels = (
            (16 if least else 32 if few else 64) if half else 16 if largest and precision == "ieee" else 32
        )
        return Tile(block, width, pixels, 3, 4 if half and width < 128 else 2)
    if aligned and along_channels and half and x_aligned and width == OUTPUTS[-1]:
        return Tile(block, width, 32, 4, 2)
    if aligned and along_channels:
        pixels = 64 if largest or width > 32 else 128
        # Without tensor cores a thread keeps both operands of a block's pixels.
        return (
            Tile(block, width, pixels, 2, 4)
            if half
            else Tile(block, width, (1024 if largest else 2048) // width, 4, 2)
        )
    width = min(width, 64)
    if aligned and not taps:
        return Tile(block, width, 64, 3, 128 // width)
    # Elements that are loaded one by one go through registers, all pixels of a block together; so do the operands of a
    # product without tensor cores. As many pixels and stages as registers hold.
    if half:
        middle = not smallest and not largest
        return Tile(block, 64, 64, 3, 4) if aligned and middle else Tile(block, 64, 32, 4, 4)
    if precision == "ieee":
        return Tile(block, 64, 16, 2 if aligned else 3, 4) if largest else Tile(block, 64, 32, 3, 4)
    if largest:
        return Tile(block, 64, 16, 4, 4)
    return Tile(block, 64, 32, 2 if smallest and not aligned else 3, 4)


def _width(outputs: int) -> int:
    """The largest number of outputs of a tile that leaves few lanes idle."""
    used = {width: outputs / (ceil_div(outputs, width) * width) for width in OUTPUTS}
    return max(OUTPUTS, key=lambda width: (min(used[width], 0.6), width))


def precision_of_taps(precision: str, dtype: torch.dtype, x_vector: int) -> str:
    """Precision of a convolution's ``tl.dot`` for one that is asked for, by the channels of an access to the input.

    Three products of TF32 are one of float32, to 2e-7 of a gradient's norm on an H200. For its matrix units they take less
    time than the one for its others, unless both operands come in vectors.
    """
    return "tf32x3" if precision == "ieee" and dtype == torch.float32 and x_vector == 1 else precision


def x_vectors(dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of channels of the input, more than one, that an access may take."""
    return tuple(length for length in (8, 4) if length * dtype.itemsize <= VECTOR_BYTES)


def vector_length(tensor: torch.Tensor, adjacent: int, lengths: Iterable[int]) -> int:
    """The first of ``lengths`` by which ``tensor`` can be loaded along dimension ``adjacent``, or 1."""
    return next((length for length in lengths if aligned_to_vectors(tensor, adjacent, length)), 1)


@dataclass(frozen=True)
class Product:
    """What a launch of the matrix product is.

    Attributes:
        tile: block of one program.
        row_tiles, output_tiles: blocks along the results' two sides.
        split: of the pixels.
        along_channels: whether lanes go along channels where they load, not along pixels.
        pixel_vector, output_vector: pixels, and outputs, of one access.
        x_vector: channels of one access to the input.
    """

    tile: Tile
    row_tiles: int
    output_tiles: int
    split: Split
    along_channels: bool
    pixel_vector: int
    output_vector: int
    x_vector: int


def aligned_to_vectors(tensor: torch.Tensor, adjacent: int, vector: int = VECTOR) -> bool:
    """Whether ``vector`` elements next to each other along dimension ``adjacent`` always lie on a multiple of as many.

    Dimensions that follow each other in memory without a gap count as one.
    """
    if tensor.stride(adjacent) != 1 or tensor.data_ptr() % (vector * tensor.element_size()):
        return False
    others = (d for d in range(tensor.dim()) if d != adjacent and tensor.shape[d] > 1)
    return tensor.shape[adjacent] % vector == 0 and all(tensor.stride(d) % vector == 0 for d in others)


@remembered
def product_plan(
    input_selected: torch.Tensor,  # (images, k, pixels)
    grad_output: torch.Tensor,  # (images, C', pixels)
    rows: int,  # k, and one more for a bias
    precision: str,
    multiprocessors: int,
) -> Product:
    """The launch for one matrix product."""
    images, outputs, pixels = grad_output.shape
    along_channels = grad_output.stride(1) == 1
    pixel_vector = output_vector = x_vector = 1
    if along_channels:
        output_vector = vector_length(grad_output, 1, (VECTOR_BYTES // grad_output.element_size(),))
        x_vector = vector_length(input_selected, 1, x_vectors(grad_output.dtype)) if output_vector > 1 else 1
    elif aligned_to_vectors(input_selected, 2):
        pixel_vector = vector_length(grad_output, 2, (VECTOR,))
    aligned = pixel_vector * output_vector > 1
    block = tile(rows, outputs, grad_output.dtype, precision, along_channels, aligned, x_vector > 1)
    row_tiles, output_tiles = ceil_div(rows, block.rows), ceil_div(outputs, block.outputs)
    programs = block.programs * multiprocessors
    parts = split(images * pixels, block.pixels, row_tiles * output_tiles, programs)
    return Product(
        block, row_tiles, output_tiles, parts, along_channels, pixel_vector, output_vector, x_vector
    )


@triton.jit
def strided(
    index: tl.tensor, stride: tl.tensor, VECTOR: tl.constexpr, INDEX_VECTOR: tl.constexpr
) -> tl.tensor:
    """Offset of ``index``; neighbours are adjacent where accesses take ``INDEX_VECTOR`` of them."""
    if INDEX_VECTOR > 1:
        return index.to(tl.int64)
    return index.to(tl.int64) * (stride * VECTOR)


@triton.jit
def operand(
    x: tl.tensor,  # (rows, pixels)
    ones: tl.tensor,  # (rows,)
    WITH_BIAS: tl.constexpr,
) -> tl.tensor:
    """``x`` with ones in the rows where ``ones`` is true, if there is a bias; it then goes through registers."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # it takes products of bfloat16 for those of integers
        x = x.to(tl.float32)
    if WITH_BIAS:
        x = tl.where(ones[:, None], 1.0, x).to(x.dtype)
    return x


_INTEGERS = {
    "rows": "i32",
    "outputs": "i32",
    "pixels": "i32",
    "image_pixels": "i32",
    "image_factor": "i64",
    "image_shift": "i32",
    "part_blocks": "i32",
    "row_tiles": "i32",
    "x_image": "i64",
    "x_channel": "i64",
    "x_pixel": "i64",
    "dy_image": "i64",
    "dy_channel": "i64",
    "dy_pixel": "i64",
    "step": "i64",
}


@triton.jit(do_not_specialize=list(_INTEGERS))
def _multiply(
    input_selected: tl.tensor,
    grad_output: tl.tensor,
    grad: tl.tensor,  # (rows, outputs), contiguous, one every `step` elements
    bias: tl.tensor,  # (outputs,), likewise
    rows: tl.int32,
    outputs: tl.int32,
    pixels: tl.int32,  # of all images
    image_pixels: tl.int32,
    image_factor: tl.int64,  # of a division by this
    image_shift: tl.int32,
    part_blocks: tl.int32,
    row_tiles: tl.int32,
    x_image: tl.int64,
    x_channel: tl.int64,
    x_pixel: tl.int64,
    dy_image: tl.int64,
    dy_channel: tl.int64,
    dy_pixel: tl.int64,
    step: tl.int64,
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
    # Many outputs are the better first side of a product on the tensor cores. Those of float32 take no operand there from
    # shared memory in which its pixels are not adjacent.
    OUTPUTS_FIRST: tl.constexpr = ALONG_CHANNELS and input_selected.dtype.element_ty != tl.float32
    # Multiplied by a constant here, so that the compiler knows which accesses are aligned and whole.
    pixels = pixels * PIXEL_VECTOR
    image_pixels = image_pixels * PIXEL_VECTOR
    outputs = outputs * OUTPUT_VECTOR
    rows = rows * X_VECTOR
    # Tiles of the same pixels run next to each other: what they share they find in the cache.
    program = tl.program_id(0)
    part = tl.program_id(1)
    row = program % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = program // row_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    in_rows, in_outputs = row < rows, output < outputs
    x_rows = input_selected + strided(row, x_channel, PIXEL_VECTOR, X_VECTOR)
    dy_outputs = grad_output + strided(output, dy_channel, PIXEL_VECTOR, OUTPUT_VECTOR)
    if OUTPUTS_FIRST:
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    begin = part * part_blocks * BLOCK_PIXELS
    for start in range(begin, tl.minimum(begin + part_blocks * BLOCK_PIXELS, pixels), BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        in_pixels = pixel < pixels
        image, place = locate(pixel, image_pixels, image_factor, image_shift, PIXEL_VECTOR)
        x_pixels = image * (x_image * PIXEL_VECTOR * X_VECTOR) + strided(
            place, x_pixel, X_VECTOR, PIXEL_VECTOR
        )
        dy_pixels = image * (dy_image * PIXEL_VECTOR * OUTPUT_VECTOR) + strided(
            place, dy_pixel, OUTPUT_VECTOR, PIXEL_VECTOR
        )
        if ALONG_CHANNELS:
            x_mask, dy_mask = in_pixels[:, None] & in_rows[None, :], in_pixels[:, None] & in_outputs[None, :]
            x = tl.load(x_rows[None, :] + x_pixels[:, None], mask=x_mask, other=0.0).T
            dy = tl.load(dy_outputs[None, :] + dy_pixels[:, None], mask=dy_mask, other=0.0)
        else:
            x_mask, dy_mask = in_rows[:, None] & in_pixels[None, :], in_outputs[:, None] & in_pixels[None, :]
            x = tl.load(x_rows[:, None] + x_pixels[None, :], mask=x_mask, other=0.0)
            dy = tl.load(dy_outputs[:, None] + dy_pixels[None, :], mask=dy_mask, other=0.0).T
        x = operand(x, row == rows, WITH_BIAS)
        if OUTPUTS_FIRST:
            total = tl.dot(dy.to(x.dtype).T, x.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(x, dy.to(x.dtype), total, input_precision=PRECISION)
    if OUTPUTS_FIRST:
        total = total.T
    start = part.to(tl.int64) * step
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(grad + start + place, total, mask=in_rows[:, None] & in_outputs[None, :])
    if WITH_BIAS:  # the row behind the last one
        tl.store(
            bias + start + tl.zeros_like(row)[:, None] + output[None, :],
            total,
            mask=(row == rows)[:, None] & in_outputs[None, :],
        )


def multiply(
    input_selected: torch.Tensor,  # (images, k, pixels)
    grad_output: torch.Tensor,  # (images, C', pixels)
    sums: Sums,
    precision: str,
) -> None:
    """Sum over images and pixels of ``input_selected[c] * grad_output[o]``.

    Args:
        input_selected, grad_output: of one dtype and any strides, not empty.
        sums: of ``k * C'`` elements and, with a bias, of ``C'`` for the sum of grad_output.
        precision: of ``tl.dot``.
    """
    images, outputs, pixels = grad_output.shape
    k = input_selected.shape[1]
    rows = k + sums.with_bias
    with torch.cuda.device_of(grad_output):
        plan = product_plan(input_selected, grad_output, rows, precision, multiprocessors(grad_output.device))
        sums.cut(plan.split.parts)
        by_pixel, by_output, by_channel = plan.pixel_vector, plan.output_vector, plan.x_vector
        x_image, x_channel, x_pixel = input_selected.stride()
        dy_image, dy_channel, dy_pixel = grad_output.stride()
        launch(
            _multiply,
            (plan.row_tiles * plan.output_tiles, plan.split.parts),
            input_selected,
            grad_output,
            sums.targets[0],
            sums.targets[-1],
            k // by_channel,
            outputs // by_output,
            images * pixels // by_pixel,
            pixels // by_pixel,
            *divisor(pixels // by_pixel),
            plan.split.pixels // plan.tile.pixels,
            plan.row_tiles,
            x_image // (by_pixel * by_channel),
            x_channel // by_pixel,
            x_pixel // by_channel,
            dy_image // (by_pixel * by_output),
            dy_channel // by_pixel,
            dy_pixel // by_output,
            sums.step,
            PRECISION=precision,
            WITH_BIAS=sums.with_bias,
            ALONG_CHANNELS=plan.along_channels,
            VECTOR=by_pixel * by_output,
            X_VECTOR=by_channel,
            BLOCK_ROWS=plan.tile.rows,
            BLOCK_OUTPUTS=plan.tile.outputs,
            BLOCK_PIXELS=plan.tile.pixels,
            num_warps=WARPS,
            num_stages=plan.tile.stages,
        )
        sums.add()


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    """Triton kernel of ``torch.ops.trady.linear_channel_grad``.

    Raises:
        NotImplementedError: float64, or rows beyond 32 bits.
    """
    k, outputs = input_selected.shape[-1], grad_output.shape[-1]
    check(input_selected, grad_output.numel() // max(outputs, 1))
    if k == 0 or grad_output.numel() == 0:
        return grad_output.new_zeros((k, outputs), dtype=torch.float32)
    grad = grad_output.new_empty((k, outputs), dtype=torch.float32)
    _multiply_rows(input_selected, grad_output, Sums((grad,)))
    return grad


def _multiply_rows(input_selected: torch.Tensor, grad_output: torch.Tensor, sums: Sums) -> None:
    # The rows are the pixels of one image.
    x, dy = (tensor.flatten(0, -2).t()[None] for tensor in (input_selected, grad_output))
    multiply(x, dy, sums, matmul_precision(grad_output.dtype))


def linear_channel_grad_squares(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k,)
    """Triton kernel of ``torch.ops.trady.linear_channel_grad_squares``.

    Raises:
        NotImplementedError: float64, or rows beyond 32 bits.
    """
    k, outputs = input_selected.shape[-1], grad_output.shape[-1]
    check(input_selected, grad_output.numel() // max(outputs, 1))
    if k == 0 or grad_output.numel() == 0:
        return grad_output.new_zeros(k, dtype=torch.float32)
    squares = grad_output.new_empty(k, dtype=torch.float32)
    for x, part in zip(input_selected.split(SQUARED_ROWS, -1), squares.split(SQUARED_ROWS), strict=True):
        _multiply_rows(x, grad_output, Squares(part, outputs))
    return squares


def variants(taps: bool = False) -> Iterator[tuple[str, dict[str, Any], Tile]]:
    """Type, constants and tile of every product, for :func:`configurations`."""
    for dtype, name in TYPES.items():
        along_outputs = VECTOR_BYTES // dtype.itemsize
        vectors = [(False, 1, 1), (False, VECTOR, 1), (True, 1, 1)]
        vectors += [(True, along_outputs, x) for x in (1, *x_vectors(dtype))]
        if dtype == torch.float16:  # bfloat16's code but for the instruction that multiplies
            vectors = vectors[:1]
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for along_channels, vector, x_vector in vectors:
                used = precision_of_taps(precision, dtype, x_vector) if taps else precision
                tiles = (
                    tile(rows, outputs, dtype, used, along_channels, vector > 1, x_vector > 1, taps)
                    for rows, outputs in product(TAP_ROWS if taps else ROWS, OUTPUTS)
                )
                for block, with_bias in product(dict.fromkeys(tiles), (False, True)):
                    constants = {
                        "PRECISION": used,
                        "WITH_BIAS": with_bias,
                        "ALONG_CHANNELS": along_channels,
                        "VECTOR": vector,
                        "X_VECTOR": x_vector,
                        "BLOCK_ROWS": block.rows,
                        "BLOCK_OUTPUTS": block.outputs,
                        "BLOCK_PIXELS": block.pixels,
                    }
                    yield name, constants, block


def configurations() -> list[Configuration]:
    """Every variant that ``linear_channel_grad`` and 1x1 convolutions launch."""
    return [
        *(
            Configuration(
                _multiply,
                {
                    "input_selected": f"*{name}",
                    "grad_output": f"*{name}",
                    "grad": "*fp32",
                    "bias": "*fp32",
                    **_INTEGERS,
                },
                constants,
                WARPS,
                block.stages,
            )
            for name, constants, block in variants()
        ),
        *configurations_of_sums(),
    ]
