"""``quantize_blocks`` and ``dequantize_blocks`` in Triton against their references, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATING
from corners import identical
from interpreted import on, round_bfloat16
from test_quantize_blocks import BLOCK_CASES, BlockCase, _special

from trady_kernels.ops import backend, dequantize_blocks, last_kernel, quantize_blocks
from trady_kernels.ops.quantize_blocks.reference import dequantize_blocks as dequantize_reference
from trady_kernels.ops.quantize_blocks.reference import quantize_blocks as quantize_reference

kernel = pytest.importorskip(
    "trady_kernels.ops.quantize_blocks.triton_kernel", reason="triton is not installed"
)


#: What NumPy says of infinities in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_bfloat16(monkeypatch)


def check(device: str, input: torch.Tensor) -> None:
    expected_codes, expected_scales = quantize_reference(input)
    with backend("triton"):
        codes, scales = quantize_blocks(on(device, input))
        for dtype in FLOATING:
            restored = dequantize_blocks(codes, scales, dtype)
            assert identical(restored.cpu(), dequantize_reference(codes.cpu(), scales.cpu(), dtype))
    assert last_kernel("quantize_blocks") == last_kernel("dequantize_blocks") == "triton"
    assert torch.equal(codes.cpu(), expected_codes) and codes.dtype == torch.int8
    assert identical(scales.cpu(), expected_scales)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_cases(case: BlockCase, dtype: torch.dtype, triton_device: str) -> None:
    check(triton_device, case.values(dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_around_a_program(dtype: torch.dtype, triton_device: str) -> None:
    elements = kernel.ROWS * kernel.BLOCK
    for count in (elements - 1, elements, elements + 1, 3 * elements + 65):
        check(triton_device, BlockCase("row", (count,), exponents=(-30, 30)).values(dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_not_finite(dtype: torch.dtype, triton_device: str) -> None:
    """Also both infinities beside NaN, float32's largest numbers, and those around the least block that counts."""
    check(triton_device, _special(dtype))
    rows = torch.randn(6, kernel.BLOCK).to(dtype)
    rows[0, 3], rows[0, 4] = torch.nan, -torch.inf
    rows[1] = -torch.inf
    rows[2] = torch.inf
    rows[3, :2] = torch.tensor([3.4028235e38, -3.4e38], dtype=torch.float64).to(dtype)
    rows[4] = rows[4].clamp(-1, 1) * 2.0**-119
    rows[5] = 0
    rows[5, 1] = torch.tensor(2.0**-119, dtype=torch.float64).to(dtype)
    check(triton_device, rows)


def test_float64_beyond_float32(triton_device: str) -> None:
    for largest in (1e41, 4.4e40, 4.3e40, 4e40, 3.5e38, 1e-37, 1e-44, 1e-300):
        check(triton_device, torch.tensor([largest, -largest / 3, 1.0], dtype=torch.float64))
        check(triton_device, torch.tensor([largest, -largest / 3], dtype=torch.float64))


def test_ties_go_to_even_and_products_are_rounded_first(triton_device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        rows = torch.arange(-63.5, 64.5).repeat(2, 1).to(dtype).reshape(-1, kernel.BLOCK)
        rows[:, 0] = 127
        check(triton_device, rows)
        check(triton_device, rows * torch.linspace(0.1, 3, len(rows))[:, None].to(dtype))
