"""``scale_by_bits`` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trady_kernels.ops.pack_bits.triton_kernel import BYTES, STAGES, WARPS, dense, places
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch


@triton.jit
def _scale_block(
    source: tl.tensor,
    target: tl.tensor,
    bits: tl.tensor,
    remaining: tl.tensor,
    on: tl.tensor,
    off: tl.tensor,
    RAGGED: tl.constexpr,
    OFF: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    byte = tl.arange(0, BYTES)
    place = places(BYTES)
    if RAGGED:
        x = tl.load(source + place, mask=place < remaining, other=0.0)
        packed = tl.load(bits + byte, mask=byte * 8 < remaining, other=0)
    else:
        x = tl.load(source + place)
        packed = tl.load(bits + byte)
    is_set = ((packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    # In float32 for the half types: a product is rounded once.
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    # tl.full takes the factors from float64 to the dtype without a stop at float32, in the interpreter too.
    y = x * tl.full((1, 1), on, x.dtype)
    if OFF:
        y = tl.where(is_set, y, x * tl.full((1, 1), off, x.dtype))
    else:
        y = tl.where(is_set, y, tl.full((1, 1), 0.0, x.dtype))
    y = y.to(target.dtype.element_ty)
    if RAGGED:
        tl.store(target + place, y, mask=place < remaining)
    else:
        tl.store(target + place, y)


@triton.jit(do_not_specialize=["count"])
def _scale(
    source: tl.tensor,
    target: tl.tensor,
    bits: tl.tensor,
    count: tl.int64,
    on: tl.float64,
    off: tl.float64,
    OFF: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * (BYTES * 8)
    source += start
    target += start
    bits += start // 8
    # Only the last block is ragged: a mask of unknown length would make every load of every block narrow.
    if start + BYTES * 8 <= count:
        _scale_block(source, target, bits, count - start, on, off, False, OFF, BYTES)
    else:
        _scale_block(source, target, bits, count - start, on, off, True, OFF, BYTES)


def scale_by_bits(
    input: torch.Tensor,  # (...)
    bits: torch.Tensor,  # (ceil(n / 8),)
    on: float,
    off: float | None,
) -> torch.Tensor:  # (...)
    """Triton kernel of ``torch.ops.trady.scale_by_bits``."""
    output = torch.empty_like(input)
    count = input.numel()
    if count:
        with torch.cuda.device_of(input):
            launch(
                _scale,
                (ceil_div(count, BYTES * 8),),
                dense(input),
                output,
                bits.contiguous(),
                count,
                float(on),
                0.0 if off is None else float(off),
                OFF=off is not None,
                BYTES=BYTES,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return output


def configurations() -> list[Configuration]:
    """Every variant that ``scale_by_bits`` launches."""
    return [
        Configuration(
            _scale,
            {
                "source": f"*{element}",
                "target": f"*{element}",
                "bits": "*u8",
                "count": "i64",
                "on": "fp64",
                "off": "fp64",
            },
            {"OFF": off, "BYTES": BYTES},
            WARPS,
            STAGES,
        )
        for element in ("fp32", "fp64", "bf16", "fp16")
        for off in (False, True)
    ]
