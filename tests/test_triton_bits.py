"""``pack_bits``, ``rectify`` and ``scale_by_bits`` in Triton against their references, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATING, laid_out
from corners import awkward, identical
from interpreted import on, round_bfloat16
from test_gather_channels import LAYOUTS
from test_pack_bits import by_hand
from test_rectify import KINDS, Kind
from test_scale_by_bits import FACTORS

from trady_kernels.ops import backend, last_kernel, pack_bits, rectify, rectify_, scale_by_bits
from trady_kernels.ops.pack_bits.reference import pack_bits as pack_reference
from trady_kernels.ops.rectify.reference import rectify as rectify_reference
from trady_kernels.ops.scale_by_bits.reference import scale_by_bits as scale_reference

kernel = pytest.importorskip("trady_kernels.ops.pack_bits.triton_kernel", reason="triton is not installed")


#: What NumPy says of infinities in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_bfloat16(monkeypatch)


BLOCK = 8 * kernel.BYTES
#: Around a byte, and around a program's elements.
COUNTS = (0, 1, 7, 8, 9, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9)
SHAPES = ((2, 5, 3, 7), (1, 3, 1, 1), (3, 1, 4, 5), (2, 16, 13, 11), (0, 3, 2, 2))


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Awkward values in every layout, in another order of dimensions, in no dimension."""
    tensors = [
        laid_out(awkward(torch.Size(shape).numel(), dtype).view(shape), layout)
        for layout in LAYOUTS
        for shape in SHAPES
    ]
    return [*tensors, awkward(60, dtype).view(3, 4, 5).permute(2, 0, 1), torch.tensor(-2.0, dtype=dtype)]


# ---- pack_bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_bits_of_a_row(count: int, triton_device: str) -> None:
    """Of a stretch of memory behind which every bit is set."""
    mask = torch.cat((torch.rand(count) < 0.5, torch.ones(9, dtype=torch.bool)))
    with backend("triton"):
        assert pack_bits(mask.to(triton_device)[:count]).tolist() == by_hand(mask[:count].tolist())
    assert last_kernel("pack_bits") == "triton"


def test_bits_follow_memory(triton_device: str) -> None:
    with backend("triton"):
        for input in inputs(torch.float32):
            mask = torch.empty_strided(input.shape, input.stride(), dtype=torch.bool).copy_(input > 0)
            assert torch.equal(pack_bits(on(triton_device, mask)).cpu(), pack_reference(mask))


# ---- rectify ----------------------------------------------------------------------------------------------


def check_rectify(device: str, kind: Kind, input: torch.Tensor) -> None:
    expected, expected_bits = rectify_reference(input, kind.min, kind.max, kind.slope)
    given = on(device, input)
    with backend("triton"):
        output, bits = rectify(given, kind.min, kind.max, kind.slope)
        overwritten = on(device, input)
        bits_ = rectify_(overwritten, kind.min, kind.max, kind.slope)
    assert last_kernel("rectify") == last_kernel("rectify_") == "triton"
    assert output.stride() == expected.stride() and identical(output.cpu(), expected), kind
    assert torch.equal(bits.cpu(), expected_bits) and torch.equal(bits_.cpu(), expected_bits), kind
    assert overwritten.stride() == input.stride() and identical(overwritten.cpu(), expected)
    assert identical(given.cpu(), input)  # the input is left alone


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rectify_values(kind: Kind, dtype: torch.dtype, triton_device: str) -> None:
    for count in COUNTS:
        check_rectify(triton_device, kind, awkward(count, dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rectify_layouts(dtype: torch.dtype, triton_device: str) -> None:
    for index, input in enumerate(inputs(dtype)):
        check_rectify(triton_device, KINDS[index % len(KINDS)], input)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("slope", (0.1, 3.3, 1e-4))
def test_rectify_every_value_of_a_half_type(slope: float, dtype: torch.dtype, triton_device: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    check_rectify(triton_device, Kind("leaky", 0.0, slope=slope), numbers)


def test_bounds_are_no_float32_in_float64(triton_device: str) -> None:
    """Numbers between 0.1 and what float32 makes of it."""
    low, high = sorted((0.1, torch.tensor(0.1).double().item()))
    between = torch.linspace(low, high, 9, dtype=torch.float64)
    for bound in (low, high):
        check_rectify(triton_device, Kind("one bound", bound), between)
        check_rectify(triton_device, Kind("two bounds", -1.0, bound), between)
        check_rectify(triton_device, Kind("slope", bound, slope=0.1), between)


def test_neighbours_are_left_alone(triton_device: str) -> None:
    """Of stretches that begin anywhere in memory, and of a window."""
    for start, count in ((3, BLOCK), (1, 9), (8, 2 * BLOCK + 3)):
        whole = awkward(start + count + 11, torch.float16)
        expected = whole.clone()
        bits = pack_reference(expected[start : start + count] > 0)
        expected[start : start + count].relu_()
        given = whole.to(triton_device)
        with backend("triton"):
            assert torch.equal(rectify_(given[start : start + count], 0.0, slope=0.0).cpu(), bits)
            rectify_(given[start : start + count], 0.0)
        assert torch.equal(given.cpu().nan_to_num(), expected.nan_to_num())
    whole = torch.randn(7, 9)
    expected = whole.clone()
    expected[2:5, 1:8].relu_()
    given = whole.to(triton_device)
    with backend("triton"):
        rectify_(given[2:5, 1:8], 0.0)
    assert torch.equal(given.cpu(), expected)


# ---- scale_by_bits ----------------------------------------------------------------------------------------


def check_scale(device: str, input: torch.Tensor, on_factor: float, off: float | None) -> None:
    bits = torch.randint(256, ((input.numel() + 7) // 8,), dtype=torch.uint8)
    expected = scale_reference(input, bits, on_factor, off)
    given = on(device, input)
    with backend("triton"):
        output = scale_by_bits(given, bits.to(device), on_factor, off)
    assert last_kernel("scale_by_bits") == "triton"
    assert output.stride() == expected.stride() and identical(output.cpu(), expected)
    assert identical(given.cpu(), input)  # the input is left alone


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_scale_values(dtype: torch.dtype, factors: tuple[float, float | None], triton_device: str) -> None:
    if triton_device == "cpu" and str(factors[1]) == "-0.0":
        pytest.skip("Triton's interpreter makes a constant of -0 one of 0: this test needs a GPU")
    for count in COUNTS:
        check_scale(triton_device, awkward(count, dtype), *factors)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_scale_layouts(dtype: torch.dtype, triton_device: str) -> None:
    for index, input in enumerate(inputs(dtype)):
        check_scale(triton_device, input, *FACTORS[index % 4])


def test_scale_takes_strided_bits(triton_device: str) -> None:
    bits = torch.randint(256, (6,), dtype=torch.uint8)[::2]
    input = torch.randn(20)
    with backend("triton"):
        output = scale_by_bits(input.to(triton_device), on(triton_device, bits), 2.0)
    assert torch.equal(output.cpu(), scale_reference(input, bits, 2.0, None))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_scale_every_value_of_a_half_type(dtype: torch.dtype, triton_device: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    check_scale(triton_device, numbers, 1 / 0.9, 0.3)
