"""What Triton kernels share whose lanes each take 16 bytes of channels of an image, or one element, at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Lanes of one program, one a thread.
LANES = 128
WARPS = 4
#: Lanes that are counted in 32 bits; a division in 64 takes several times longer.
MOST_NARROW_LANES = 2**31 - LANES
#: Bytes that a thread loads at once, where the channels allow it.
VECTOR_BYTES = 16


@triton.jit
def place_of(
    lane: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Image, channel, row and column of a lane, which go through them in the order of memory."""
    channels, rows, columns = channels.to(lane.dtype), rows.to(lane.dtype), columns.to(lane.dtype)
    if CHANNELS_LAST:
        channel = lane % channels
        lane = lane // channels
    column = lane % columns
    lane = lane // columns
    row = lane % rows
    lane = lane // rows
    if not CHANNELS_LAST:
        channel = lane % channels
        lane = lane // channels
    return lane.to(tl.int64), channel.to(tl.int64), row.to(tl.int32), column.to(tl.int32)


@triton.jit
def lanes_of_program(LANES: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    # Unsigned, which is quicker to divide.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane.to(tl.uint64 if WIDE else tl.uint32)


@triton.jit
def vectors(place: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """Elements of each lane's vector; multiplied by a constant, so that the compiler knows them to be aligned."""
    return (place * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


def vector_of(channels: int, *tensors: torch.Tensor) -> int:
    """Channels that a lane takes at once: 16 bytes of the first tensor, where all have whole vectors of them, else 1."""
    vector = VECTOR_BYTES // tensors[0].element_size()
    whole = channels % vector == 0 and all(
        tensor.stride(1) == 1 and all(tensor.stride(d) % vector == 0 for d in (0, 2, 3)) for tensor in tensors
    )
    return vector if whole else 1


def strides_in_vectors(tensor: torch.Tensor, vector: int) -> tuple[int, ...]:
    """In vectors, of which the next one lies next to a vector of channels."""
    batch, channel, row, column = tensor.stride()
    return batch // vector, channel, row // vector, column // vector
