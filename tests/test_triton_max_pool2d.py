"""``max_pool2d_offsets`` and its backward in Triton against their references, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATING, laid_out
from corners import identical
from interpreted import on, round_bfloat16
from test_max_pool2d import CASES, LAYOUTS, PoolCase, values

from trady_kernels.ops import backend, last_kernel, max_pool2d_offsets, max_pool2d_offsets_backward
from trady_kernels.ops.max_pool2d.reference import max_pool2d_offsets as reference
from trady_kernels.ops.max_pool2d.reference import max_pool2d_offsets_backward as reference_backward

kernel = pytest.importorskip("trady_kernels.ops.max_pool2d.triton_kernel", reason="triton is not installed")
from trady_kernels.ops.triton_lanes import VECTOR_BYTES, vector_of  # noqa: E402

#: What NumPy says of infinities in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_bfloat16(monkeypatch)


@pytest.fixture
def larger_programs(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """Where they are interpreted: one of many elements takes no longer there than one of few."""
    if triton_device == "cpu":
        monkeypatch.setattr(kernel, "LANES", 4096)


def check(device: str, case: PoolCase, input: torch.Tensor, grad_layout: str) -> None:
    output, offsets = reference(input, *case.arguments)
    grad_output = laid_out(torch.randn(output.shape).to(input.dtype), grad_layout)
    grad = reference_backward(grad_output, offsets, case.shape[2:], *case.arguments[:4])
    with backend("triton"):
        ours, our_offsets = max_pool2d_offsets(on(device, input), *case.arguments)
        our_grad = max_pool2d_offsets_backward(
            on(device, grad_output), our_offsets, case.shape[2:], *case.arguments[:4]
        )
    assert last_kernel("max_pool2d_offsets") == last_kernel("max_pool2d_offsets_backward") == "triton"
    for actual, expected in ((ours, output), (our_offsets, offsets), (our_grad, grad)):
        assert actual.stride() == expected.stride() and identical(actual.cpu(), expected)


@pytest.mark.usefixtures("larger_programs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: PoolCase, layout: str, triton_device: str) -> None:
    """Every dtype and every layout of the gradient in turn."""
    turn = CASES.index(case) + LAYOUTS.index(layout)
    input = laid_out(values(case, FLOATING[turn % len(FLOATING)]), layout)
    check(triton_device, case, input, LAYOUTS[turn % len(LAYOUTS)])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes(dtype: torch.dtype, triton_device: str) -> None:
    for case in CASES[2:4]:  # of more than one program
        for layout in ("contiguous", "channels_last"):
            check(triton_device, case, laid_out(values(case, dtype), layout), layout)


@pytest.mark.usefixtures("larger_programs")
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", (CASES[3], CASES[15], CASES[18]), ids=str)
def test_ties_nan_and_infinities(case: PoolCase, layout: str, triton_device: str) -> None:
    """Few distinct values: the first maximum, the last NaN, and -inf of the input before that of the padding."""
    for dtype in (torch.float32, torch.float16):
        for special in (
            (0.0, -0.0, 1.0),
            (-math.inf,),
            (-math.inf, math.nan),
            (math.nan, 2.0, math.inf, -math.inf),
        ):
            x = torch.tensor(special, dtype=dtype)[torch.randint(len(special), case.shape)]
            check(triton_device, case, laid_out(x, layout), layout)


# How many elements a vector has depends on the type, which of them a window needs on the window: each of both once.
@pytest.mark.usefixtures("larger_programs")
@pytest.mark.parametrize(
    ("window", "dtype"),
    tuple(zip(((3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2)), FLOATING, strict=True)),
    ids=str,
)
def test_vectors_of_channels(
    window: tuple[int, int, int, int], dtype: torch.dtype, triton_device: str
) -> None:
    """Taken where all tensors have them: not of channels or strides that no vector divides, nor across formats."""
    size, stride, padding, dilation = ((number, number) for number in window)
    whole = VECTOR_BYTES // dtype.itemsize
    for channels, layout, grad_layout, vector in (
        (16, "channels_last", "channels_last", whole),
        (16, "channels_last", "contiguous", 1),
        (15, "channels_last", "channels_last", 1),
        (16, "contiguous", "contiguous", 1),
    ):
        case = PoolCase("", (2, channels, 9, 8), size, stride, padding, dilation)
        input = laid_out(values(case, dtype), layout)
        assert vector_of(channels, input, laid_out(torch.empty(2, channels, 2, 3), grad_layout)) == vector
        check(triton_device, case, input, grad_layout)
    wider = torch.randn(2, 9, 8, 33).to(dtype).permute(0, 3, 1, 2)
    for input, vector in ((wider[:, 1:17], 1), (laid_out(wider[:, :32], "channels_last")[:, 16:], whole)):
        case = PoolCase("", (2, 16, 9, 8), size, stride, padding, dilation)
        assert vector_of(16, input) == vector
        check(triton_device, case, input, "channels_last")
    memory = torch.randn(2 * 9 * 8 * 16 + 1).to(dtype)
    unaligned = memory[1:].view(2, 9, 8, 16).permute(0, 3, 1, 2)
    check(
        triton_device,
        PoolCase("", (2, 16, 9, 8), size, stride, padding, dilation),
        unaligned,
        "channels_last",
    )


def test_infinite_gradients_stay_with_their_winners(triton_device: str) -> None:
    """A NaN or an infinity that a window's loser is masked with would be NaN; -0 added to 0 is 0."""
    case = CASES[3]
    _, offsets = reference(values(case, torch.float32), *case.arguments)
    special = torch.tensor([1.0, -0.0, math.inf, math.nan])
    grad_output = special[torch.randint(4, offsets.shape)]
    window = (case.shape[2:], *case.arguments[:4])
    with backend("triton"):
        grad = max_pool2d_offsets_backward(
            on(triton_device, grad_output), on(triton_device, offsets), *window
        )
    assert identical(grad.cpu(), reference_backward(grad_output, offsets, *window))


@pytest.mark.usefixtures("larger_programs")
def test_elements_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    monkeypatch.setattr(kernel, "MOST_NARROW_LANES", 0)
    for layout in LAYOUTS:
        check(triton_device, CASES[3], laid_out(values(CASES[3], torch.float32), layout), layout)
