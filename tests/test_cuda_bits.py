"""``rectify``, ``rectify_``, ``pack_bits`` and ``scale_by_bits`` in CUDA, bit for bit as their references have it."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATING, laid_out
from corners import awkward, identical
from test_rectify import KINDS, Kind
from test_scale_by_bits import FACTORS

from trady_kernels.ops import backend, last_kernel, pack_bits, rectify, rectify_, scale_by_bits
from trady_kernels.ops.backend import OPERATORS

#: Around bytes of bits, vectors of every dtype, warps and blocks: a block takes 1024 elements of float64 to 8192 of bool.
COUNTS = (0, 1, 7, 8, 9, 64, 65, 331, 1023, 2049, 4100, 8195)
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")
SHAPES = ((2, 5, 3, 7), (1, 3, 1, 1), (3, 1, 4, 5), (0, 3, 2, 2), (4, 6, 17, 23))


def starting_at(offset: int, values: torch.Tensor) -> torch.Tensor:
    """The same values, ``offset`` elements behind an aligned address."""
    larger = values.new_empty(values.numel() + offset)
    return larger[offset:].copy_(values)


def check_rectify(kind: Kind, input: torch.Tensor) -> None:
    arguments = (kind.min, kind.max, kind.slope)
    expected, expected_bits = OPERATORS["rectify"].kernels["reference"](input.cpu(), *arguments)
    before = input.clone()
    with backend("cuda"):
        output, bits = rectify(input, *arguments)
    assert identical(output.cpu(), expected) and identical(input, before), kind
    assert output.stride() == expected.stride()
    assert output.data_ptr() != input.data_ptr() or not output.numel()
    assert torch.equal(bits.cpu(), expected_bits), kind
    with backend("cuda"):
        bits = rectify_(input, *arguments)
    assert identical(input.cpu(), expected) and torch.equal(bits.cpu(), expected_bits), kind


def check_scale(input: torch.Tensor, on: float, off: float | None) -> None:
    bits = torch.randint(256, ((input.numel() + 7) // 8,), dtype=torch.uint8)
    expected = OPERATORS["scale_by_bits"].kernels["reference"](input.cpu(), bits, on, off)
    before = input.clone()
    with backend("cuda"):
        output = scale_by_bits(input, bits.to(input.device), on, off)
    assert identical(output.cpu(), expected) and identical(input, before)
    assert output.stride() == expected.stride()


def check_pack(mask: torch.Tensor) -> None:
    expected = OPERATORS["pack_bits"].kernels["reference"](mask.cpu())
    with backend("cuda"):
        assert torch.equal(pack_bits(mask).cpu(), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rectify_values(kind: Kind, dtype: torch.dtype, cuda_device: str) -> None:
    for count in COUNTS:
        check_rectify(kind, awkward(count, dtype).to(cuda_device))
    assert last_kernel("rectify") == last_kernel("rectify_") == "cuda"


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rectify_of_an_infinite_bound_and_of_crossed_ones(dtype: torch.dtype, cuda_device: str) -> None:
    for kind in (Kind("infinite", 0.0, float("inf")), Kind("crossed", 2.0, -1.0)):
        check_rectify(kind, awkward(331, dtype).to(cuda_device))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rectify_of_every_value_of_a_half_type(dtype: torch.dtype, cuda_device: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    for kind in (*(Kind("leaky", 0.0, slope=slope) for slope in (0.1, 3.3, 1e-4)), KINDS[3]):
        check_rectify(kind, numbers.to(cuda_device).clone())


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_scale_by_bits_values(
    dtype: torch.dtype, factors: tuple[float, float | None], cuda_device: str
) -> None:
    for count in COUNTS:
        check_scale(awkward(count, dtype).to(cuda_device), *factors)
    assert last_kernel("scale_by_bits") == "cuda"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_scale_by_bits_of_every_value_of_a_half_type(dtype: torch.dtype, cuda_device: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    for on, off in ((1 / 0.9, 0.1), (3.3, None)):
        check_scale(numbers.to(cuda_device), on, off)


def test_pack_bits_of_every_byte(cuda_device: str) -> None:
    """A bool is true unless its byte is 0, in each place of a word and whatever its neighbours are."""
    for byte in (0, 1, 127, 128, 255):
        for place in range(4):
            row = torch.full((1027,), byte, dtype=torch.uint8)
            row[place:1024:4] = torch.arange(256)
            with backend("cuda"):
                packed = pack_bits(row.to(cuda_device).view(torch.bool)).cpu()
            assert torch.equal(packed, OPERATORS["pack_bits"].kernels["reference"](row != 0))


def test_pack_bits_values(cuda_device: str) -> None:
    for count in COUNTS:
        check_pack(torch.rand(count, device=cuda_device) < 0.5)
        check_pack(torch.ones(count, dtype=torch.bool, device=cuda_device))
    assert last_kernel("pack_bits") == "cuda"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, cuda_device: str) -> None:
    for shape in SHAPES:
        for dtype in FLOATING:
            values = awkward(torch.Size(shape).numel(), dtype).view(shape).to(cuda_device)
            check_scale(laid_out(values, layout), 2.0, 0.5)
            check_rectify(KINDS[1], laid_out(values, layout))
        check_pack(laid_out(torch.rand(shape, device=cuda_device) < 0.5, layout))


def test_other_orders_of_dimensions(cuda_device: str) -> None:
    values = awkward(60, torch.float32).to(cuda_device).view(3, 4, 5)
    for input in (values.permute(2, 0, 1), values[:, ::2], values[0, 0, 0]):
        check_pack(input > 0)
        check_scale(input, 2.0, None)
        check_rectify(KINDS[4], input)
    expanded = torch.randn(3, 1, 5, device=cuda_device).expand(3, 4, 5)
    check_pack(expanded > 0)
    check_scale(expanded, 2.0, None)


@pytest.mark.parametrize("offset", (1, 2, 3, 8))
def test_addresses_that_no_vector_is_aligned_to(offset: int, cuda_device: str) -> None:
    for count in (5, 331, 4100):
        for dtype in FLOATING:
            values = awkward(count, dtype).to(cuda_device)
            check_scale(starting_at(offset, values), 2.0, 0.5)
            check_rectify(KINDS[1], starting_at(offset, values))
        check_pack(starting_at(offset, torch.rand(count, device=cuda_device) < 0.5))


def test_neighbours_are_left_alone(cuda_device: str) -> None:
    """In place, between two elements of the same memory, and between two rows of it."""
    for dtype in FLOATING:
        whole = torch.randn(7, 331, device=cuda_device).to(dtype)
        for part in (whole.view(-1)[3:1500], whole[2:5, 1:300]):
            expected = whole.clone()
            expected.as_strided(part.shape, part.stride(), part.storage_offset()).relu_()
            with backend("cuda"):
                rectify_(part, 0.0)
            assert torch.equal(whole, expected)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    count = (1 << 31) + 12345
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("needs 10 GiB of GPU memory")
    input = torch.zeros(count, dtype=torch.float16, device="cuda")
    input[-3:] = torch.tensor([1.0, -1.0, 2.0], device="cuda")
    with backend("cuda"):
        bits = rectify_(input, 0.0, None, 0.5)
        assert input[-3:].tolist() == [1.0, -0.5, 2.0]
        assert int(bits.int().sum()) == sum(1 << (count - i) % 8 for i in (1, 3))
        del input
        mask = torch.zeros(count, dtype=torch.bool, device="cuda")
        mask[-2] = True
        assert int(pack_bits(mask).int().sum()) == 1 << (count - 2) % 8


def test_bits_that_are_not_contiguous_are_refused(cuda_device: str) -> None:
    bits = torch.zeros(4, dtype=torch.uint8, device=cuda_device)[::2]
    with (
        backend("cuda"),
        pytest.raises(RuntimeError, match=r"bits: got 2 elements, expected 2 of torch.uint8, contiguous"),
    ):
        scale_by_bits(torch.ones(9, device=cuda_device), bits, 1.0)
