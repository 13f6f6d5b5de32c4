"""``rectify`` and ``rectify_`` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trady_kernels.ops.pack_bits import bytes_of_bits
from trady_kernels.ops.pack_bits.triton_kernel import BYTES, STAGES, WARPS, dense, places, store_bits
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: What elements outside the interval become: clamped to its lower end, to both, or multiplied.
OUTSIDE = ("lower bound", "bounds", "slope")


@triton.jit
def _rectify_block(
    source: tl.tensor,
    target: tl.tensor,
    bits: tl.tensor,
    remaining: tl.tensor,
    min: tl.tensor,
    max: tl.tensor,
    slope: tl.tensor,
    RAGGED: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    place = places(BYTES)
    if RAGGED:
        x = tl.load(source + place, mask=place < remaining, other=0.0)
    else:
        x = tl.load(source + place)
    # In float32 for the half types: the bounds are not rounded to them, a product is rounded once.
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    # tl.full takes the bounds from float64 to the dtype without a stop at float32, in the interpreter too.
    min = tl.full((1, 1), min, x.dtype)
    max = tl.full((1, 1), max, x.dtype)
    slope = tl.full((1, 1), slope, x.dtype)
    if OUTSIDE == "slope":
        inside = x > min
        y = tl.where(inside, x, x * slope)
    else:
        # NaN is inside, and -0 stays -0 above a bound of 0: tl.maximum would decide both otherwise.
        outside = x <= min
        y = tl.where(x < min, min, x)
        if OUTSIDE == "bounds":
            outside = outside | (x >= max)
            y = tl.where(y > max, max, y)
        inside = ~outside
    y = y.to(target.dtype.element_ty)
    if RAGGED:
        tl.store(target + place, y, mask=place < remaining)
    else:
        tl.store(target + place, y)
    store_bits(bits, inside, remaining, RAGGED, BYTES)


@triton.jit(do_not_specialize=["count"])
def _rectify(
    source: tl.tensor,
    target: tl.tensor,
    bits: tl.tensor,
    count: tl.int64,
    min: tl.float64,
    max: tl.float64,
    slope: tl.float64,
    OUTSIDE: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * (BYTES * 8)
    source += start
    target += start
    bits += start // 8
    # Only the last block is ragged: a mask of unknown length would make every load of every block narrow.
    if start + BYTES * 8 <= count:
        _rectify_block(source, target, bits, count - start, min, max, slope, False, OUTSIDE, BYTES)
    else:
        _rectify_block(source, target, bits, count - start, min, max, slope, True, OUTSIDE, BYTES)


def _launch(
    source: torch.Tensor, target: torch.Tensor, min: float, max: float | None, slope: float | None
) -> torch.Tensor:
    """Rectify a dense tensor into one laid out alike, or itself; the bits."""
    count = source.numel()
    bits = source.new_empty(bytes_of_bits(count), dtype=torch.uint8)
    if count:
        outside = "slope" if slope is not None else "lower bound" if max is None else "bounds"
        with torch.cuda.device_of(source):
            launch(
                _rectify,
                (ceil_div(count, BYTES * 8),),
                source,
                target,
                bits,
                count,
                float(min),
                0.0 if max is None else float(max),
                0.0 if slope is None else float(slope),
                OUTSIDE=outside,
                BYTES=BYTES,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return bits


def rectify(
    input: torch.Tensor,  # (...)
    min: float,
    max: float | None,
    slope: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # (...), (ceil(n / 8),)
    """Triton kernel of ``torch.ops.trady.rectify``."""
    output = torch.empty_like(input)
    return output, _launch(dense(input), output, min, max, slope)


def rectify_(input: torch.Tensor, min: float, max: float | None, slope: float | None) -> torch.Tensor:
    """Triton kernel of ``torch.ops.trady.rectify_``."""
    values = dense(input)
    bits = _launch(values, values, min, max, slope)
    if values is not input:
        input.copy_(values)
    return bits


def configurations() -> list[Configuration]:
    """Every variant that ``rectify`` and ``rectify_`` launch."""
    return [
        Configuration(
            _rectify,
            {
                "source": f"*{element}",
                "target": f"*{element}",
                "bits": "*u8",
                "count": "i64",
                "min": "fp64",
                "max": "fp64",
                "slope": "fp64",
            },
            {"OUTSIDE": outside, "BYTES": BYTES},
            WARPS,
            STAGES,
        )
        for element in ("fp32", "fp64", "bf16", "fp16")
        for outside in OUTSIDE
    ]
