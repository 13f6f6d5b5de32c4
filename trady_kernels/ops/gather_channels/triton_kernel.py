"""``gather_channels`` in Triton: one kernel for planes of pixels and for rows of channels, of any strides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trady_kernels.ops.gather_channels.reference import gather_channels as reference
from trady_kernels.ops.layout import memory_format_of
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: Elements of one program, eight a thread.
TILE = 1024
WARPS = 4
#: No loop is pipelined.
STAGES = 1
#: Columns of a tile. Each is four times the one before: lanes beyond the result cost no memory traffic, and each further
#: width is one more variant to compile.
PIXELS = (4, 16, 64, 256, 1024)
CHANNELS = (4, 16, 64, 256)
#: Neighbouring pixels that may be loaded together, most first; narrower tiles leave a thread one element anyway.
VECTORS = (8, 4)
LEAST_COLUMNS_OF_VECTORS = 64
#: Dimensions of a row inside its channel.
INNER_DIMENSIONS = 2
#: Rows that are counted in 32 bits; a division in 64 takes several times longer.
MOST_NARROW_ROWS = 2**31 - TILE

#: Arguments of the kernel that no variant is compiled for.
_INTEGER_ARGUMENTS = [
    "in_channels",
    "index_stride",
    "selected",
    "rows",
    "columns",
    "column_tiles",
    "size_0",
    "size_1",
    "stride_0",
    "stride_1",
    "outer_stride",
    "channel_stride",
    "column_stride",
]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(
    debug=True,  # without it the assertion is not compiled
    do_not_specialize=_INTEGER_ARGUMENTS,
)
def _copy_tile(
    source: tl.tensor,
    target: tl.tensor,
    channels: tl.tensor,
    in_channels: tl.int64,
    index_stride: tl.int64,
    selected: tl.int32,
    rows: tl.int64,
    columns: tl.int64,  # in vectors, as the strides are
    column_tiles: tl.int32,
    size_0: tl.int32,
    size_1: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    outer_stride: tl.int64,
    channel_stride: tl.int64,
    column_stride: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_OF_CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row_tile = program // column_tiles
    if WIDE:
        row_tile = row_tile.to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = (program % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    # Multiplied by a constant here, so that the compiler knows that vectors are aligned and whole.
    columns = columns * VECTOR

    # A row's place: inner pixels, then the selected channel unless it is the column, then what is outside.
    outer = row
    row_offset = tl.zeros((ROWS,), tl.int64)
    if INNER:
        outer = row // size_0
        row_offset = (row % size_0).to(tl.int64) * stride_0 + (outer % size_1).to(tl.int64) * stride_1
        outer = outer // size_1
    if ROWS_OF_CHANNELS:
        index = tl.load(channels + column * index_stride, mask=column < columns, other=0)
        row_offset += outer.to(tl.int64) * outer_stride
        column_offset = index * channel_stride
    else:
        number = (outer % selected).to(tl.int64)
        index = tl.load(channels + number * index_stride, mask=row < rows, other=0)
        row_offset += (outer // selected).to(tl.int64) * outer_stride + index * channel_stride
        row_offset *= VECTOR
        column_offset = column if VECTOR > 1 else column * column_stride
    tl.device_assert(
        (index >= 0) & (index < in_channels), "gather_channels: an index in channels is out of range"
    )

    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row_offset[:, None] + column_offset[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    if VECTOR == 1:
        # In a line, neighbouring lanes take neighbouring columns. Of a matrix whose addresses it knows nothing about,
        # Triton before 3.7 gives them neighbouring rows.
        mask = tl.reshape(mask, (ROWS * COLUMNS,))
        offset = tl.reshape(offset, (ROWS * COLUMNS,))
        place = tl.reshape(place, (ROWS * COLUMNS,))
    value = tl.load(source + offset, mask=mask)
    if value.dtype == tl.float64 and target.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)  # ATen converts float64 to the half types through float32
    tl.store(target + place, value.to(target.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tiling:
    """How the result, in the order of its memory, is a matrix, and where its rows lie in the input.

    Attributes:
        rows, columns: of the matrix. A column is a pixel, or a selected channel where ``rows_of_channels``.
        inner: sizes and strides of the dimensions that rows go through before all others, innermost first.
        outer_stride: of the one they go through last.
        column_stride: of a column's pixel in the input.
        column_tile: columns of one tile.
        vector: neighbouring pixels that lie on a multiple of as many elements in every row.
    """

    rows: int
    columns: int
    rows_of_channels: bool
    inner: tuple[tuple[int, int], ...]
    outer_stride: int
    column_stride: int
    column_tile: int
    vector: int

    @property
    def row_tile(self) -> int:
        """Rows of one tile."""
        return TILE // self.column_tile


def _merged(dimensions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes and strides, outermost first, of fewer dimensions that go through the same elements in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in dimensions:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def tiling(input: torch.Tensor, selected: int) -> Tiling | None:
    """The tiling for ``selected`` channels; None where more dimensions are left than the kernel goes through."""
    shape, stride = input.shape, input.stride()
    batch = (shape[0], stride[0])
    pixels = _merged(list(zip(shape[2:], stride[2:], strict=True)))
    rows_of_channels = not pixels or memory_format_of(input) is torch.channels_last
    if rows_of_channels:
        columns, column_stride = selected, 0
        outer, *inner = _merged([batch, *pixels]) or [batch]
    else:
        columns, column_stride = pixels[-1]
        outer, inner = batch, pixels[:-1]
    if len(inner) > INNER_DIMENSIONS:
        return None
    rows = outer[0] * math.prod(size for size, _ in inner) * (1 if rows_of_channels else selected)
    widths = CHANNELS if rows_of_channels else PIXELS
    column_tile = next((width for width in widths if width >= columns), widths[-1])
    vector = 1
    if column_stride == 1 and column_tile >= LEAST_COLUMNS_OF_VECTORS:
        places = (columns, outer[1], stride[1], *(step for _, step in inner))
        vector = next((v for v in VECTORS if all(place % v == 0 for place in places)), 1)
    return Tiling(
        rows, columns, rows_of_channels, tuple(reversed(inner)), outer[1], column_stride, column_tile, vector
    )


def gather_channels(
    input: torch.Tensor,  # (N, C, ...)
    channels: torch.Tensor,  # (k,)
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # (N, k, ...)
    """Triton kernel of ``torch.ops.trady.gather_channels``.

    An index out of range stops a device assertion, as one of ATen's does, at the next synchronisation. Elements of 16
    bytes, for which Triton has no type, go through the reference.
    """
    dtype = input.dtype if dtype is None else dtype
    if input.element_size() not in _INTEGERS:
        return reference(input, channels, dtype)
    if not channels.is_cuda and any(not 0 <= index < input.shape[1] for index in channels.tolist()):
        raise IndexError("channels: an index is out of range")  # the interpreter would read what is there
    selected = channels.shape[0]
    output = torch.empty(
        (input.shape[0], selected, *input.shape[2:]),
        dtype=dtype,
        device=input.device,
        memory_format=memory_format_of(input),
    )
    if output.numel() == 0:
        return output
    tiles = tiling(input, selected)
    if tiles is None:
        input = input.contiguous()  # six dimensions in no regular order: not worth a kernel of their own
        tiles = tiling(input, selected)
        assert tiles is not None
    source, target = input, output
    if dtype == input.dtype:  # a plain copy, whatever the bits mean
        integer = _INTEGERS[input.element_size()]
        source, target = input.view(integer), output.view(integer)
    vector = tiles.vector
    (size_0, stride_0), (size_1, stride_1) = (*tiles.inner, (1, 0), (1, 0))[:INNER_DIMENSIONS]
    column_tiles = ceil_div(tiles.columns, tiles.column_tile)
    with torch.cuda.device_of(input):
        launch(
            _copy_tile,
            (ceil_div(tiles.rows, tiles.row_tile) * column_tiles,),
            source,
            target,
            channels,
            input.shape[1],
            channels.stride(0),
            selected,
            tiles.rows,
            tiles.columns // vector,
            column_tiles,
            size_0,
            size_1,
            stride_0 // vector,
            stride_1 // vector,
            tiles.outer_stride // vector,
            input.stride(1) // vector,
            tiles.column_stride,
            ROWS=tiles.row_tile,
            COLUMNS=tiles.column_tile,
            ROWS_OF_CHANNELS=tiles.rows_of_channels,
            INNER=bool(tiles.inner),
            VECTOR=vector,
            WIDE=tiles.rows > MOST_NARROW_ROWS,
            num_warps=WARPS,
            num_stages=STAGES,
            sanitize_overflow=False,  # what else debug mode would check, in every sum of two integers
        )
    return output


def _signature(source: str, target: str) -> dict[str, str]:
    narrow = {"selected": "i32", "column_tiles": "i32", "size_0": "i32", "size_1": "i32"}
    return {
        "source": f"*{source}",
        "target": f"*{target}",
        "channels": "*i64",
        **{name: narrow.get(name, "i64") for name in _INTEGER_ARGUMENTS},
    }


def configurations() -> list[Configuration]:
    """Every tile of one dtype, and every pair of dtypes in one tile of channels and one of planes."""

    def configuration(
        rows_of_channels: bool,
        columns: int,
        vector: int = 1,
        inner: bool = False,
        wide: bool = False,
        types: tuple[str, str] = ("i16", "i16"),
    ) -> Configuration:
        constants = {
            "ROWS": TILE // columns,
            "COLUMNS": columns,
            "ROWS_OF_CHANNELS": rows_of_channels,
            "INNER": inner,
            "VECTOR": vector,
            "WIDE": wide,
        }
        return Configuration(_copy_tile, _signature(*types), constants, WARPS, STAGES)

    wide_columns = [columns for columns in PIXELS if columns >= LEAST_COLUMNS_OF_VECTORS]
    tiles = [
        *((True, columns, 1) for columns in CHANNELS),
        *((False, columns, 1) for columns in PIXELS),
        *((False, columns, vector) for columns in wide_columns for vector in VECTORS),
    ]
    floating = ("fp32", "fp64", "bf16", "fp16")
    pairs = [(source, target) for source in floating for target in floating if source != target]
    pairs += [(element, element) for element in ("u8", "i32", "i64")]
    return [
        *(configuration(*tile, inner) for inner in (False, True) for tile in tiles),
        *(configuration(rows_of_channels, 64, 1, True, True) for rows_of_channels in (True, False)),
        *(configuration(True, 16, types=pair) for pair in pairs),
        *(configuration(False, 1024, 4, types=pair) for pair in pairs),
    ]
