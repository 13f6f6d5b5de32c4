"""``conv2d_channel_grad``: every kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase
from tolerances import sum_tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from trady_kernels.ops import (
    backend,
    conv2d_channel_grad,
    conv2d_channel_grad_with_bias,
    last_kernel,
)
from trady_kernels.ops.conv2d_channel_grad import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inside_nan(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The same values as a slice of a larger tensor that is NaN everywhere else."""
    n, c, h, w = tensor.shape
    rows = 0 if memory_format is torch.channels_last else 1
    outer = tensor.new_full((n, c + 2, h + 2 * rows, w + 3 * rows), torch.nan)
    outer = outer.contiguous(memory_format=memory_format)
    inner = outer[:, 1:-1, rows : h + rows, rows : w + rows]
    inner.copy_(tensor)
    return inner


LAYOUTS = {
    "contiguous": lambda x, dy: (x, dy),
    "channels_last": lambda x, dy: tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, dy)),
    "mixed": lambda x, dy: (x, dy.contiguous(memory_format=torch.channels_last)),
    "slices": lambda x, dy: tuple(inside_nan(t, torch.contiguous_format) for t in (x, dy)),
    "channels_last slices": lambda x, dy: tuple(inside_nan(t, torch.channels_last) for t in (x, dy)),
    "transposed": lambda x, dy: tuple(t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, dy)),
}


def arguments(case: ConvCase, dtype: torch.dtype, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    # The permutation is left unsorted: the operator promises nothing about the order.
    channels = torch.randperm(case.in_channels, generator=generator)[: case.selected]
    x = torch.randn(case.batch, case.selected, *case.size, generator=generator, dtype=torch.float64)
    dy = torch.randn(case.batch, case.out_channels, *case.out_size, generator=generator, dtype=torch.float64)
    geometry = (case.kernel_size, case.stride, case.padding, case.dilation, case.groups)
    return x.to(dtype), dy.to(dtype), channels, case.in_channels, *geometry


class Exact:
    """The reference in float64 and how far from it a sum in the kernel's precision may be."""

    def __init__(self, case: ConvCase, args: tuple) -> None:
        x, dy, *rest = args
        self.expected = reference(x.double(), dy.double(), *rest)
        length = case.batch * case.out_size[0] * case.out_size[1]
        self.allowed = sum_tolerance(x.dtype, length) * reference(x.double().abs(), dy.double().abs(), *rest)
        self.dtype = torch.promote_types(x.dtype, torch.float32)

    def check(self, actual: torch.Tensor) -> None:
        assert actual.dtype == self.dtype
        assert actual.shape == self.expected.shape
        assert actual.is_contiguous()
        error = (actual.double() - self.expected).abs()
        assert bool((error <= self.allowed).all()), f"{(error / self.allowed).max()} times the tolerance"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_cpp_matches_reference(case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    args = arguments(case, dtype)
    exact = Exact(case, args)
    for layout in LAYOUTS.values():
        with backend("cpp"):
            actual = conv2d_channel_grad(*layout(*args[:2]), *args[2:])
        assert last_kernel("conv2d_channel_grad") == "cpp"
        exact.check(actual)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("stride", (1, 2))
def test_aten_gives_many_results_in_their_order(layout: str, stride: int) -> None:
    case = ConvCase("", 2, 260, 270, (5, 4), 250, kernel_size=(1, 1), stride=(stride, stride))
    args = arguments(case, torch.float32)
    with backend("aten"):
        actual = conv2d_channel_grad(*LAYOUTS[layout](*args[:2]), *args[2:])
    assert last_kernel("conv2d_channel_grad") == "aten"
    Exact(case, args).check(actual)


class Called(TorchDispatchMode):
    """The operators of ATen that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("selected", (1, 4, 40))
@pytest.mark.parametrize("padding", (0, 1))
def test_strided_points_in_channels_last_never_reach_onednn(selected: int, padding: int) -> None:
    """Its strided 1x1 gradient crashes or errs with few channels (oneDNN#6035)."""
    case = ConvCase("", 2, 40, 30, (9, 8), selected, (1, 1), (2, 2), (padding, padding))
    args = arguments(case, torch.float32)
    with backend("aten"), Called() as called:
        actual = conv2d_channel_grad(*LAYOUTS["channels_last"](*args[:2]), *args[2:])
    assert "mm" in called.names and not any("convolution" in name for name in called.names)
    Exact(case, args).check(actual)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_chosen_kernel_matches_reference(case: ConvCase, layout: str) -> None:
    args = arguments(case, torch.float32)
    Exact(case, args).check(conv2d_channel_grad(*LAYOUTS[layout](*args[:2]), *args[2:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.groups == 1 and c.selected], ids=str)
def test_with_bias_matches_reference(case: ConvCase, dtype: torch.dtype, isa: str) -> None:
    args = arguments(case, dtype)
    exact = Exact(case, args)
    dy = args[1].double()
    expected, allowed = dy.sum((0, 2, 3)), dy.abs().sum((0, 2, 3))
    allowed *= sum_tolerance(dtype, dy[:, 0].numel())
    for layout in LAYOUTS.values():
        with backend("cpp"):
            grad, bias = conv2d_channel_grad_with_bias(*layout(*args[:2]), *args[2:])
        assert last_kernel("conv2d_channel_grad_with_bias") == "cpp"
        exact.check(grad)
        assert bias.dtype == exact.dtype and bias.shape == expected.shape and bias.is_contiguous()
        assert bool(((bias.double() - expected).abs() <= allowed).all())


LARGE = (
    ConvCase("1x1", 4, 16, 200, (28, 28), 6, kernel_size=(1, 1)),
    ConvCase("3x3", 4, 16, 70, (30, 31), 3, padding=(1, 1)),
    ConvCase("7x7 map", 8, 16, 300, (7, 7), 12, kernel_size=(1, 1)),
    ConvCase("7x7 map under 3x3", 8, 16, 300, (7, 7), 12, padding=(1, 1)),
    ConvCase("many channels", 4, 100, 150, (30, 31), 100, padding=(1, 1), stride=(2, 2)),
    ConvCase("many channels of a point", 4, 200, 60, (29, 28), 200, kernel_size=(1, 1)),
    ConvCase("depthwise", 4, 32, 32, (56, 56), 2, padding=(1, 1), groups=32),
)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits_do_not_depend_on_threads(
    case: ConvCase, layout: str, dtype: torch.dtype, isa: str, threads: int
) -> None:
    """Every loop: lanes of pixels and of outputs, grad_output turned over, depthwise in both layouts."""
    x, dy, *rest = arguments(case, dtype)
    x, dy = LAYOUTS[layout](x, dy)

    def results() -> list[torch.Tensor]:
        with backend("cpp"):
            found = [conv2d_channel_grad(x, dy, *rest)]
            if case.groups == 1:
                found += conv2d_channel_grad_with_bias(x, dy, *rest)
        return found

    many = results()
    torch.set_num_threads(1)
    one = results()
    Exact(case, (x, dy, *rest)).check(one[0])
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values_beyond_the_map_do_not_reach_the_sum(dtype: torch.dtype, isa: str) -> None:
    """An infinite pixel belongs to the taps that touch it and to no other, at vector tails too."""
    case = ConvCase("3x3", 2, 4, 17, (7, 7), 2, padding=(1, 1))
    for layout in ("contiguous", "channels_last"):
        x, dy, *rest = arguments(case, dtype)
        x[0, 0, 0, 0] = torch.inf
        dy[1, 3, 0, 0] = torch.inf
        expected = reference(x, dy, *rest).isfinite()
        assert 0 < int(expected.sum()) < expected.numel()
        with backend("cpp"):
            actual = conv2d_channel_grad(*LAYOUTS[layout](x, dy), *rest)
        assert torch.equal(actual.isfinite(), expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "slices", "channels_last slices"))
@pytest.mark.parametrize("selected", (1, 5))
@pytest.mark.parametrize("kernel", (3, 5))
def test_an_infinite_pixel_reaches_the_taps_of_a_depthwise_layer_that_meet_it(
    kernel: int, selected: int, layout: str, isa: str
) -> None:
    """With stride 2 half of them do not; vectors of columns have it in lanes past the last one."""
    padding, stride = (kernel // 2,) * 2, (2, 2)
    case = ConvCase("", 2, 6, 6, (9, 38), selected, (kernel, kernel), stride, padding, groups=6)
    x, dy, *rest = arguments(case, torch.float32)
    for column in (0, 33, 37):
        infinite = x.clone()
        infinite[1, 0, 4, column] = torch.inf
        expected = reference(infinite, dy, *rest).isfinite()
        assert 0 < int(expected.sum()) < expected.numel()
        with backend("cpp"):
            actual = conv2d_channel_grad(*LAYOUTS[layout](infinite, dy), *rest)
        assert torch.equal(actual.isfinite(), expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel", (1, 3))
def test_values_of_a_channel_stay_in_it(kernel: int, layout: str, isa: str) -> None:
    """A channel that is NaN, of the input or of grad_output, is NaN in its own results alone: in bfloat16 many
    channels share a matrix tile."""
    case = ConvCase(
        "", 3, 24, 21, (9, 7), 18, kernel_size=(kernel, kernel), padding=(kernel // 2, kernel // 2)
    )
    x, dy, *rest = arguments(case, torch.bfloat16)
    x[:, 3] = torch.nan
    dy[:, 20] = torch.nan
    with backend("cpp"):
        actual, bias = conv2d_channel_grad_with_bias(*LAYOUTS[layout](x, dy), *rest)
    expected = torch.zeros(actual.shape, dtype=torch.bool)
    expected[3] = expected[:, 20] = True
    assert torch.equal(actual.isnan(), expected)
    assert torch.equal(bias.isnan(), expected[0, :, 0, 0])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_matrix_tiles_of_others_stay_as_they_were(layout: str, isa: str) -> None:
    """oneDNN configures a thread's tiles once and then takes them for granted."""
    case = ConvCase("", 4, 40, 40, (14, 14), 40, padding=(1, 1))
    x, dy, *rest = arguments(case, torch.bfloat16)
    x, dy = LAYOUTS[layout](x, dy)
    weight = torch.randn(24, 40, 3, 3).bfloat16()
    rows = torch.randn(70, 50).bfloat16()

    def others() -> list[torch.Tensor]:
        return [torch.nn.functional.conv2d(x, weight), rows @ rows.T]

    def ours() -> torch.Tensor:
        with backend("cpp"):
            return conv2d_channel_grad(x, dy, *rest)

    first, before = ours(), others()
    for _ in range(3):
        assert torch.equal(ours(), first)
        assert all(torch.equal(a, b) for a, b in zip(others(), before, strict=True))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "case",
    (
        ConvCase("one channel", 2, 64, 32, (7, 7), 1, padding=(1, 1)),
        ConvCase("all channels", 2, 64, 32, (7, 7), 64, padding=(1, 1)),
        ConvCase("1x1", 2, 64, 64, (7, 7), 64, kernel_size=(1, 1)),
        ConvCase("1x1, stride 2", 2, 64, 32, (8, 8), 4, kernel_size=(1, 1), stride=(2, 2)),
        ConvCase("depthwise", 2, 24, 24, (9, 9), 24, stride=(2, 2), padding=(1, 1), groups=24),
    ),
    ids=str,
)
def test_shipped_choice_by_shape(case: ConvCase, layout: str) -> None:
    """C++ by the shipped limits, those of whatever instruction set runs, and where oneDNN errs."""
    x, dy, *rest = arguments(case, torch.float32)
    conv2d_channel_grad(*LAYOUTS[layout](x, dy), *rest)
    assert last_kernel("conv2d_channel_grad") == "cpp"
    conv2d_channel_grad(*LAYOUTS[layout](x.bfloat16(), dy.bfloat16()), *rest)
    assert last_kernel("conv2d_channel_grad") == "cpp", "ATen would round the sums to bfloat16"


@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.groups == 1], ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_aten_matches_reference(case: ConvCase, layout: str) -> None:
    """Strided 1x1 layers in channels_last among them, where oneDNN's own kernel crashes."""
    args = arguments(case, torch.float32)
    with backend("aten"):
        actual = conv2d_channel_grad(*LAYOUTS[layout](*args[:2]), *args[2:])
    Exact(case, args).check(actual)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({0: torch.zeros(2, 3, 7)}, "input_selected, grad_output: got 3 and 4 dimensions"),
        ({0: torch.zeros(2, 4, 7, 7)}, r"channels: got shape \(3,\), expected \(4,\)"),
        ({0: torch.zeros(2, 3, 7, 7, dtype=torch.float64)}, "grad_output: got torch.float32"),
        ({0: torch.zeros(2, 3, 8, 7)}, "grad_output: got shape"),
        ({0: torch.zeros(1, 3, 7, 7)}, "grad_output: got shape"),
        ({8: 3}, "groups: got 3, expected a divisor"),
        ({8: 0}, "groups: got 0, expected a divisor"),
        ({4: (0, 3)}, r"kernel_size: got \(0, 3\), expected integers of at least 1"),
        ({5: (1, 0)}, r"stride: got \(1, 0\), expected integers of at least 1"),
        ({6: (-1, 1)}, r"padding: got \(-1, 1\), expected integers of at least 0"),
        ({7: (0, 0)}, r"dilation: got \(0, 0\), expected integers of at least 1"),
    ),
)
def test_bad_arguments_are_named(change: dict[int, object], message: str) -> None:
    args = list(arguments(ConvCase("", 2, 8, 12, (7, 7), 3, padding=(1, 1)), torch.float32))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        conv2d_channel_grad(*args)


def test_with_bias_is_for_dense_layers_with_a_channel() -> None:
    args = list(arguments(ConvCase("", 2, 8, 12, (7, 7), 3, padding=(1, 1), groups=2), torch.float32))
    with pytest.raises(ValueError, match="groups: got 2, expected 1"):
        conv2d_channel_grad_with_bias(*args)
    with pytest.raises(ValueError, match="channels: got none, expected at least one"):
        conv2d_channel_grad_with_bias(args[0][:, :0], args[1], args[2][:0], *args[3:8], 1)


@pytest.mark.parametrize("index", (-1, 8))
def test_index_out_of_range(index: int) -> None:
    args = list(arguments(ConvCase("", 2, 8, 12, (7, 7), 3, padding=(1, 1)), torch.float32))
    args[2] = torch.tensor([0, 1, index])
    with (
        backend("cpp"),
        pytest.raises(RuntimeError, match=f"got index {index}, expected 0 <= index < in_channels = 8"),
    ):
        conv2d_channel_grad(*args)
