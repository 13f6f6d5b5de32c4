"""``quantize_blocks`` and ``dequantize_blocks``: the error bound, what is not finite, every kernel alike."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import FLOATING, laid_out
from tolerances import DTYPE_ROUNDOFF

from trady_kernels.ops import backend, dequantize_blocks, last_kernel, quantize_blocks

BLOCK = 64


@dataclass(frozen=True)
class BlockCase:
    """A tensor, its layout and the range of its blocks' magnitudes."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    exponents: tuple[float, float] = (-3, 3)

    def __str__(self) -> str:
        return self.name

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Normal numbers times a power of 10 that differs from place to place."""
        low, high = self.exponents
        scale = 10 ** torch.empty(self.shape, dtype=torch.float64).uniform_(low, high).sort().values
        values = (torch.randn(self.shape, dtype=torch.float64) * scale).to(dtype)
        return values if len(self.shape) < 2 else laid_out(values, self.layout)


BLOCK_CASES = (
    BlockCase("one element", (1,)),
    BlockCase("one short of a block", (63,)),
    BlockCase("a block", (64,)),
    BlockCase("a block and one", (65,)),
    BlockCase("tokens", (3, 19, 24)),
    BlockCase("images", (2, 5, 9, 7)),
    BlockCase("channels_last", (2, 5, 9, 7), "channels_last"),
    BlockCase("transposed", (2, 5, 33), "transposed"),
    BlockCase("scalar", ()),
    BlockCase("empty", (0, 3)),
)


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def blocks(flat: torch.Tensor) -> torch.Tensor:
    """Rows of a block each, zeros behind the last element."""
    padded = flat.new_zeros(-(-flat.numel() // BLOCK) * BLOCK)
    padded[: flat.numel()] = flat
    return padded.view(-1, BLOCK)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN equal to any other."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_error_is_at_most_half_a_scale(case: BlockCase, dtype: torch.dtype, isa: str) -> None:
    input = case.values(dtype)
    codes, scales = quantize_blocks(input)
    assert last_kernel("quantize_blocks") == "cpp"
    restored = dequantize_blocks(codes, scales, dtype)
    flat = in_memory(input)
    assert codes.shape == flat.shape and scales.shape == (-(-input.numel() // BLOCK),)

    x = blocks(flat.double())
    largest = x.abs().amax(1, keepdim=True)
    error = (blocks(restored.double()) - x).abs()
    bound = largest / 254 * (1 + 2**-16) + DTYPE_ROUNDOFF[dtype] * blocks(restored.double()).abs()
    assert (error <= bound).all()
    # sharp: without a code less the bound would be broken
    if input.numel() > 200:
        assert (error > 0.98 * largest / 254).any()
    torch.testing.assert_close(scales.double(), largest.flatten() / 127, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_kernels_agree_bit_for_bit(case: BlockCase, dtype: torch.dtype, isa: str) -> None:
    input = case.values(dtype)
    codes, scales = quantize_blocks(input)
    restored = dequantize_blocks(codes, scales, dtype)
    with backend("reference"):
        expected_codes, expected_scales = quantize_blocks(input)
        expected = dequantize_blocks(codes, scales, dtype)
    assert torch.equal(codes, expected_codes) and same(scales, expected_scales) and same(restored, expected)


def _special(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of: a mask, NaN, plus infinity, denormals, zeros, the largest number, halves of a scale."""
    rows = torch.randn(8, BLOCK, dtype=torch.float64).to(dtype)
    rows[0] = torch.where(rows[0] > 0, -torch.inf, 0)
    rows[1, 5] = torch.nan
    rows[2, 6], rows[2, 7] = torch.inf, -torch.inf
    rows[3] = torch.finfo(dtype).smallest_normal / 4
    rows[4] = 0
    rows[4, ::2] = -0.0
    rows[5, 9] = torch.finfo(dtype).max if dtype != torch.float64 else torch.finfo(torch.float32).max
    rows[6] = torch.arange(BLOCK) + 0.5
    rows[6, 0] = -127
    rows[7, 1] = -torch.inf
    return rows


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_not_finite(dtype: torch.dtype, isa: str) -> None:
    rows = _special(dtype)
    codes, scales = quantize_blocks(rows)
    restored = dequantize_blocks(codes, scales, dtype).view_as(rows)
    with backend("reference"):
        expected = quantize_blocks(rows)
        assert torch.equal(codes, expected[0]) and same(scales, expected[1])
        assert same(restored, dequantize_blocks(codes, scales, dtype).view_as(rows))
    assert torch.equal(restored[0], rows[0])  # a mask comes back as it is
    assert restored[1:3].isnan().all()  # a NaN or plus infinity is not overlooked
    assert not restored[4].any()
    assert restored[5].isfinite().all()  # the largest number does not overflow
    torch.testing.assert_close(restored[5, 9], rows[5, 9])
    assert torch.equal(codes.view_as(rows)[6, 1:4], torch.tensor([2, 2, 4], dtype=torch.int8))  # to even
    assert restored[7, 1] == -torch.inf and restored[7, 2:].isfinite().all()
    assert (restored[7, 2:] - rows[7, 2:]).abs().max() <= rows[7, 2:].abs().max() / 127
    if dtype != torch.float16:  # its denormals are float32's normal numbers
        assert not restored[3].any()


def test_float64_beyond_float32_is_not_overlooked(isa: str) -> None:
    input = torch.tensor([1e41, 1.0], dtype=torch.float64)
    assert dequantize_blocks(*quantize_blocks(input), torch.float64).isnan().all()
    input = torch.tensor([4e40, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        dequantize_blocks(*quantize_blocks(input), torch.float64)[0], input[0], rtol=1e-6, atol=0
    )


def test_threads_fall_on_blocks(threads: int, isa: str) -> None:
    input = torch.randn(100_001)
    with backend("reference"):
        expected = quantize_blocks(input)
        expected_output = dequantize_blocks(*expected, torch.float32)
    with backend("cpp"):
        codes, scales = quantize_blocks(input)
        restored = dequantize_blocks(codes, scales, torch.float32)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert torch.equal(restored, expected_output)


@pytest.mark.parametrize("layout", ("slice", "expanded"))
def test_gaps_and_overlaps_are_refused(layout: str) -> None:
    input = torch.randn(70, 1).expand(70, 3) if layout == "expanded" else laid_out(torch.randn(7, 5), "slice")
    with pytest.raises(
        ValueError, match=r"^input: got shape .*, expected a dense tensor: give input.clone\(\)$"
    ):
        quantize_blocks(input)
    with pytest.raises(RuntimeError, match="expected a dense tensor"):
        torch.ops.trady.quantize_blocks(input)


def test_bad_input_gets_one_sentence() -> None:
    codes, scales = quantize_blocks(torch.randn(70))
    with pytest.raises(ValueError, match=r"^input: got torch.int64, expected float32"):
        quantize_blocks(torch.arange(3))
    with pytest.raises(ValueError, match=r"^scales: got shape \(1,\) of torch.float32, expected \(2,\)"):
        dequantize_blocks(codes, scales[:1], torch.float32)
    with pytest.raises(
        ValueError, match=r"^codes: got shape \(70,\) of torch.float32, expected a contiguous 1-D"
    ):
        dequantize_blocks(codes.float(), scales, torch.float32)
    with pytest.raises(ValueError, match=r"^dtype: got torch.int32, expected float32"):
        dequantize_blocks(codes, scales, torch.int32)
