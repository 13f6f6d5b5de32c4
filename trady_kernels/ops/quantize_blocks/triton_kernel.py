"""``quantize_blocks`` and ``dequantize_blocks`` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trady_kernels.ops.quantize_blocks import blocks_of
from trady_kernels.ops.quantize_blocks.reference import BLOCK, LARGEST, MINUS_INFINITY, SMALLEST
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: Blocks of one program.
ROWS = 32
WARPS = 4
#: No loop is pipelined.
STAGES = 1


@triton.jit
def _divided(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    """Rounded as IEEE 754 says; Triton's own division of float32 is not."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def _quantize_rows(
    input: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    remaining: tl.tensor,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    MINUS_INFINITY: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if RAGGED:
        x = tl.load(input + place, mask=place < remaining, other=0.0)
    else:
        x = tl.load(input + place)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    lowest = x == float("-inf")
    x = tl.where(lowest, 0.0, x)
    largest = tl.max(tl.abs(x), axis=1)
    # A maximum that may overlook NaN, and whether there is one.
    unordered = tl.max((x != x).to(tl.int32), axis=1) != 0
    scale = _divided(largest, tl.full((ROWS,), LARGEST, x.dtype)).to(tl.float32)
    scale = tl.where(largest < SMALLEST, 0.0, scale)
    # 127 times the scale of float32's largest number must not round up to infinity.
    below = (scale.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    lost = unordered | (scale == float("inf"))
    scale = tl.where(scale * LARGEST == float("inf"), below, scale)
    scale = tl.where(lost, float("nan"), scale)

    divisor = tl.where(scale > 0, scale, 1.0).to(x.dtype)
    inverse = tl.where(scale > 0, _divided(tl.full((ROWS,), 1.0, x.dtype), divisor), 0.0)
    code = x * inverse[:, None]
    # To the nearest integer, ties to even: what a sum with a number rounds to whose last digit is 1.
    ROUND: tl.constexpr = 1.5 * 2.0**52 if x.dtype == tl.float64 else 1.5 * 2.0**23
    code = (code + ROUND) - ROUND
    code = tl.where(
        lowest, MINUS_INFINITY, code
    )  # the others: at most 127 * (1 + 2**-22) before the rounding
    code = tl.where(lost[:, None], 0.0, code).to(tl.int8)
    if RAGGED:
        tl.store(codes + place, code, mask=place < remaining)
        tl.store(scales + row, scale, mask=row * BLOCK < remaining)
    else:
        tl.store(codes + place, code)
        tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["count"])
def _quantize(
    input: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    count: tl.int64,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    MINUS_INFINITY: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    input += start
    codes += start
    scales += start // BLOCK
    # Only the last block is ragged: a mask of unknown length would make every load of every block narrow.
    if start + ROWS * BLOCK <= count:
        _quantize_rows(
            input, codes, scales, count - start, False, BLOCK, LARGEST, MINUS_INFINITY, SMALLEST, ROWS
        )
    else:
        _quantize_rows(
            input, codes, scales, count - start, True, BLOCK, LARGEST, MINUS_INFINITY, SMALLEST, ROWS
        )


@triton.jit
def _dequantize_rows(
    codes: tl.tensor,
    scales: tl.tensor,
    output: tl.tensor,
    remaining: tl.tensor,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    MINUS_INFINITY: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if RAGGED:
        code = tl.load(codes + place, mask=place < remaining, other=0)
        scale = tl.load(scales + row, mask=row * BLOCK < remaining, other=0.0)
    else:
        code = tl.load(codes + place)
        scale = tl.load(scales + row)
    if output.dtype.element_ty == tl.float64:
        scale = scale.to(tl.float64)
    value = code.to(scale.dtype) * scale[:, None]
    value = tl.where(code == MINUS_INFINITY, float("-inf"), value).to(output.dtype.element_ty)
    if RAGGED:
        tl.store(output + place, value, mask=place < remaining)
    else:
        tl.store(output + place, value)


@triton.jit(do_not_specialize=["count"])
def _dequantize(
    codes: tl.tensor,
    scales: tl.tensor,
    output: tl.tensor,
    count: tl.int64,
    BLOCK: tl.constexpr,
    MINUS_INFINITY: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    codes += start
    scales += start // BLOCK
    output += start
    # Only the last block is ragged: a mask of unknown length would make every load of every block narrow.
    if start + ROWS * BLOCK <= count:
        _dequantize_rows(codes, scales, output, count - start, False, BLOCK, MINUS_INFINITY, ROWS)
    else:
        _dequantize_rows(codes, scales, output, count - start, True, BLOCK, MINUS_INFINITY, ROWS)


def quantize_blocks(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton kernel of ``torch.ops.trady.quantize_blocks``."""
    count = input.numel()
    codes = torch.empty(count, dtype=torch.int8, device=input.device)
    scales = torch.empty(blocks_of(count), dtype=torch.float32, device=input.device)
    if count:
        with torch.cuda.device_of(input):
            launch(
                _quantize,
                (ceil_div(count, ROWS * BLOCK),),
                input,
                codes,
                scales,
                count,
                BLOCK=BLOCK,
                LARGEST=LARGEST,
                MINUS_INFINITY=MINUS_INFINITY,
                SMALLEST=SMALLEST,
                ROWS=ROWS,
                num_warps=WARPS,
                num_stages=STAGES,
                enable_fp_fusion=False,  # a product is rounded before it is rounded to an integer
            )
    return codes, scales


def dequantize_blocks(
    codes: torch.Tensor,  # (n,)
    scales: torch.Tensor,  # (ceil(n / 64),)
    dtype: torch.dtype,
) -> torch.Tensor:  # (n,)
    """Triton kernel of ``torch.ops.trady.dequantize_blocks``."""
    output = torch.empty_like(codes, dtype=dtype)
    count = codes.numel()
    if count:
        with torch.cuda.device_of(codes):
            launch(
                _dequantize,
                (ceil_div(count, ROWS * BLOCK),),
                codes,
                scales,
                output,
                count,
                BLOCK=BLOCK,
                MINUS_INFINITY=MINUS_INFINITY,
                ROWS=ROWS,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return output


def configurations() -> list[Configuration]:
    """Every variant that ``quantize_blocks`` and ``dequantize_blocks`` launch."""
    floating = ("fp32", "fp64", "bf16", "fp16")
    quantized = {"codes": "*i8", "scales": "*fp32", "count": "i64"}
    constants = {"BLOCK": BLOCK, "MINUS_INFINITY": MINUS_INFINITY, "ROWS": ROWS}
    limits = {"LARGEST": LARGEST, "SMALLEST": SMALLEST}
    return [
        *(
            Configuration(_quantize, {"input": f"*{element}"} | quantized, constants | limits, WARPS, STAGES)
            for element in floating
        ),
        *(
            Configuration(_dequantize, quantized | {"output": f"*{element}"}, constants, WARPS, STAGES)
            for element in floating
        ),
    ]
