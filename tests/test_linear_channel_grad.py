"""``linear_channel_grad``: every kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATING, LINEAR_CASES, LinearCase, laid_out
from tolerances import sum_tolerance

from trady_kernels.ops import backend, last_kernel, linear_channel_grad
from trady_kernels.ops.linear_channel_grad import reference


def arguments(case: LinearCase, selected: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(*case.leading, selected, dtype=torch.float64)
    dy = torch.randn(*case.leading, case.out_features, dtype=torch.float64)
    return x.to(dtype), dy.to(dtype)


def check(actual: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Within the rounding of the accumulation type, float32 sums for half types too."""
    expected = reference(x.double(), dy.double())
    allowed = sum_tolerance(x.dtype, x[..., 0:1].numel()) * reference(x.double().abs(), dy.double().abs())
    assert actual.dtype == torch.promote_types(x.dtype, torch.float32)
    assert actual.shape == expected.shape and actual.is_contiguous()
    error = (actual.double() - expected).abs()
    assert bool((error <= allowed).all()), f"{(error / allowed).max()} times the tolerance"


@pytest.mark.parametrize("layout", ("contiguous", "slice", "transposed"))
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_cpp_matches_reference(case: LinearCase, layout: str, isa: str) -> None:
    for dtype in FLOATING:
        for selected in case.selected:
            x, dy = (laid_out(tensor, layout) for tensor in arguments(case, selected, dtype))
            with backend("cpp"):
                actual = linear_channel_grad(x, dy)
            assert last_kernel("linear_channel_grad") == "cpp"
            check(actual, x, dy)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_chosen_kernel_matches_reference(case: LinearCase) -> None:
    for dtype in FLOATING:
        for selected in case.selected:
            x, dy = arguments(case, selected, dtype)
            check(linear_channel_grad(x, dy), x, dy)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_choice(dtype: torch.dtype) -> None:
    linear_channel_grad(torch.randn(4, 20, dtype=dtype), torch.randn(4, 3, dtype=dtype))
    assert last_kernel("linear_channel_grad") == "cpp"


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "slice"))
@pytest.mark.parametrize(
    ("rows", "features", "out_features"), ((1500, 50, 300), (17, 101, 70), (1031, 13, 9), (600, 700, 20))
)
def test_packed_blocks(
    rows: int, features: int, out_features: int, layout: str, dtype: torch.dtype, isa: str
) -> None:
    """More features than one pass takes: odd rows, groups and strips, several blocks of rows and of the packed x."""
    x, dy = torch.randn(rows, features).to(dtype), torch.randn(rows, out_features).to(dtype)
    with backend("cpp"):
        check(linear_channel_grad(laid_out(x, layout), laid_out(dy, layout)), x, dy)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("features", (9, 70))
@pytest.mark.parametrize(("rows", "out_features"), ((4000, 40), (300, 1100), (2501, 200)))
def test_bits_do_not_depend_on_threads(
    rows: int, out_features: int, features: int, dtype: torch.dtype
) -> None:
    x, dy = torch.randn(rows, features).to(dtype), torch.randn(rows, out_features).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with backend("cpp"):
                results.append(linear_channel_grad(x, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    check(results[0], x, dy)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_value_of_a_half_type(dtype: torch.dtype, isa: str) -> None:
    """All 65536 patterns, denormals and infinities included, as grad_output of one row: widened exactly.

    The dot products of AVX512_BF16 and AMX take denormals as zero, whatever the CPU is told to do with them.
    """
    dy = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    expected = dy.float()
    if isa in ("avx512_bf16", "avx512_amx") and dtype == torch.bfloat16:
        expected[expected.abs() < torch.finfo(dtype).tiny] = 0
    with backend("cpp"):
        actual = linear_channel_grad(torch.ones(1, 1, dtype=dtype), dy)
    assert torch.equal(actual[~actual.isnan()], expected[~dy.isnan()])
    assert torch.equal(actual.isnan(), dy.isnan())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"grad_output: got shape \(4, 3\), expected \(5, 'out_features'\)"):
        linear_channel_grad(torch.randn(5, 2), torch.randn(4, 3))
    with pytest.raises(
        ValueError, match=r"grad_output: got shape \(3, 2, 5\), expected \(2, 3, 'out_features'\)"
    ):
        linear_channel_grad(torch.randn(2, 3, 2), torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match=r"grad_output: got torch\.float64, expected torch\.float32"):
        linear_channel_grad(torch.randn(5, 2), torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 2-D"):
        linear_channel_grad(torch.randn(5), torch.randn(5))
    with backend("cpp"), pytest.raises(RuntimeError, match="grad_output: got dtype Int, expected float32"):
        linear_channel_grad(torch.ones(5, 2, dtype=torch.int32), torch.ones(5, 3, dtype=torch.int32))
