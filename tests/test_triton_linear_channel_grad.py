"""``linear_channel_grad`` in Triton: against the reference in float64, and how a launch is planned."""

from __future__ import annotations

import pytest
import torch
from cases import LINEAR_CASES, LinearCase, laid_out
from interpreted import on, round_bfloat16
from test_linear_channel_grad import arguments, check

from trady_kernels.ops import backend, last_kernel, linear_channel_grad

kernel = pytest.importorskip(
    "trady_kernels.ops.linear_channel_grad.triton_kernel", reason="triton is not installed"
)
sums = pytest.importorskip("trady_kernels.ops.triton_sums", reason="triton is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "slice", "transposed")

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy's, of infinities


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that rounds to bfloat16."""
    round_bfloat16(monkeypatch)


def result(device: str, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """What the Triton kernel returns, on the CPU."""
    with backend("triton"):
        grad = linear_channel_grad(on(device, x), on(device, dy))
    assert last_kernel("linear_channel_grad") == "triton"
    return grad.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_matches_reference(case: LinearCase, dtype: torch.dtype, triton_device: str) -> None:
    for layout in LAYOUTS:
        for selected in case.selected:
            x, dy = (laid_out(tensor, layout) for tensor in arguments(case, selected, dtype))
            check(result(triton_device, x, dy), x, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "outputs"), ((257, 16, 64), (255, 70, 132), (1100, 17, 68)))
def test_tiles(rows: int, features: int, outputs: int, dtype: torch.dtype, triton_device: str) -> None:
    """Full ones and ragged ones, several on each side, vectors or none; several parts."""
    for shape in ((rows,), (1, rows)):
        x, dy = torch.randn(*shape, features).to(dtype), torch.randn(*shape, outputs).to(dtype)
        first = result(triton_device, x, dy)
        check(first, x, dy)
        assert torch.equal(result(triton_device, x, dy), first)


@pytest.mark.parametrize("parts", (1, 3, 5, 9))
def test_parts(parts: int, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and many, and more than the kernel that adds them takes at a time."""
    monkeypatch.setattr(kernel, "split", lambda pixels, block, *_: sums.split(pixels, block, 1, parts))
    monkeypatch.setattr(sums, "FEW_PARTS", (4, 32, 4))
    monkeypatch.setattr(sums, "MANY_PARTS", (8, 16, 8))
    x, dy = torch.randn(1113, 5), torch.randn(1113, 12)
    check(result(triton_device, x, dy), x, dy)


def test_expanded_grad_output(triton_device: str) -> None:
    """The gradient of a mean: one value, at stride 0 everywhere."""
    x, value = torch.randn(3, 20, 5), torch.tensor([[[0.3]]])
    with backend("triton"):
        grad = linear_channel_grad(x.to(triton_device), value.to(triton_device).expand(3, 20, 8))
    check(grad.cpu(), x, value.expand(3, 20, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_a_feature_stay_in_it(dtype: torch.dtype, triton_device: str) -> None:
    x, dy = torch.randn(40, 18).to(dtype), torch.randn(40, 24).to(dtype)
    x[:, 3] = torch.nan
    dy[:, 20] = torch.inf
    expected = torch.ones(18, 24, dtype=torch.bool)
    expected[3] = expected[:, 20] = False
    assert torch.equal(result(triton_device, x, dy).isfinite(), expected)


def test_float64_is_refused(triton_device: str) -> None:
    with pytest.raises(NotImplementedError, match=r"input_selected: got torch\.float64, .* another backend"):
        result(triton_device, torch.ones(3, 2).double(), torch.ones(3, 4).double())


# ---- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "outputs"),
    ((8, 1280, 1000), (1576, 9, 768), (1576, 768, 3072), (4096, 30, 10), (200000, 4, 24)),
)
def test_plan_of_layers(rows: int, features: int, outputs: int, dtype: torch.dtype) -> None:
    x, dy = (torch.empty(rows, size, dtype=dtype, device="meta").t()[None] for size in (features, outputs))
    plan = kernel.product_plan(x, dy, features, "ieee", 132)
    block, parts, length = plan.tile, plan.split.parts, plan.split.pixels
    vector = 16 // dtype.itemsize
    assert plan.along_channels and plan.pixel_vector == 1
    assert plan.output_vector == (vector if outputs % vector == 0 else 1)
    of_input = next(v for v in (8, 4, 1) if v <= vector and features % v == 0)
    assert plan.x_vector == (of_input if plan.output_vector > 1 else 1)
    assert block.rows >= min(features, 64) and plan.row_tiles * block.rows >= features
    assert plan.output_tiles * block.outputs >= outputs
    assert length % block.pixels == 0 and (parts - 1) * length < rows <= parts * length
    programs, wanted = plan.row_tiles * plan.output_tiles * parts, block.programs * 132
    assert parts == 1 or programs <= wanted
    if rows // block.pixels * plan.row_tiles * plan.output_tiles >= 2 * wanted:
        assert programs >= wanted // 2


def test_few_rows_are_one_part() -> None:
    """A second launch that adds parts would take longer than they save."""
    assert [sums.split(rows, 64, 1, 500).parts for rows in (1, 256, 257, 4096)] == [1, 1, 5, 64]


@pytest.mark.parametrize(
    ("outputs", "width"),
    ((10, 32), (24, 32), (40, 64), (64, 64), (96, 128), (144, 64), (160, 128), (2048, 128)),
)
def test_tiles_are_as_wide_as_leaves_few_outputs_idle(outputs: int, width: int) -> None:
    assert kernel.tile(16, outputs, torch.float16, "ieee", True, True).outputs == width


def test_plan_of_planes() -> None:
    """Pixels of a contiguous 1x1 convolution lie next to each other: vectors of both tensors, where maps are whole ones."""
    for pixels, aligned in ((196, True), (49, False)):
        x, dy = (torch.empty(8, size, pixels, device="meta") for size in (5, 64))
        plan = kernel.product_plan(x, dy, 5, "ieee", 132)
        assert not plan.along_channels and plan.x_vector == 1
        assert (plan.pixel_vector, plan.output_vector) == (4 if aligned else 1, 1)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    (
        ((2, 8, 12), (96, 12, 1), True),
        ((2, 8, 12), (96, 12, 2), False),
        ((2, 8, 10), (80, 10, 1), False),
        ((2, 8, 12), (98, 12, 1), False),
        ((1, 8, 12), (98, 12, 1), True),  # no second image
        ((2, 8, 12), (112, 14, 1), False),
        ((2, 8, 12), (0, 0, 1), True),
    ),
)
def test_alignment(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    tensor = torch.empty_strided(shape, strides)
    assert kernel.aligned_to_vectors(tensor, 2) == expected
    shifted = torch.empty(tensor.untyped_storage().nbytes() // 4 + 4)
    assert kernel.aligned_to_vectors(shifted.as_strided(shape, strides, 4), 2) == expected
    assert not kernel.aligned_to_vectors(shifted.as_strided(shape, strides, 2), 2)
