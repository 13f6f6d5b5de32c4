from __future__ import annotations

import pytest
import torch
from cases import FLOATING, laid_out
from corners import awkward, identical

from trady_kernels.ops import backend, last_kernel, pack_bits, scale_by_bits

#: (on, off): ReLU, leaky ReLU, hardsigmoid, dropout, and a negative zero.
FACTORS = ((1.0, None), (1.0, 0.1), (0.1666666716337204, None), (1 / 0.9, 0.0), (2.0, -0.0))


def check(input: torch.Tensor, on: float, off: float | None) -> None:
    mask = torch.empty_like(input, dtype=torch.bool).bernoulli_(0.5)
    output = scale_by_bits(input, pack_bits(mask), on, off)
    exact = input.double()
    # One product in the dtype that ATen computes in, one rounding.
    wide = input if input.dtype is torch.float64 else input.float()
    expected = torch.where(mask, wide * on, torch.zeros_like(wide) if off is None else wide * off).to(
        input.dtype
    )
    assert identical(output, expected)
    assert output.stride() == torch.empty_like(input).stride()
    assert torch.equal(input.double().nan_to_num(), exact.nan_to_num())  # the input is left alone


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values(dtype: torch.dtype, factors: tuple[float, float | None], isa: str) -> None:
    with backend("cpp"):
        for count in (0, 1, 7, 64, 65, 130, 331):
            check(awkward(count, dtype), *factors)
    assert last_kernel("scale_by_bits") == "cpp"


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_reference(factors: tuple[float, float | None]) -> None:
    with backend("reference"):
        for dtype in FLOATING:
            check(awkward(331, dtype), *factors)


@pytest.mark.parametrize("kernel", ("cpp", "reference"))
@pytest.mark.parametrize(
    "layout", ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")
)
def test_layouts(layout: str, kernel: str) -> None:
    with backend(kernel):
        for shape in ((2, 5, 3, 7), (1, 3, 1, 1), (0, 3, 2, 2)):
            check(laid_out(awkward(torch.Size(shape).numel(), torch.float32).view(shape), layout), 2.0, None)
        check(awkward(60, torch.float32).view(3, 4, 5).permute(2, 0, 1), 2.0, 0.5)


def test_large_enough_for_threads(threads: int, isa: str) -> None:
    with backend("cpp"):
        check(torch.randn(300, 1001), 2.0, None)


@pytest.mark.parametrize(
    ("bits", "words"),
    (
        (torch.zeros(1, dtype=torch.uint8), r"bits: got shape \(1,\) of torch.uint8, expected \(2,\)"),
        (
            torch.zeros(2, dtype=torch.bool),
            r"bits: got shape \(2,\) of torch.bool, expected \(2,\) of torch.uint8",
        ),
        (torch.zeros(2, 1, dtype=torch.uint8), r"bits: got shape \(2, 1\)"),
    ),
)
def test_bad_bits(bits: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scale_by_bits(torch.ones(9), bits, 1.0)


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match=r"input: got torch.int32, expected one of torch.float32, "):
        scale_by_bits(torch.ones(9, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8), 1.0)
