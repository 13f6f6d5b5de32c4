"""``quantize_blocks`` and back, beside a copy and the cast to half precision, under pytest-benchmark.

pytest benchmarks/quantize_blocks.py
"""

from __future__ import annotations

import pytest
import torch

from trady_kernels.ops import backend, dequantize_blocks, quantize_blocks

#: What the MLP of ViT-tiny keeps: batch 8, 197 tokens.
SHAPE = (8, 197, 768)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_blocks(benchmark, dtype: torch.dtype, kernel: str) -> None:
    input = torch.randn(SHAPE).to(dtype)
    with backend(kernel):
        benchmark(quantize_blocks, input)


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_blocks(benchmark, dtype: torch.dtype, kernel: str) -> None:
    codes, scales = quantize_blocks(torch.randn(SHAPE).to(dtype))
    with backend(kernel):
        benchmark(dequantize_blocks, codes, scales, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy(benchmark, dtype: torch.dtype) -> None:
    benchmark(torch.randn(SHAPE).to(dtype).clone)


def test_half(benchmark) -> None:
    benchmark(torch.randn(SHAPE).to, torch.bfloat16)
