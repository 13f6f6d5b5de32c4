"""``gather_channels`` in Triton against its reference, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import CONV_CASES, FLOATING, ConvCase, laid_out
from corners import identical
from interpreted import on, round_bfloat16
from test_gather_channels import LAYOUTS, PAIRS, SHAPES, Shape

from trady_kernels.ops import backend, gather_channels, last_kernel
from trady_kernels.ops.gather_channels.reference import gather_channels as reference

kernel = pytest.importorskip(
    "trady_kernels.ops.gather_channels.triton_kernel", reason="triton is not installed"
)


#: What NumPy says of infinities in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_bfloat16(monkeypatch)


def check(device: str, input: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Values and strides of the reference, in memory of its own."""
    expected = reference(input, channels, dtype)
    with backend("triton"):
        output = gather_channels(on(device, input), on(device, channels), dtype)
    assert last_kernel("gather_channels") == "triton"
    assert output.dtype == expected.dtype and output.shape == expected.shape
    assert output.stride() == expected.stride()
    assert output.untyped_storage().nbytes() == output.numel() * output.element_size()
    if input.is_complex():
        assert torch.equal(output.cpu(), expected)
    else:
        assert identical(output.cpu(), expected)


def selection(case: ConvCase) -> torch.Tensor:
    return torch.randperm(case.in_channels)[: case.selected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolution_inputs(case: ConvCase, layout: str, triton_device: str) -> None:
    """In float32, and in one pair of dtypes, another for the next case."""
    source, target = PAIRS[(CONV_CASES.index(case) + 3 * LAYOUTS.index(layout)) % len(PAIRS)]
    input = torch.randn(case.batch, case.in_channels, *case.size)
    check(triton_device, laid_out(input, layout), selection(case))
    check(triton_device, laid_out(input.to(source), layout), selection(case), target)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_layouts_in_every_dtype(dtype: torch.dtype, triton_device: str) -> None:
    for layout in LAYOUTS:
        check(triton_device, laid_out(torch.randn(2, 7, 9, 8).to(dtype), layout), torch.tensor([5, 0, 3]))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_conversion(source: torch.dtype, target: torch.dtype, triton_device: str) -> None:
    """Values that overflow and that get denormal, rounded as ATen rounds them."""
    for shape in ((3, 19, 5, 7), (2, 20, 16, 16), (5, 19, 1, 1), (300, 19)):
        scale = torch.randint(-30, 20, shape, dtype=torch.float64).exp2()
        input = (torch.randn(shape, dtype=torch.float64) * scale).to(source)
        check(triton_device, input, torch.tensor([0, 3, 4, 18]), target)
    # In float64, a little over the middle of two numbers of the half types: float32 rounds it to the middle.
    ties = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    check(triton_device, ties.to(source)[None], torch.tensor([0, 1]), target)


@pytest.mark.parametrize(("source", "target"), [(a, b) for a, b in PAIRS if a.itemsize == 2], ids=str)
def test_conversion_of_every_value_of_a_half_type(
    source: torch.dtype, target: torch.dtype, triton_device: str
) -> None:
    input = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)[None, None]
    check(triton_device, input, torch.tensor([0]), target)


def test_a_copy_keeps_every_bit(triton_device: str) -> None:
    """NaN with a payload among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)[None, None]
    for dtype in (torch.bfloat16, torch.float16):
        with backend("triton"):
            output = gather_channels(
                bits.view(dtype).to(triton_device), torch.tensor([0], device=triton_device)
            )
        assert torch.equal(output.cpu().view(torch.int16), bits)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_other_ranks(case: Shape, triton_device: str) -> None:
    """And dtypes that are not floating, of 1 to 16 bytes."""
    for dtype in (*FLOATING, torch.int8, torch.complex64, torch.complex128):
        values = torch.randn(case.shape, dtype=torch.float64).mul(10).to(dtype)
        check(triton_device, laid_out(values, case.layout), torch.tensor([0, 3, 5]))


def test_pixels_in_any_order(triton_device: str) -> None:
    """Three dimensions of pixels that cannot be walked as fewer, four that are copied first, and a step of two."""
    volumes = torch.randn(2, 5, 4, 6, 7)
    channels = torch.tensor([3, 1])
    check(triton_device, volumes.permute(0, 1, 4, 2, 3), channels)
    check(triton_device, volumes.permute(3, 2, 4, 1, 0), channels)
    check(triton_device, volumes[:, :, ::2, ::3, ::2], channels)
    check(triton_device, torch.randn(2, 5, 3, 4, 5, 6)[:, :, ::2, ::3, ::2, ::3], channels)
    check(triton_device, torch.randn(2, 5, 40, 64)[:, :, :, 16:48], channels)
    check(triton_device, torch.randn(1, 6, 5, 7).expand(4, 6, 5, 7), channels)
    check(triton_device, torch.randn(4, 6, 1, 7).expand(4, 6, 5, 7), channels)


def test_selections(triton_device: str) -> None:
    """In the caller's order, repeated, strided, all, more than one tile of them, and none."""
    for layout in ("contiguous", "channels_last"):
        input = laid_out(torch.randn(2, 300, 3, 3), layout)
        for channels in (
            torch.tensor([4, 0, 4]),
            torch.arange(300)[::2],
            torch.randperm(300),
            torch.arange(0),
        ):
            check(triton_device, input, channels)


def test_rows_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    monkeypatch.setattr(kernel, "MOST_NARROW_ROWS", 0)
    for layout in LAYOUTS:
        check(triton_device, laid_out(torch.randn(3, 9, 6, 5), layout), torch.tensor([8, 2]))


def test_the_same_dtype_is_no_conversion(triton_device: str) -> None:
    check(triton_device, torch.arange(24).view(2, 3, 4), torch.tensor([1, 2]), torch.int64)
    check(triton_device, torch.rand(2, 3, 4) < 0.5, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("input", "vector", "inner"),
    (
        (torch.empty(2, 9, 56, 56, dtype=torch.float16), 8, 0),
        (torch.empty(2, 9, 14, 14, dtype=torch.float16), 4, 0),
        (torch.empty(2, 9, 7, 7, dtype=torch.float16), 1, 0),
        (torch.empty(2, 9, 15, 14)[:, :, :14], 1, 0),  # planes do not begin on a multiple
        (torch.empty(2, 9, 16, 14)[:, :, :14], 4, 0),
        (torch.empty(2, 9, 40, 128)[:, :, :, 32:96], 8, 1),
        (torch.empty(2, 9, 64, 64).transpose(2, 3), 1, 1),
        (torch.empty(2, 9, 56, 56).to(memory_format=torch.channels_last), 1, 0),
        (torch.empty(2, 9, 57, 56).to(memory_format=torch.channels_last)[:, :, :56], 1, 1),
    ),
    ids=lambda value: str(tuple(value.stride())) if isinstance(value, torch.Tensor) else str(value),
)
def test_what_is_loaded_together(input: torch.Tensor, vector: int, inner: int) -> None:
    tiles = kernel.tiling(input, 3)
    assert tiles is not None and (tiles.vector, len(tiles.inner)) == (vector, inner)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the assertion of a GPU ends the process: see the next")
@pytest.mark.parametrize("index", [5, -1, 1 << 40])
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 5)], ids=str)
def test_index_out_of_range(shape: tuple[int, ...], index: int, triton_device: str) -> None:
    """By the front's own words: the interpreter takes no notice of assertions."""
    with (
        backend("triton"),
        pytest.raises(IndexError, match=rf"channels: got index {index}, expected 0 <= index < 5"),
    ):
        gather_channels(torch.randn(shape), torch.tensor([0, index]))


@pytest.mark.gpu
@pytest.mark.parametrize("index", [5, -1, 1 << 40])
def test_index_out_of_range_on_a_gpu(index: int) -> None:
    program = (
        "import torch\n"
        "from trady_kernels.ops import backend, gather_channels\n"
        "with backend('triton'):\n"
        f"    gather_channels(torch.randn(2, 5, 3, 3).cuda(), torch.tensor([0, {index}]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "an index in channels is out of range" in done.stdout + done.stderr
