from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import CONV_CASES, FLOATING, ConvCase, laid_out

from trady_kernels.ops import backend, gather_channels, last_kernel
from trady_kernels.ops.layout import memory_format_of


def check(input: torch.Tensor, channels: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Against plain indexing: bit for bit, dense in the input's memory format, in memory of its own."""
    with backend("cpp"):
        output = gather_channels(input, channels, dtype)
    assert last_kernel("gather_channels") == "cpp"
    expected = input[:, channels].to(dtype or input.dtype)
    assert output.dtype == expected.dtype and torch.equal(output, expected)
    assert output.stride() == torch.empty(output.shape, memory_format=memory_format_of(input)).stride()
    assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr() or output.numel() == 0
    assert output.untyped_storage().nbytes() == output.numel() * output.element_size()


LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")


def arguments(case: ConvCase, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    input = torch.randn(case.batch, case.in_channels, *case.size, dtype=dtype)
    return laid_out(input, layout), torch.randperm(case.in_channels)[: case.selected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolution_inputs(case: ConvCase, layout: str) -> None:
    for dtype in FLOATING:
        check(*arguments(case, dtype, layout))


PAIRS = [(source, target) for source in FLOATING for target in FLOATING if source != target]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_conversion(source: torch.dtype, target: torch.dtype, layout: str, isa: str) -> None:
    """In the same pass: planes of 1, 35 and 1023 pixels, rows of features; values that overflow and that get denormal."""
    for shape, channels in (
        ((3, 19, 5, 7), [0, 3, 4, 18]),
        ((2, 20, 33, 31), list(range(0, 20, 3))),
        ((5, 9, 1, 1), [2]),
        ((0, 9, 2, 2), [2]),
    ):
        scale = torch.randint(-30, 20, shape, dtype=torch.float64).exp2()
        input = (torch.randn(shape, dtype=torch.float64) * scale).to(source)
        check(laid_out(input, layout), torch.tensor(channels), target)
    rows = torch.randn(700, 37).to(source)
    check(
        laid_out(rows, "slice" if layout.endswith("slice") else "contiguous"), torch.arange(0, 37, 2), target
    )


@pytest.mark.parametrize(("source", "target"), [(a, b) for a, b in PAIRS if a.itemsize == 2], ids=str)
def test_conversion_of_every_value_of_a_half_type(source: torch.dtype, target: torch.dtype, isa: str) -> None:
    input = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)[None, None]
    with backend("cpp"):
        output = gather_channels(input, torch.tensor([0]), target)
    assert torch.equal(output[~output.isnan()], input.to(target)[~input.isnan()])
    assert torch.equal(output.isnan(), input.isnan())


def test_the_inputs_own_dtype_is_no_conversion() -> None:
    check(torch.arange(24).view(2, 3, 4), torch.tensor([1, 2]), torch.int64)


def test_sorted_channels_are_taken_by_masks(isa: str) -> None:
    """Rows of every width around a mask of sixteen, few and many of them, next to memory that must stay."""
    for in_channels in (15, 16, 17, 33, 64, 100):
        for selected in (in_channels, in_channels - 1, in_channels // 2):
            channels = torch.randperm(in_channels)[:selected].sort().values
            for rows in (1, 2, 37):
                for dtype in FLOATING:
                    input = torch.randn(rows, in_channels).to(dtype)
                    check(input, channels)
                    check(laid_out(input, "slice"), channels)
        check(torch.randn(37, in_channels), torch.randperm(in_channels))


@dataclass(frozen=True)
class Shape:
    name: str
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return self.name


SHAPES = (
    Shape("rows and features", (37, 19), "contiguous"),
    Shape("sliced rows", (37, 19), "slice"),
    Shape("transposed features", (37, 19), "transposed"),
    Shape("sequences", (3, 10, 21), "contiguous"),
    Shape("transposed sequences", (3, 10, 21), "transposed"),
    Shape("volumes", (2, 6, 3, 4, 5), "contiguous"),
    Shape("sliced volumes", (2, 6, 3, 4, 5), "slice"),
    Shape("transposed volumes", (2, 6, 3, 4, 5), "transposed"),
)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_other_ranks(case: Shape, isa: str) -> None:
    for dtype in (*FLOATING, torch.int8, torch.complex128):
        values = torch.randn(case.shape, dtype=torch.float64).mul(10).to(dtype)
        check(laid_out(values, case.layout), torch.tensor([0, 3, 5]))


def test_batch_expanded_from_one() -> None:
    check(torch.randn(1, 6, 5, 7).expand(4, 6, 5, 7), torch.tensor([1, 4]))


def test_order_and_repetition_are_the_callers() -> None:
    check(torch.randn(2, 5, 3, 3), torch.tensor([4, 0, 4]))


def test_channels_may_be_strided() -> None:
    check(torch.randn(2, 9, 3, 3), torch.arange(9)[::2])


def test_large_enough_for_threads(threads: int, isa: str) -> None:
    channels = torch.randperm(64)[:31].sort().values
    for layout in ("contiguous", "channels_last"):
        check(laid_out(torch.randn(5, 64, 33, 31), layout), channels)
    check(torch.randn(5000, 64), channels)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("index", [5, -1, 1 << 40])
def test_index_out_of_range(name: str, index: int) -> None:
    with (
        backend(name),
        pytest.raises(IndexError, match=rf"channels: got index {index}, expected 0 <= index < 5"),
    ):
        gather_channels(torch.randn(2, 5, 3, 3), torch.tensor([0, index]))


def test_bad_arguments() -> None:
    x = torch.randn(2, 5, 3, 3)
    with pytest.raises(ValueError, match="input: got 1 dimensions, expected at least 2"):
        gather_channels(torch.randn(5), torch.tensor([0]))
    with pytest.raises(
        ValueError, match=r"channels: got shape \(1, 1\) of torch.int64, expected a 1-D int64"
    ):
        gather_channels(x, torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"channels: got shape \(1,\) of torch.int32"):
        gather_channels(x, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"dtype: got torch.int32 for an input of torch.float32, expected None or"
    ):
        gather_channels(x, torch.tensor([0]), torch.int32)
    with pytest.raises(ValueError, match=r"dtype: got torch.float32 for an input of torch.int64"):
        gather_channels(x.long(), torch.tensor([0]), torch.float32)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(gather_channels, fullgraph=True, backend="aot_eager")
    x, channels = torch.randn(2, 5, 3, 3), torch.tensor([1, 4])
    assert torch.equal(compiled(x, channels), x[:, channels])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda(layout: str) -> None:
    for case in CONV_CASES:
        for dtype in FLOATING:
            x, channels = (tensor.cuda() for tensor in arguments(case, dtype, layout))
            with backend("cuda"):
                output = gather_channels(x, channels)
                converted = gather_channels(x, channels, torch.float64)
            assert torch.equal(output, x[:, channels]), case
            assert torch.equal(converted, x[:, channels].double()) and converted.dtype == torch.float64, case
            assert output.stride() == torch.empty(output.shape, memory_format=memory_format_of(x)).stride(), (
                case
            )
