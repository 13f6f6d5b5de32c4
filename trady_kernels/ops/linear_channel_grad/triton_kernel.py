"""``linear_channel_grad`` in Triton: a matrix product summed over pixels, which 1x1 convolutions share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trady_kernels.ops.backend import TRITON_INTERPRETED
from trady_kernels.ops.squares import SQUARED_ROWS
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_sums import (
    TYPES,
    Split,
    Squares,
    Sums,
    check,
    matmul_precision,
    multiprocessors,
    split,
)
from trady_kernels.ops.triton_sums import configurations as configurations_of_sums

#: Rows of a tile of results: channels, times taps in a convolution of larger kernels. Few channels are the rule.
ROWS = (16, 32, 64)
#: Outputs of a tile.
OUTPUTS = 64
#: Neighbouring elements that one access of 16 bytes, or 8 of a half type, takes.
VECTOR = 4
WARPS = 4

INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


@dataclass(frozen=True)
class Tile:
    """Block of one program of a matrix product summed over pixels.

    Attributes:
        rows, outputs: of results.
        pixels: that are loaded and multiplied at a time.
        stages: of the pipeline of loads.
    """

    rows: int
    outputs: int
    pixels: int
    stages: int


def tile(rows: int, dtype: torch.dtype, precision: str, aligned: bool, taps: bool = False) -> Tile:
    """The tile for a number of rows.

    Args:
        rows: of results.
        dtype, precision: of the product.
        aligned: whether grad_output is loaded ``VECTOR`` elements at a time.
        taps: whether rows are taps, each with a mask of its own.
    """
    block = next((block for block in ROWS if block >= rows), ROWS[-1])
    # As many pixels and stages as registers hold, by what the compiler says for every GPU from Ampere to Blackwell.
    smallest, largest = block == ROWS[0], block == ROWS[-1]
    if dtype != torch.float32:
        # Elements of two bytes that are loaded one by one go through registers, all pixels of a block together.
        # The largest tile's channels always are, where lanes go along them.
        middle = not smallest and not largest
        return Tile(block, OUTPUTS, 64, 3) if aligned and middle else Tile(block, OUTPUTS, 32, 4)
    if precision == "ieee":
        # So do the operands of a product without tensor cores.
        return Tile(block, OUTPUTS, 16, 2 if aligned else 3) if largest else Tile(block, OUTPUTS, 32, 3)
    if largest and taps:
        return Tile(block, OUTPUTS, 16, 4)
    return Tile(block, OUTPUTS, 32, 2 if smallest and not aligned else 3)


@dataclass(frozen=True)
class Product:
    """What a launch of the matrix product is.

    Attributes:
        tile: block of one program.
        row_tiles, output_tiles: blocks along the results' two sides.
        split: of the pixels.
        along_channels: whether lanes go along channels where they load, not along pixels.
        aligned: whether neighbouring elements can be loaded ``VECTOR`` at a time.
    """

    tile: Tile
    row_tiles: int
    output_tiles: int
    split: Split
    along_channels: bool
    aligned: bool

    @property
    def pixel_vector(self) -> int:
        """Pixels of one access."""
        return VECTOR if self.aligned and not self.along_channels else 1

    @property
    def output_vector(self) -> int:
        """Outputs of one access."""
        return VECTOR if self.aligned and self.along_channels else 1


def aligned_to_vectors(tensor: torch.Tensor, adjacent: int) -> bool:
    """Whether ``VECTOR`` elements next to each other along dimension ``adjacent`` always lie on a multiple of as many.

    Dimensions that follow each other in memory without a gap count as one.
    """
    if tensor.stride(adjacent) != 1 or tensor.data_ptr() % (VECTOR * tensor.element_size()):
        return False
    others = (d for d in range(tensor.dim()) if d != adjacent and tensor.shape[d] > 1)
    return tensor.shape[adjacent] % VECTOR == 0 and all(tensor.stride(d) % VECTOR == 0 for d in others)


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
    if along_channels:
        aligned = aligned_to_vectors(grad_output, 1)
    else:
        aligned = aligned_to_vectors(grad_output, 2) and aligned_to_vectors(input_selected, 2)
    block = tile(rows, grad_output.dtype, precision, aligned)
    row_tiles, output_tiles = triton.cdiv(rows, block.rows), triton.cdiv(outputs, block.outputs)
    parts = split(images * pixels, block.pixels, row_tiles * output_tiles, multiprocessors)
    return Product(block, row_tiles, output_tiles, parts, along_channels, aligned)


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
) -> tl.tensor:
    """``x`` with ones in the rows where ``ones`` is true."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # it takes products of bfloat16 for those of integers
        x = x.to(tl.float32)
    return tl.where(ones[:, None], 1.0, x).to(x.dtype)


_INTEGERS = {
    "rows": "i32",
    "outputs": "i32",
    "pixels": "i32",
    "image_pixels": "i32",
    "part_blocks": "i32",
    "row_tiles": "i32",
    "ones_row": "i32",
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
    part_blocks: tl.int32,
    row_tiles: tl.int32,
    ones_row: tl.int32,  # row of the bias; none where it is negative
    x_image: tl.int64,
    x_channel: tl.int64,
    x_pixel: tl.int64,
    dy_image: tl.int64,
    dy_channel: tl.int64,
    dy_pixel: tl.int64,
    step: tl.int64,
    PRECISION: tl.constexpr,
    ALONG_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
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
    # Tiles of the same pixels run next to each other: what they share they find in the cache.
    program = tl.program_id(0)
    part = tl.program_id(1)
    row = program % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = program // row_tiles * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    in_rows, in_outputs = row < rows, output < outputs
    x_rows = input_selected + row.to(tl.int64) * (x_channel * PIXEL_VECTOR)
    dy_outputs = grad_output + strided(output, dy_channel, PIXEL_VECTOR, OUTPUT_VECTOR)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    begin = part * part_blocks * BLOCK_PIXELS
    for start in range(begin, tl.minimum(begin + part_blocks * BLOCK_PIXELS, pixels), BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        in_pixels = pixel < pixels
        image = (pixel // image_pixels).to(tl.int64)
        place = pixel % image_pixels
        x_pixels = image * (x_image * PIXEL_VECTOR) + strided(place, x_pixel, 1, PIXEL_VECTOR)
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
        x = operand(x, row == ones_row)
        total = tl.dot(x, dy.to(x.dtype), total, input_precision=PRECISION)
    start = part.to(tl.int64) * step
    place = row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(grad + start + place, total, mask=in_rows[:, None] & in_outputs[None, :])
    tl.store(
        bias + start + tl.zeros_like(row)[:, None] + output[None, :],
        total,
        mask=(row == ones_row)[:, None] & in_outputs[None, :],
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
        by_pixel, by_output = plan.pixel_vector, plan.output_vector
        x_image, x_channel, x_pixel = input_selected.stride()
        dy_image, dy_channel, dy_pixel = grad_output.stride()
        _multiply[plan.row_tiles * plan.output_tiles, plan.split.parts](
            input_selected,
            grad_output,
            sums.targets[0],
            sums.targets[-1],
            k,
            outputs // by_output,
            images * pixels // by_pixel,
            pixels // by_pixel,
            plan.split.pixels // plan.tile.pixels,
            plan.row_tiles,
            k if sums.with_bias else -1,
            x_image // by_pixel,
            x_channel // by_pixel,
            x_pixel,
            dy_image // (by_pixel * by_output),
            dy_channel // by_pixel,
            dy_pixel // by_output,
            sums.step,
            PRECISION=precision,
            ALONG_CHANNELS=plan.along_channels,
            VECTOR=by_pixel * by_output,
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


def variants(taps: bool = False) -> Iterator[tuple[str, str, bool, Tile]]:
    """Type, precision, whether aligned, and tile of every product, for :func:`configurations`."""
    for dtype, name in TYPES.items():
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for aligned in (False, True):
                for rows in ROWS:
                    yield name, precision, aligned, tile(rows, dtype, precision, aligned, taps)


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
                {
                    "PRECISION": precision,
                    "ALONG_CHANNELS": along_channels,
                    "VECTOR": VECTOR if aligned else 1,
                    "BLOCK_ROWS": block.rows,
                    "BLOCK_OUTPUTS": block.outputs,
                    "BLOCK_PIXELS": block.pixels,
                },
                WARPS,
                block.stages,
            )
            for name, precision, aligned, block in variants()
            for along_channels in (False, True)
        ),
        *configurations_of_sums(),
    ]
