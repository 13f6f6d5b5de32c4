"""``conv2d_channel_grad`` in Triton: against the reference in float64, and how a launch is planned."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cases import CONV_CASES, ConvCase
from interpreted import on, round_bfloat16
from test_conv2d_channel_grad import LAYOUTS, Exact, arguments
from tolerances import sum_tolerance

from trady_kernels.ops import (
    backend,
    conv2d_channel_grad,
    conv2d_channel_grad_squares,
    conv2d_channel_grad_with_bias,
    last_kernel,
)
from trady_kernels.ops.conv2d_channel_grad import reference

kernel = pytest.importorskip(
    "trady_kernels.ops.conv2d_channel_grad.triton_kernel", reason="triton is not installed"
)
sums = pytest.importorskip("trady_kernels.ops.triton_sums", reason="triton is not installed")

#: Of every case in float32; the half types go through all of them in turn.
FLOAT32 = ("contiguous", "channels_last", "mixed", "slices")
#: Pixels of all channels from which on the interpreter takes seconds: only the first two layouts in float32.
LARGE = 15_000
MULTIPROCESSORS = 132

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy's, of infinities


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that rounds to bfloat16."""
    round_bfloat16(monkeypatch)


def results(
    device: str, layout: str, args: tuple, front: Callable = conv2d_channel_grad
) -> tuple[torch.Tensor, ...]:
    """What the Triton kernel returns, on the CPU."""
    x, dy, channels, *rest = args
    x, dy = (on(device, tensor) for tensor in LAYOUTS[layout](x, dy))
    with backend("triton"):
        found = front(x, dy, channels.to(device), *rest)
    assert last_kernel(front.__name__) == "triton"
    return tuple(tensor.cpu() for tensor in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_matches_reference(case: ConvCase, triton_device: str) -> None:
    args = arguments(case, torch.float32)
    exact = Exact(case, args)
    for layout in FLOAT32 if args[1][:, 0].numel() * case.selected < LARGE else FLOAT32[:2]:
        exact.check(*results(triton_device, layout, args))


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_half_types_match_reference(case: ConvCase, triton_device: str) -> None:
    place = CONV_CASES.index(case)
    for dtype in (torch.float16, torch.bfloat16) if place % 4 == 1 else (torch.float16,):
        args = arguments(case, dtype)
        layout = list(LAYOUTS)[(place + (dtype == torch.bfloat16)) % len(LAYOUTS)]
        Exact(case, args).check(*results(triton_device, layout, args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ("7x7 under 3x3", "no padding", "groups 4, wide", "depthwise", "1x1 stride 2")
)
def test_every_layout(name: str, layout: str, triton_device: str) -> None:
    case = next(case for case in CONV_CASES if case.name == name)
    for dtype in (torch.float32, torch.float16):
        args = arguments(case, dtype)
        Exact(case, args).check(*results(triton_device, layout, args))


@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.groups == 1 and c.selected][::2], ids=str)
def test_with_bias_matches_reference(case: ConvCase, triton_device: str) -> None:
    dtype, layout = (
        (torch.float32, "contiguous") if CONV_CASES.index(case) % 4 else (torch.float16, "channels_last")
    )
    args = arguments(case, dtype)
    dy = args[1].double()
    grad, bias = results(triton_device, layout, args, conv2d_channel_grad_with_bias)
    Exact(case, args).check(grad)
    allowed = dy.abs().sum((0, 2, 3)) * sum_tolerance(dtype, dy[:, 0].numel())
    assert bias.dtype == torch.float32 and bias.shape == (case.out_channels,) and bias.is_contiguous()
    assert bool(((bias.double() - dy.sum((0, 2, 3))).abs() <= allowed).all())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(("selected", "kernel_size"), ((16, 1), (32, 1), (64, 1), (7, 3), (1, 4)))
def test_the_bias_where_rows_fill_a_tile_without_it(
    selected: int, kernel_size: int, layout: str, triton_device: str
) -> None:
    case = ConvCase("", 2, 64, 68, (8, 8), selected, (kernel_size, kernel_size))
    args = arguments(case, torch.float32)
    grad, bias = results(triton_device, layout, args, conv2d_channel_grad_with_bias)
    Exact(case, args).check(grad)
    torch.testing.assert_close(bias, args[1].sum((0, 2, 3)))


@pytest.mark.parametrize("groups", (1, 2, 12))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_parts_are_added_in_one_order(
    layout: str, groups: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts, more than the kernel that adds them takes at a time, and the same bits each time."""
    case = ConvCase("", 4, 12, 24, (13, 12), 5, padding=(1, 1), groups=groups)
    monkeypatch.setattr(sums, "FEW_PIXELS", 16)
    monkeypatch.setattr(sums, "FEW_PARTS", (2, 32, 4))
    monkeypatch.setattr(sums, "MANY_PARTS", (4, 16, 8))
    plan = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda *args: plan(*args[:-1], 100))
    args = arguments(case, torch.float32)
    split = kernel.plan(*LAYOUTS[layout](*args[:2]), 9, groups, False, "ieee", 100).split
    assert split.parts > sums.MANY_PARTS[0]
    first, again = (results(triton_device, layout, args)[0] for _ in range(2))
    Exact(case, args).check(first)
    assert torch.equal(first, again)
    if groups == 1:
        grad, bias = results(triton_device, layout, args, conv2d_channel_grad_with_bias)
        Exact(case, args).check(grad)
        torch.testing.assert_close(bias, args[1].sum((0, 2, 3)))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_values_beyond_the_map_do_not_reach_the_sum(groups: int, layout: str, triton_device: str) -> None:
    """An infinite pixel belongs to the taps that touch it and to no other."""
    case = ConvCase("", 2, 4, 16, (7, 7), 3, padding=(1, 1), groups=groups)
    x, dy, *rest = arguments(case, torch.float32)
    x[0, 0, 0, 0] = torch.inf
    dy[1, 3, 3, 3] = torch.inf
    expected = reference(x, dy, *rest)
    assert 0 < int(expected.isfinite().sum()) < expected.numel()
    (actual,) = results(triton_device, layout, (x, dy, *rest))
    assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_values_of_a_channel_stay_in_it(kernel_size: int, layout: str, triton_device: str) -> None:
    """A channel that is NaN shares tiles with others, and the bias's row with both."""
    padding = (kernel_size // 2,) * 2
    case = ConvCase("", 3, 24, 24, (9, 7), 18, kernel_size=(kernel_size, kernel_size), padding=padding)
    x, dy, *rest = arguments(case, torch.float16)
    x[:, 3] = torch.nan
    dy[:, 20] = torch.nan
    grad, bias = results(triton_device, layout, (x, dy, *rest), conv2d_channel_grad_with_bias)
    expected = torch.zeros(grad.shape, dtype=torch.bool)
    expected[3] = expected[:, 20] = True
    assert torch.equal(grad.isnan(), expected)
    assert torch.equal(bias.isnan(), expected[0, :, 0, 0])


@pytest.mark.parametrize("index", (-1, -5, 8, 2**40))
@pytest.mark.parametrize("groups", (2, 4, 8))
def test_a_group_that_does_not_exist_is_not_read(groups: int, index: int, triton_device: str) -> None:
    args = list(arguments(ConvCase("", 2, 8, 16, (7, 7), 3, padding=(1, 1), groups=groups), torch.float32))
    args[2] = torch.tensor([5, index, 0])
    (actual,) = results(triton_device, "contiguous", tuple(args))
    args[2] = torch.tensor([5, 1, 0])
    expected = reference(*args)
    assert bool(actual[1].isnan().all())
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_points_between_gaps_are_not_copied(
    layout: str, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pixels follow each other at one stride a 1x1 layer is a matrix product, and elsewhere the taps' kernel."""
    products: list[torch.Tensor] = []
    multiply = kernel.multiply

    def noted(x: torch.Tensor, dy: torch.Tensor, *rest: object) -> None:
        products.extend((x, dy))
        multiply(x, dy, *rest)

    monkeypatch.setattr(kernel, "multiply", noted)
    case = ConvCase("", 2, 8, 12, (6, 5), 3, (1, 1))
    args = arguments(case, torch.float32)
    Exact(case, args).check(*results(triton_device, layout, args))
    assert len(products) == (0 if layout in ("slices", "transposed") else 2)
    assert all(tensor._base is not None for tensor in products)


def test_strided_indices(triton_device: str) -> None:
    case = ConvCase("", 2, 8, 16, (7, 7), 3, padding=(1, 1), groups=4)
    x, dy, channels, *rest = arguments(case, torch.float32)
    every_second = torch.stack((channels, torch.full_like(channels, 99)), 1).to(triton_device)[:, 0]
    with backend("triton"):
        actual = conv2d_channel_grad(x.to(triton_device), dy.to(triton_device), every_second, *rest)
    Exact(case, (x, dy, channels, *rest)).check(actual.cpu())


def test_expanded_grad_output(triton_device: str) -> None:
    """The gradient of a mean: one value, at stride 0 everywhere."""
    for kernel_size, groups in (((1, 1), 1), ((3, 3), 1), ((3, 3), 8)):
        case = ConvCase("", 2, 8, 16, (8, 8), 3, kernel_size, groups=groups)
        x, dy, channels, *rest = arguments(case, torch.float32)
        value = torch.tensor([0.3], device=triton_device)
        with backend("triton"):
            actual = conv2d_channel_grad(
                x.to(triton_device),
                value.reshape(1, 1, 1, 1).expand(dy.shape),
                channels.to(triton_device),
                *rest,
            )
        Exact(case, (x, torch.full_like(dy, 0.3), channels, *rest)).check(actual.cpu())


@pytest.mark.parametrize("offset", (1, 2, 4))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_tensors_that_begin_between_vectors(layout: str, offset: int, triton_device: str) -> None:
    case = ConvCase("", 2, 8, 16, (8, 8), 4, (1, 1))
    args = arguments(case, torch.float16)
    x, dy = LAYOUTS[layout](*args[:2])
    memory = torch.full((dy.numel() + offset,), torch.nan, dtype=dy.dtype, device=triton_device)
    moved = torch.as_strided(memory, dy.shape, dy.stride(), offset).copy_(dy)
    with backend("triton"):
        actual = conv2d_channel_grad(on(triton_device, x), moved, args[2].to(triton_device), *args[3:])
    Exact(case, args).check(actual.cpu())


def test_float64_is_refused(triton_device: str) -> None:
    args = arguments(CONV_CASES[0], torch.float64)
    for front in (conv2d_channel_grad, conv2d_channel_grad_with_bias):
        with pytest.raises(
            NotImplementedError, match=r"input_selected: got torch\.float64, .* use another backend"
        ):
            results(triton_device, "contiguous", args, front)


# ---- plans ----------------------------------------------------------------------------------------------

#: Layers of MobileNetV2 and ResNet-50, batch 8 at 224x224, and a tile of rows that holds a few channels of each.
LAYERS = (
    (ConvCase("stem", 8, 3, 32, (224, 224), 3, stride=(2, 2), padding=(1, 1)), 32),
    (ConvCase("3x3", 8, 64, 64, (56, 56), 3, padding=(1, 1)), 32),
    (ConvCase("3x3, small map", 8, 512, 512, (7, 7), 1, padding=(1, 1)), 16),
    (ConvCase("3x3, many channels", 8, 64, 64, (56, 56), 32, padding=(1, 1)), 64),
    (ConvCase("1x1 stride 2", 8, 256, 512, (56, 56), 12, (1, 1), (2, 2)), 16),
    (ConvCase("groups 32", 8, 128, 256, (56, 56), 6, padding=(1, 1), groups=32), 16),
)
DEPTHWISE = (
    ConvCase("large map", 8, 96, 96, (112, 112), 4, stride=(2, 2), padding=(1, 1), groups=96),
    ConvCase("small map", 8, 960, 960, (7, 7), 48, padding=(1, 1), groups=960),
    ConvCase("5x5", 8, 240, 240, (14, 14), 12, (5, 5), (1, 1), (2, 2), (1, 1), 240),
    ConvCase("few pixels", 1, 960, 960, (4, 4), 48, padding=(1, 1), groups=960),
)


def planned(case: ConvCase, layout: str, bias: bool = False) -> kernel.Taps:
    """The launch for tensors in bfloat16 that take no memory."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (
        torch.empty(
            (case.batch, channels, *size), dtype=torch.bfloat16, device="meta", memory_format=memory_format
        )
        for channels, size in ((case.selected, case.size), (case.out_channels, case.out_size))
    )
    taps = case.kernel_size[0] * case.kernel_size[1]
    return kernel.plan(x, dy, taps, case.groups, bias, "ieee", MULTIPROCESSORS)


def check_split(case: ConvCase, plan: kernel.Taps) -> None:
    """Whole blocks that cover every pixel, long enough, and programs for the whole GPU where there is work for it."""
    pixels = case.batch * case.out_size[0] * case.out_size[1]
    parts, length = plan.split.parts, plan.split.pixels
    assert length % plan.block_pixels == 0
    assert (parts - 1) * length < pixels <= parts * length
    programs = kernel.PLANE_PROGRAMS if plan.tile is None else plan.tile.programs
    wanted = programs * MULTIPROCESSORS
    assert parts == 1 or plan.programs * parts <= wanted
    if pixels // plan.block_pixels * plan.programs >= 2 * wanted:
        assert plan.programs * parts >= wanted // 2


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(("case", "rows"), LAYERS, ids=str)
def test_plan_of_layers(case: ConvCase, rows: int, layout: str) -> None:
    plan = planned(case, layout)
    assert plan.tile is not None and plan.tile.rows == rows
    assert plan.along_channels == (layout == "channels_last")
    # A 7x7 map has no whole number of vectors.
    whole = layout == "contiguous" and case.out_size != (7, 7)
    assert (plan.pixel_vector, plan.output_vector) == (4 if whole else 1, 8 if plan.along_channels else 1)
    vectors = plan.along_channels and case.groups == 1
    assert plan.x_vector == (next(v for v in (8, 4, 1) if case.selected % v == 0) if vectors else 1)
    assert plan.sections == (case.selected if case.groups > 1 else 1)
    check_split(case, plan)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_plan_of_depthwise_layers(case: ConvCase, layout: str) -> None:
    plan = planned(case, layout)
    assert plan.tile is None
    few_pixels = case.size == (4, 4)
    assert plan.along_channels == (case.selected >= 8 and (layout == "channels_last" or few_pixels))
    check_split(case, plan)


def test_lanes_along_channels_want_pixels_in_one_row() -> None:
    """Images or rows with gaps between them, and an input whose places 32 bits do not count, go along pixels."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    def along(x: torch.Tensor, dy: torch.Tensor) -> bool:
        return kernel.plan(x, dy, 9, 1, False, "ieee", MULTIPROCESSORS).along_channels

    x = empty(4, 8, 16, 16)
    assert along(x, empty(4, 64, 16, 16))
    assert not along(x, empty(8, 64, 16, 16)[::2]) and not along(x, empty(4, 64, 18, 18)[:, :, :16, :16])
    assert along(x, empty(4, 64, 18, 16)[:1, :, :16]), "of one image rows are enough"
    assert not along(empty(4, 8, 2**14, 2**14), empty(4, 64, 2**14, 2**14))


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    (
        ((3, 8, 5, 7), (), 8),
        ((3, 8, 5, 1), (), 8),
        ((3, 8, 1, 1), (), 8),
        ((1, 8, 1, 1), (), 0),
        ((3, 8, 5, 7), (slice(None), slice(0, 4)), 8),
        ((3, 8, 5, 7), (slice(None), slice(None), slice(0, 4)), None),
        ((3, 8, 5, 7), (slice(None), slice(None), slice(None), slice(0, 4)), None),
        ((4, 8, 5, 7), (slice(None, None, 2),), None),
    ),
)
def test_stride_of_pixels(shape: tuple[int, ...], window: tuple[slice, ...], stride: int | None) -> None:
    assert kernel.stride_of_pixels(torch.empty(shape).to(memory_format=torch.channels_last)[window]) == stride


def test_float32_takes_three_products_where_it_is_not_all_vectors() -> None:
    def precision(selected: int, memory_format: torch.memory_format, asked: str = "ieee") -> str:
        x, dy = (
            torch.empty((4, channels, 16, 16), device="meta", memory_format=memory_format)
            for channels in (selected, 64)
        )
        return kernel.plan(x, dy, 9, 1, False, asked, MULTIPROCESSORS).precision

    assert [precision(k, torch.channels_last) for k in (1, 4, 16)] == ["tf32x3", "ieee", "ieee"]
    assert [precision(k, torch.contiguous_format) for k in (1, 4)] == ["tf32x3", "tf32x3"]
    assert [precision(k, torch.channels_last, "tf32") for k in (1, 4)] == ["tf32", "tf32"]
    assert planned(LAYERS[0][0], "channels_last").precision == "ieee", "of half types every product is exact"


@pytest.mark.parametrize("selected", (1, 2, 5, 8))
def test_channels_come_by_fours(selected: int, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are adjacent, with zeros behind that no result has; one alone does without."""
    seen = []
    plan = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda x, *rest: seen.append(x.shape[1]) or plan(x, *rest))
    case = ConvCase("", 2, 12, 16, (6, 7), selected, padding=(1, 1))
    args = arguments(case, torch.float32)
    expected = {1: 1, 2: 4, 5: 8, 8: 8}[selected]
    for layout, taken in (("channels_last", expected), ("contiguous", selected)):
        grad, bias = results(triton_device, layout, args, conv2d_channel_grad_with_bias)
        Exact(case, args).check(grad)
        torch.testing.assert_close(bias, args[1].sum((0, 2, 3)))
        assert seen.pop() == taken
        (squares,) = results(triton_device, layout, args, conv2d_channel_grad_squares)
        torch.testing.assert_close(squares, grad.square().sum((1, 2, 3)))
        assert seen.pop() == taken


def test_the_bias_is_a_row() -> None:
    case = ConvCase("", 8, 64, 64, (56, 56), 16, (1, 1), (2, 2))
    assert [planned(case, "contiguous", bias).tile.rows for bias in (False, True)] == [16, 32]


def test_too_many_pixels_are_refused() -> None:
    dtype = torch.float32
    sums.check(torch.empty(0, dtype=dtype), sums.MOST_PIXELS)
    with pytest.raises(
        NotImplementedError, match=r"grad_output: got \d+ pixels, .* at most \d+; use another"
    ):
        sums.check(torch.empty(0, dtype=dtype), sums.MOST_PIXELS + 1)


@pytest.mark.parametrize(
    ("switch", "value", "conv", "matmul"),
    (
        ("torch.backends.cudnn.allow_tf32", False, "ieee", "ieee"),
        ("torch.backends.cudnn.allow_tf32", True, "tf32", "ieee"),
        ("torch.backends.cudnn.conv.fp32_precision", "ieee", "ieee", "ieee"),
        ("torch.backends.cuda.matmul.fp32_precision", "tf32", "tf32", "tf32"),
    ),
)
def test_tf32_by_the_switches_of_torch(switch: str, value: object, conv: str, matmul: str) -> None:
    """The old one or the new, without a warning; in a process of its own, for a switch has no way back to its default."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        f"import torch; {switch} = {value!r}\n"
        "from trady_kernels.ops.triton_sums import conv_precision, matmul_precision\n"
        "print(*(f(d) for f in (conv_precision, matmul_precision) for d in (torch.float32, torch.float16)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [conv, "ieee", matmul, "ieee"], done.stderr
