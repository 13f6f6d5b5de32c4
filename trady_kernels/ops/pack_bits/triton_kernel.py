"""``pack_bits`` in Triton, and what the other kernels of bits share with it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trady_kernels.ops.layout import is_dense
from trady_kernels.ops.pack_bits import bytes_of_bits
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: Bytes of bits of one program, of 8 elements each.
BYTES = 256
WARPS = 4
#: No loop is pipelined.
STAGES = 1


def dense(input: torch.Tensor) -> torch.Tensor:
    """The input, or where its elements leave gaps or overlap, a copy laid out as ``torch.empty_like(input)``.

    The kernels take elements in the order of memory. Activations are dense; to walk other strides eight elements at a
    time would cost every call more arithmetic than the copy costs those few.
    """
    return input if is_dense(input) else torch.empty_like(input).copy_(input)


@triton.jit
def places(BYTES: tl.constexpr) -> tl.tensor:
    """Place of the element that is bit ``i`` of byte ``j``."""
    return tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def store_bits(
    bits: tl.tensor, mask: tl.tensor, remaining: tl.tensor, RAGGED: tl.constexpr, BYTES: tl.constexpr
) -> None:
    """Write a block of booleans (BYTES, 8), of which ``remaining`` are elements where it is ragged."""
    if RAGGED:
        mask = mask & (places(BYTES) < remaining)
    packed = tl.sum(mask.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)
    byte = tl.arange(0, BYTES)
    if RAGGED:
        tl.store(bits + byte, packed, mask=byte * 8 < remaining)
    else:
        tl.store(bits + byte, packed)


@triton.jit
def _pack_block(
    mask: tl.tensor, bits: tl.tensor, remaining: tl.tensor, RAGGED: tl.constexpr, BYTES: tl.constexpr
) -> None:
    place = places(BYTES)
    if RAGGED:
        loaded = tl.load(mask + place, mask=place < remaining, other=0)
    else:
        loaded = tl.load(mask + place)
    store_bits(bits, loaded != 0, remaining, RAGGED, BYTES)


@triton.jit(do_not_specialize=["count"])
def _pack(mask: tl.tensor, bits: tl.tensor, count: tl.int64, BYTES: tl.constexpr) -> None:
    start = tl.program_id(0).to(tl.int64) * (BYTES * 8)
    # Only the last block is ragged: a mask of unknown length would make every load of every block narrow.
    if start + BYTES * 8 <= count:
        _pack_block(mask + start, bits + start // 8, count - start, False, BYTES)
    else:
        _pack_block(mask + start, bits + start // 8, count - start, True, BYTES)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:  # (...) -> (ceil(n / 8),)
    """Triton kernel of ``torch.ops.trady.pack_bits``."""
    count = mask.numel()
    bits = mask.new_empty(bytes_of_bits(count), dtype=torch.uint8)
    if count:
        with torch.cuda.device_of(mask):
            grid = (ceil_div(count, BYTES * 8),)
            launch(
                _pack,
                grid,
                dense(mask).view(torch.uint8),
                bits,
                count,
                BYTES=BYTES,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return bits


def configurations() -> list[Configuration]:
    """Every variant that ``pack_bits`` launches."""
    return [
        Configuration(_pack, {"mask": "*u8", "bits": "*u8", "count": "i64"}, {"BYTES": BYTES}, WARPS, STAGES)
    ]
