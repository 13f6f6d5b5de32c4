"""``max_pool2d_offsets`` and its backward against ATen's max pooling with indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATING, laid_out

from trady_kernels.ops import backend, last_kernel, max_pool2d_offsets, max_pool2d_offsets_backward
from trady_kernels.ops.layout import memory_format_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class PoolCase:
    name: str
    shape: tuple[int, int, int, int]
    kernel_size: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode


CASES = (
    PoolCase("2x2", (2, 5, 12, 14), (2, 2), (2, 2)),
    PoolCase("2x2, odd", (2, 3, 13, 11), (2, 2), (2, 2)),
    PoolCase("2x2, odd, ceil", (2, 3, 13, 11), (2, 2), (2, 2), ceil_mode=True),
    PoolCase("3x3 stride 2 padded", (2, 5, 17, 19), (3, 3), (2, 2), (1, 1)),
    PoolCase("3x3 stride 2 padded, even", (3, 4, 16, 18), (3, 3), (2, 2), (1, 1)),
    PoolCase("3x3 stride 2", (2, 17, 14, 15), (3, 3), (2, 2), ceil_mode=True),
    PoolCase("3x3 stride 2 padded, wide", (1, 35, 5, 163), (3, 3), (2, 2), (1, 1)),
    PoolCase("3x3 stride 2 padded, wide and odd", (1, 16, 4, 70), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    PoolCase("2x2, wide", (1, 19, 6, 131), (2, 2), (2, 2)),
    PoolCase("3x3 stride 1, wide", (1, 3, 6, 61), (3, 3), (1, 1), (1, 1)),
    PoolCase("3x3 stride 1", (2, 6, 9, 37), (3, 3), (1, 1), (1, 1)),
    PoolCase("5x5 stride 1", (1, 40, 11, 8), (5, 5), (1, 1), (2, 2)),
    PoolCase("stride 3, more than the window", (2, 7, 14, 52), (2, 2), (3, 3)),
    PoolCase("stride 4", (1, 3, 19, 75), (5, 6), (4, 4), (2, 3)),
    PoolCase("stride beyond the input", (2, 3, 3, 4), (2, 2), (9, 9)),
    PoolCase("dilated", (2, 5, 15, 20), (3, 3), (1, 1), (1, 1), (2, 2)),
    PoolCase("dilated, stride 2", (2, 5, 15, 41), (3, 3), (2, 2), (1, 1), (2, 3)),
    PoolCase("dilation as large as the input", (1, 3, 4, 4), (2, 2), (1, 1), (1, 1), (4, 4)),
    PoolCase("all asymmetric", (2, 9, 17, 31), (2, 3), (3, 2), (1, 0), (2, 1), True),
    PoolCase("one row", (2, 5, 1, 40), (1, 3), (1, 2), (0, 1)),
    PoolCase("one column", (2, 5, 40, 1), (3, 1), (2, 1), (1, 0)),
    PoolCase("one element", (2, 20, 1, 1), (1, 1), (1, 1)),
    PoolCase("whole map", (2, 20, 7, 7), (7, 7), (7, 7)),
    PoolCase("one channel", (3, 1, 12, 12), (2, 2), (2, 2)),
    PoolCase("largest window", (1, 3, 20, 21), (16, 16), (3, 2), (8, 8)),
    PoolCase("window of one row", (1, 2, 4, 300), (1, 256), (1, 3), (0, 100)),
    PoolCase("empty batch", (0, 3, 8, 8), (3, 3), (2, 2), (1, 1)),
)
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")


def indices_of(case: PoolCase, offsets: torch.Tensor) -> torch.Tensor:
    """Flat indices into the input's planes, as ATen gives them."""
    height, width = offsets.shape[2:]
    wide = offsets.to(torch.int64)
    row = torch.arange(height)[:, None] * case.stride[0] - case.padding[0]
    column = torch.arange(width) * case.stride[1] - case.padding[1]
    row = row + torch.div(wide, case.kernel_size[1], rounding_mode="floor") * case.dilation[0]
    return row * case.shape[3] + column + wide % case.kernel_size[1] * case.dilation[1]


def check(case: PoolCase, input: torch.Tensor, grad_layout: str | None = None) -> None:
    """Values, winners and gradients bit for bit ATen's, dense in the input's memory format."""
    x = input.detach().requires_grad_()
    expected, indices = F.max_pool2d(x, *case.arguments, return_indices=True)
    with backend("cpp"):
        output, offsets = max_pool2d_offsets(input, *case.arguments)
    assert last_kernel("max_pool2d_offsets") == "cpp"
    assert torch.equal(output.nan_to_num(nan=7), expected.nan_to_num(nan=7))
    assert torch.equal(indices_of(case, offsets), indices)
    memory_format = memory_format_of(input)
    strides = torch.empty(expected.shape, memory_format=memory_format).stride()
    assert output.dtype == input.dtype and output.stride() == strides and offsets.stride() == strides
    assert offsets.untyped_storage().nbytes() == output.numel()

    grad_output = torch.randn(expected.shape).to(input.dtype)
    grad_output = (
        laid_out(grad_output, grad_layout)
        if grad_layout
        else grad_output.contiguous(memory_format=memory_format)
    )
    (grad,) = torch.autograd.grad(expected, x, grad_output)
    with backend("cpp"):
        ours = max_pool2d_offsets_backward(grad_output, offsets, case.shape[2:], *case.arguments[:4])
    assert last_kernel("max_pool2d_offsets_backward") == "cpp"
    assert ours.dtype == grad.dtype and torch.equal(ours, grad)
    expected_strides = torch.empty(grad.shape, memory_format=memory_format_of(offsets)).stride()
    assert ours.stride() == expected_strides


def values(case: PoolCase, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(case.shape).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_aten(case: PoolCase, layout: str) -> None:
    for dtype in FLOATING:
        check(case, laid_out(values(case, dtype), layout))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_instruction_sets(layout: str, isa: str) -> None:
    for case in CASES:
        for dtype in FLOATING:
            check(case, laid_out(values(case, dtype), layout))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ties_nan_and_infinities(case: PoolCase, layout: str, isa: str) -> None:
    """Few distinct values: the first maximum, the last NaN, and -inf of the input before that of the padding."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        for special in (
            (0.0, -0.0, 1.0),
            (-math.inf,),
            (-math.inf, math.nan),
            (math.nan, 2.0, math.inf, -math.inf),
        ):
            x = torch.tensor(special, dtype=dtype)[torch.randint(len(special), case.shape)]
            check(case, laid_out(x, layout))


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_gradients_of_any_layout(layout: str, grad_layout: str) -> None:
    for case in CASES[:6]:
        check(case, laid_out(values(case, torch.float32), layout), grad_layout)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_infinite_gradients_stay_with_their_winners(layout: str) -> None:
    """A NaN or an infinity that a window's loser is masked with would be NaN."""
    case = CASES[3]
    x = laid_out(values(case, torch.float32), layout).requires_grad_()
    expected = F.max_pool2d(x, *case.arguments)
    special = torch.tensor([1.0, math.inf, math.nan])
    grad_output = laid_out(special[torch.randint(3, expected.shape)], layout)
    (grad,) = torch.autograd.grad(expected, x, grad_output)
    _, offsets = max_pool2d_offsets(x.detach(), *case.arguments)
    ours = max_pool2d_offsets_backward(grad_output, offsets, case.shape[2:], *case.arguments[:4])
    torch.testing.assert_close(ours, grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (PoolCase("scattered", (4, 24, 40, 56), (3, 3), (2, 2), (1, 1)), torch.bfloat16),
        (PoolCase("gathered", (4, 24, 40, 56), (3, 3), (2, 2), (1, 1)), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_threads(layout: str, case: PoolCase, dtype: torch.dtype, threads: int, isa: str) -> None:
    check(case, laid_out(values(case, dtype), layout))


def test_reference_means_the_same() -> None:
    for case in CASES:
        for layout in ("contiguous", "channels_last"):
            x = laid_out(values(case, torch.bfloat16), layout)
            grad_output = None
            results = {}
            for name in ("reference", "cpp"):
                with backend(name):
                    output, offsets = max_pool2d_offsets(x, *case.arguments)
                    grad_output = torch.randn_like(output) if grad_output is None else grad_output
                    grad = max_pool2d_offsets_backward(
                        grad_output, offsets, case.shape[2:], *case.arguments[:4]
                    )
                results[name] = (output, offsets, grad)
            for ours, reference in zip(results["cpp"], results["reference"], strict=True):
                assert torch.equal(ours, reference) and ours.stride() == reference.stride()


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (
            {"input": torch.randn(3, 8, 8)},
            r"input: got shape \(3, 8, 8\) of torch.float32, expected \(N, C, H, W\)",
        ),
        ({"input": torch.ones(2, 3, 8, 8, dtype=torch.int32)}, "of torch.int32, expected .* floating dtype"),
        ({"kernel_size": (17, 16)}, r"kernel_size: got \(17, 16\), expected a window of 1 to 256 elements"),
        ({"kernel_size": (0, 2)}, r"kernel_size: got \(0, 2\)"),
        ({"stride": (0, 1)}, r"stride, dilation: got \(0, 1\) and \(1, 1\), expected at least 1"),
        ({"padding": (2, 0)}, "padding: got 2 along dimension 2, expected 0 to 1, half of kernel_size"),
        ({"dilation": (1, 9)}, "input: got size 8 along dimension 3, expected one that holds an element"),
        ({"kernel_size": (2, 12)}, "input: got size 8 along dimension 3"),
    ),
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    good = {
        "input": torch.randn(2, 3, 8, 8),
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
        "ceil_mode": False,
    }
    max_pool2d_offsets(**good)
    with pytest.raises(ValueError, match=words):
        max_pool2d_offsets(**(good | change))


def test_bad_arguments_of_the_backward() -> None:
    grad_output, offsets = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    window = ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1))
    with pytest.raises(ValueError, match=r"grad_output: got shape \(2, 3, 4, 3\) .* expected \(2, 3, 4, 4\)"):
        max_pool2d_offsets_backward(grad_output[..., :3], offsets, *window)
    with pytest.raises(ValueError, match=r"offsets: got torch\.int64, expected torch\.uint8"):
        max_pool2d_offsets_backward(grad_output, offsets.long(), *window)
    with pytest.raises(ValueError, match=r"input_size: got \(9, 12\), expected"):
        max_pool2d_offsets_backward(grad_output, offsets, (9, 12), *window[1:])
