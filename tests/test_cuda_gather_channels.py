"""``gather_channels`` in CUDA: copies and conversions in one pass over memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CONV_CASES, FLOATING, ConvCase, laid_out
from test_gather_channels import LAYOUTS, PAIRS, SHAPES, Shape
from test_large_offsets import spread

from trady_kernels.ops import backend, gather_channels, last_kernel
from trady_kernels.ops.layout import memory_format_of


def check(input: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Against plain indexing: bit for bit, dense in the input's memory format, in memory of its own."""
    with backend("cuda"):
        output = gather_channels(input, channels.to(input.device), dtype)
    assert last_kernel("gather_channels") == "cuda"
    expected = input.cpu()[:, channels].to(dtype or input.dtype)
    assert output.dtype == expected.dtype and torch.equal(output.cpu(), expected)
    assert output.stride() == torch.empty(output.shape, memory_format=memory_format_of(input)).stride()
    assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr() or output.numel() == 0
    assert output.untyped_storage().nbytes() == output.numel() * output.element_size()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolution_inputs(case: ConvCase, layout: str, cuda_device: str) -> None:
    channels = torch.randperm(case.in_channels)[: case.selected]
    for dtype in FLOATING:
        input = torch.randn(case.batch, case.in_channels, *case.size, dtype=dtype, device=cuda_device)
        check(laid_out(input, layout), channels)
    for source, target in PAIRS:
        input = torch.randn(case.batch, case.in_channels, *case.size, dtype=source, device=cuda_device)
        check(laid_out(input, layout), channels, target)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_conversion(source: torch.dtype, target: torch.dtype, layout: str, cuda_device: str) -> None:
    """Planes of 1, 16, 35 and 1023 pixels; values that overflow and values that get denormal."""
    for shape, channels in (
        ((3, 19, 5, 7), [0, 3, 4, 18]),
        ((2, 20, 33, 31), list(range(0, 20, 3))),
        ((5, 9, 4, 4), [8, 2]),
        ((5, 9, 1, 1), [2]),
        ((0, 9, 2, 2), [2]),
    ):
        scale = torch.randint(-30, 20, shape, dtype=torch.float64).exp2()
        input = (torch.randn(shape, dtype=torch.float64) * scale).to(source)
        check(laid_out(input.to(cuda_device), layout), torch.tensor(channels), target)
    rows = torch.randn(70, 37, device=cuda_device).to(source)
    check(
        laid_out(rows, "slice" if layout.endswith("slice") else "contiguous"), torch.arange(0, 37, 2), target
    )


@pytest.mark.parametrize(("source", "target"), [(a, b) for a, b in PAIRS if a.itemsize == 2], ids=str)
def test_conversion_of_every_value_of_a_half_type(
    source: torch.dtype, target: torch.dtype, cuda_device: str
) -> None:
    input = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)[None, None]
    with backend("cuda"):
        output = gather_channels(input.to(cuda_device), torch.tensor([0], device=cuda_device), target).cpu()
    assert torch.equal(output[~output.isnan()], input.to(target)[~input.isnan()])
    assert torch.equal(output.isnan(), input.isnan())


def test_conversion_of_float32_where_rounding_is_a_tie(cuda_device: str) -> None:
    """Numbers between two neighbours of a half type, to even, and those next to them; of float64 by way of float32."""
    for target in (torch.bfloat16, torch.float16):
        halves = torch.arange(0, 2**15 - 1, 7, dtype=torch.int16).view(target)
        halves = halves[halves.isfinite()].double()
        middle = (halves[1:] + halves[:-1]) / 2
        for source in (torch.float32, torch.float64):
            numbers = torch.cat([middle, middle * (1 + 2**-20), middle * (1 - 2**-20), middle * (1 + 2**-40)])
            check(numbers.to(source).to(cuda_device)[None, None], torch.tensor([0]), target)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_other_ranks(case: Shape, cuda_device: str) -> None:
    for dtype in (*FLOATING, torch.int8, torch.complex128):
        values = torch.randn(case.shape, dtype=torch.float64).mul(10).to(dtype).to(cuda_device)
        check(laid_out(values, case.layout), torch.tensor([0, 3, 5]))


@pytest.mark.parametrize("pixels", (2, 3, 4, 8, 31, 32, 33, 64, 100, 255, 257, 1024, 4100))
def test_planes_of_every_number_of_threads(pixels: int, cuda_device: str) -> None:
    """Several planes a block, whole blocks a plane, planes in pieces; with few and with many of them."""
    for planes in (1, 3, 130):
        input = torch.randn(2, planes + 1, pixels, device=cuda_device)
        channels = torch.randperm(planes + 1)[:planes]
        for dtype in FLOATING:
            check(input.to(dtype), channels)
        check(input, channels, torch.bfloat16)
        check(input.half(), channels, torch.float32)


@pytest.mark.parametrize("offset", (1, 2, 4))
def test_addresses_that_no_vector_is_aligned_to(offset: int, cuda_device: str) -> None:
    for dtype in FLOATING:
        larger = torch.randn(2 * 5 * 64 + offset, device=cuda_device).to(dtype)
        input = larger[offset:].view(2, 5, 8, 8)
        for target in (None, *(other for other in FLOATING if other != dtype)):
            check(input, torch.tensor([4, 0, 1]), target)


@pytest.mark.parametrize(
    ("batch_stride", "channel_stride", "pixels"),
    ((40, 8, 7), (41, 8, 8), (48, 9, 8), (48, 8, 8), (50, 10, 4)),
)
def test_strides_that_no_vector_divides(
    batch_stride: int, channel_stride: int, pixels: int, cuda_device: str
) -> None:
    """One of plane, batch and channel stride at a time, the others whole vectors."""
    for dtype in FLOATING:
        memory = torch.randn(200, device=cuda_device).to(dtype)
        input = memory.as_strided((3, 5, pixels), (batch_stride, channel_stride, 1))
        for target in (None, *(other for other in FLOATING if other != dtype)):
            check(input, torch.tensor([4, 0, 1]), target)


@pytest.mark.parametrize("in_channels", (1, 3, 16, 33, 96, 144, 1000, 2100, 8200))
def test_rows_of_every_width(in_channels: int, cuda_device: str) -> None:
    """Many rows a tile, few, and none; one channel of a row to all of them; tiles that end within a vector or a word."""
    for dtype in (torch.int8, *FLOATING):
        rows = 2 * max(16384 // (in_channels * dtype.itemsize), 1) + 5
        values = torch.randint(-100, 100, (rows, in_channels), device=cuda_device).to(dtype)
        for selected in sorted({1, 2, 5, in_channels // 3, in_channels}):
            if not 1 <= selected <= in_channels:
                continue
            channels = torch.randperm(in_channels)[:selected]
            check(values, channels)
            if dtype != torch.int8:
                check(values, channels, torch.bfloat16)
                check(values[:7], channels, torch.float64)


def test_rows_that_lie_apart_or_at_no_vector(cuda_device: str) -> None:
    for dtype in FLOATING:
        wider = torch.randn(70, 41, device=cuda_device).to(dtype)
        memory = torch.randn(70 * 32 + 1, device=cuda_device).to(dtype)
        for input in (wider[:, 3:35], memory[1:].view(70, 32), wider[::2], wider.expand(3, 70, 41)[:, 4]):
            for target in (None, torch.float16, torch.float32):
                check(input, torch.tensor([31, 0, 7]), target)


def test_planes_of_several_steps_a_thread(cuda_device: str) -> None:
    input = torch.randn(1, 3, 699051, device=cuda_device).half()
    check(input, torch.tensor([2, 0]))
    check(input, torch.tensor([2, 0]), torch.float32)


def test_expanded_batches_and_repeated_channels(cuda_device: str) -> None:
    input = torch.randn(1, 6, 5, 7, device=cuda_device).expand(4, 6, 5, 7)
    for dtype in (None, torch.float16):
        check(input, torch.tensor([1, 4]), dtype)
        check(input, torch.tensor([4, 0, 4]), dtype)
        check(input, torch.arange(6)[::2], dtype)


@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_offsets_past_2_to_the_31(dimension: int, layout: str, cuda_device: str) -> None:
    if cuda_device != "cpu":
        pytest.skip("of such a tensor only the CPU's memory may be left untouched")
    input = spread(laid_out(torch.randn(3, 8, 5, 4), layout), dimension)
    for target in (None, torch.bfloat16):
        check(input, torch.tensor([7, 0]), target)


_OUT_OF_RANGE = """
import sys
import torch
import cuda_on_host
from trady_kernels.ops.backend import OPERATORS

index, layout = int(sys.argv[1]), getattr(torch, sys.argv[2])
device = "cuda" if torch.cuda.is_available() else "cpu"
input = torch.randn(2, 5, 3, 3, device=device).contiguous(memory_format=layout)
operator = OPERATORS["gather_channels"]
if device == "cpu":
    assert not isinstance(cuda_on_host.library(), str)
    cuda_on_host.Kernels().__enter__()
operator.kernels["cuda"](input, torch.tensor([0, index], device=device))
if device == "cuda":
    torch.cuda.synchronize()
print("went on")
"""


@pytest.mark.parametrize(
    ("index", "layout"),
    ((5, "contiguous_format"), (-1, "channels_last"), (5, "channels_last"), (1 << 40, "contiguous_format")),
)
def test_index_out_of_range_ends_in_an_assertion(index: int, layout: str, cuda_device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_RANGE, str(index), layout],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "gather_channels: an index in channels is out of range" in done.stderr


@pytest.mark.parametrize(
    "wrong", (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([0], dtype=torch.int32))
)
def test_bad_channels(wrong: torch.Tensor, cuda_device: str) -> None:
    """Refused before anything is read, though Python looks at arguments only after C++ has."""
    input = torch.randn(2, 5, 3, 4, device=cuda_device)
    with backend("cuda"), pytest.raises(ValueError, match="expected a 1-D int64 tensor"):
        gather_channels(input, wrong.to(cuda_device))
    with backend("cuda"), pytest.raises(ValueError, match="input: got 1 dimensions"):
        gather_channels(input.flatten(), torch.tensor([0], device=cuda_device))
