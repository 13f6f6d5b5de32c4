"""``scatter_channels_`` in Triton: one element a lane, in the order of the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trady_kernels.ops.scatter_channels.reference import scatter_channels_ as reference
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: Elements of one program, two a thread: most of what it does are divisions, and eight of them at once fill the registers.
TILE = 256
WARPS = 4
#: No loop is pipelined.
STAGES = 1
#: Dimensions of the pixels of one channel and output.
PIXEL_DIMENSIONS = 2
#: Elements that are counted in 32 bits; a division in 64 takes several times longer.
MOST_NARROW_ELEMENTS = 2**31 - TILE

#: Arguments of the kernel that no variant is compiled for.
_INTEGER_ARGUMENTS = [
    "count",
    "outputs",
    "in_channels",
    "group_channels",
    "index_stride",
    "row_stride",
    "row_output_stride",
    "group_stride",
    "channel_stride",
    "output_stride",
    "size_0",
    "size_1",
    "row_stride_0",
    "row_stride_1",
    "stride_0",
    "stride_1",
]
_NARROW_ARGUMENTS = ("outputs", "size_0", "size_1")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(
    debug=True,  # without it the assertion is not compiled
    do_not_specialize=_INTEGER_ARGUMENTS,
)
def _scatter_tile(
    rows: tl.tensor,
    weight: tl.tensor,
    channels: tl.tensor,
    count: tl.int64,
    outputs: tl.int32,
    in_channels: tl.int64,
    group_channels: tl.int64,
    index_stride: tl.int64,
    row_stride: tl.int64,
    row_output_stride: tl.int64,
    group_stride: tl.int64,
    channel_stride: tl.int64,
    output_stride: tl.int64,
    size_0: tl.int32,
    size_1: tl.int32,
    row_stride_0: tl.int64,
    row_stride_1: tl.int64,
    stride_0: tl.int64,
    stride_1: tl.int64,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    element = program * TILE + tl.arange(0, TILE)
    exists = element < count
    # What is read lies side by side, and nobody waits for writes.
    pixel_0 = (element % size_0).to(tl.int64)
    rest = element // size_0
    pixel_1 = (rest % size_1).to(tl.int64)
    rest = rest // size_1
    output = (rest % outputs).to(tl.int64)
    row = (rest // outputs).to(tl.int64)
    index = tl.load(channels + row * index_stride, mask=exists, other=0)
    tl.device_assert(
        (index >= 0) & (index < in_channels), "scatter_channels_: an index in channels is out of range"
    )
    source = row * row_stride + output * row_output_stride + pixel_0 * row_stride_0 + pixel_1 * row_stride_1
    target = index // group_channels * group_stride + index % group_channels * channel_stride
    target += output * output_stride + pixel_0 * stride_0 + pixel_1 * stride_1
    tl.store(weight + target, tl.load(rows + source, mask=exists), mask=exists)


def _pixels(weight: torch.Tensor, rows: torch.Tensor) -> list[tuple[int, int, int]]:
    """Sizes, strides of the rows and strides of the weight, innermost first, of as few dimensions as these allow."""
    pixels: list[tuple[int, int, int]] = []
    for d in reversed(range(2, weight.dim())):
        size, row_stride, stride = weight.shape[d], rows.stride(d), weight.stride(d)
        if size == 1:
            continue
        if pixels and (row_stride, stride) == tuple(pixels[-1][0] * step for step in pixels[-1][1:]):
            pixels[-1] = (pixels[-1][0] * size, *pixels[-1][1:])
        else:
            pixels.append((size, row_stride, stride))
    return pixels


def scatter_channels_(
    weight: torch.Tensor,  # (C', C/groups, ...)
    channels: torch.Tensor,  # (k,)
    rows: torch.Tensor,  # (k, C'/groups, ...)
    groups: int,
) -> None:
    """Triton kernel of ``torch.ops.trady.scatter_channels_``.

    An index out of range stops a device assertion, as one of ATen's does, at the next synchronisation. Elements of 16
    bytes, for which Triton has no type, and more than four dimensions in no regular order go through the reference.
    """
    pixels = _pixels(weight, rows)
    if weight.element_size() not in _INTEGERS or len(pixels) > PIXEL_DIMENSIONS:
        reference(weight, channels, rows, groups)
        return
    in_channels = weight.shape[1] * groups
    if not channels.is_cuda and any(not 0 <= index < in_channels for index in channels.tolist()):
        raise IndexError("channels: an index is out of range")  # the interpreter would write what is there
    count = rows.numel()
    if count == 0:
        return
    outputs = weight.shape[0] // groups
    integer = _INTEGERS[weight.element_size()]
    (size_0, row_stride_0, stride_0), (size_1, row_stride_1, stride_1) = (*pixels, (1, 0, 0), (1, 0, 0))[
        :PIXEL_DIMENSIONS
    ]
    with torch.cuda.device_of(weight):
        launch(
            _scatter_tile,
            (ceil_div(count, TILE),),
            rows.view(integer),
            weight.view(integer),
            channels,
            count,
            outputs,
            in_channels,
            weight.shape[1],
            channels.stride(0),
            rows.stride(0),
            rows.stride(1),
            outputs * weight.stride(0),
            weight.stride(1),
            weight.stride(0),
            size_0,
            size_1,
            row_stride_0,
            row_stride_1,
            stride_0,
            stride_1,
            TILE=TILE,
            WIDE=count > MOST_NARROW_ELEMENTS,
            num_warps=WARPS,
            num_stages=STAGES,
            sanitize_overflow=False,  # what else debug mode would check, in every sum of two integers
        )


def configurations() -> list[Configuration]:
    """Elements of every size, and of one size in more of them than 32 bits count."""

    def configuration(element: str, wide: bool = False) -> Configuration:
        integers = {name: "i32" if name in _NARROW_ARGUMENTS else "i64" for name in _INTEGER_ARGUMENTS}
        signature = {"rows": f"*{element}", "weight": f"*{element}", "channels": "*i64", **integers}
        return Configuration(_scatter_tile, signature, {"TILE": TILE, "WIDE": wide}, WARPS, STAGES)

    return [*(configuration(element) for element in ("u8", "i16", "i32", "i64")), configuration("i16", True)]
