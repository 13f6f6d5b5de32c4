"""``SparseConv2d`` and ``sparse_conv2d`` against ``nn.Conv2d``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bad_rows import bad_channels_of_two_rows
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

from trady_kernels import SparseConv2d, sparse_conv2d
from trady_kernels.memory import peak_memory


@dataclass(frozen=True)
class Case:
    """A layer, the size of its input and the channels selected."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int | tuple[int, int]
    size: tuple[int, int]
    channels: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 2

    def __str__(self) -> str:
        return self.name

    def dense(self, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, **self.arguments, dtype=dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(self.batch, self.in_channels, *self.size, dtype=dtype)


def padded(mode: str) -> dict[str, Any]:
    return {"padding": (2, 1), "padding_mode": mode}


CASES = (
    Case("1x1", 6, 5, 1, (5, 7), (0, 4)),
    Case("1x1, stride", 6, 5, 1, (6, 7), (0, 4), {"stride": (2, 3)}),
    Case("1x1, padding", 6, 5, 1, (6, 7), (0, 4), {"stride": 2, "padding": (2, 1)}),
    Case("3x3", 6, 5, 3, (7, 5), (1, 2, 5), {"padding": 1}),
    Case("no bias", 6, 5, 3, (7, 5), (1, 2, 5), {"padding": 1, "bias": False}),
    Case(
        "asymmetric", 5, 4, (3, 2), (9, 8), (0, 3), {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 3)}
    ),
    Case("stride leaves a rest", 4, 6, 3, (8, 9), (3,), {"stride": 3, "padding": 1}),
    Case("dilation 2", 4, 6, 3, (9, 8), (0, 1), {"dilation": 2, "padding": 2}),
    Case("groups", 8, 12, 3, (6, 5), (1, 2, 6), {"groups": 4, "padding": 1}),
    Case("depthwise", 6, 6, 3, (6, 7), (0, 5), {"groups": 6, "stride": 2, "padding": 1}),
    Case("depthwise, multiplier 2", 4, 8, 3, (6, 7), (1, 3), {"groups": 4, "padding": 1}),
    Case("valid", 4, 3, 3, (6, 7), (2,), {"padding": "valid"}),
    Case("same", 4, 3, 3, (6, 7), (0, 2), {"padding": "same", "dilation": (1, 2)}),
    Case("same, uneven", 4, 3, (2, 4), (6, 7), (0, 2), {"padding": "same"}),
    Case("same, uneven in one axis", 4, 4, (3, 2), (6, 7), (0, 2), {"padding": "same", "groups": 4}),
    Case("reflect", 4, 3, 3, (6, 7), (0, 3), padded("reflect")),
    Case("replicate", 4, 3, 3, (6, 7), (0, 3), {**padded("replicate"), "stride": 2}),
    Case("circular", 4, 3, 3, (6, 7), (0, 3), padded("circular")),
    Case("circular all around", 4, 3, 3, (3, 2), (0, 3), {"padding": (3, 2), "padding_mode": "circular"}),
    Case(
        "circular, same, uneven", 4, 4, (2, 3), (5, 6), (1,), {"padding": "same", "padding_mode": "circular"}
    ),
    Case(
        "reflect, same, groups",
        4,
        4,
        (2, 4),
        (5, 6),
        (1, 2),
        {"padding": "same", "padding_mode": "reflect", "groups": 2},
    ),
    Case("1x1 map", 4, 3, 3, (1, 1), (0, 3), {"padding": 1}),
    Case("no channel", 4, 3, 3, (6, 7), (), {"padding": 1}),
    Case("no channel, groups", 4, 4, 3, (6, 7), (), {"padding": 1, "groups": 2}),
    Case("all channels", 4, 3, 3, (6, 7), (0, 1, 2, 3), {"padding": 1}),
    Case("all channels, reflect", 4, 3, 3, (6, 7), (0, 1, 2, 3), padded("reflect")),
    Case("one input channel", 1, 3, 3, (6, 7), (0,), {"padding": 1}),
    Case("batch 1", 4, 3, 3, (6, 7), (0, 1), {"padding": 1}, batch=1),
    Case("empty batch", 4, 3, 3, (6, 7), (0, 1), {"padding": 1}, batch=0),
    Case("empty batch, 1x1", 4, 3, 1, (6, 7), (0, 1), batch=0),
    Case("empty batch, 1x1, stride", 4, 3, 1, (6, 7), (), {"stride": 2}, batch=0),
    Case("empty batch, depthwise", 4, 4, 3, (6, 7), (0, 1), {"groups": 4}, batch=0),
)

# torch itself notes that even kernels under 'same' cost a padded copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def compare(dense: nn.Conv2d, sparse: SparseConv2d, input: torch.Tensor, rounding: float) -> None:
    """Output bit-equal, every gradient equal, strides as ``nn.Conv2d``'s."""
    x, x_sparse = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, output_sparse = dense(x), sparse(x_sparse)
    torch.testing.assert_close(output_sparse, output, rtol=0, atol=0)
    assert output_sparse.stride() == output.stride()
    grad_output = torch.randn_like(output)
    dense.zero_grad()
    sparse.zero_grad()
    output.backward(grad_output)
    output_sparse.backward(grad_output)
    assert x.grad is not None and x_sparse.grad is not None and dense.weight.grad is not None
    pairs = [(x_sparse.grad, x.grad)]
    if len(sparse.channels):
        assert sparse.channel_weight.grad is not None
        assert sparse.channel_weight.grad.dtype == sparse.channel_weight.dtype
        pairs.append((sparse.channel_weight.grad, sparse.read_rows(dense.weight.grad, sparse.channels)))
    else:
        assert sparse.channel_weight.grad is None
    if dense.bias is not None and sparse.bias is not None:
        assert sparse.bias.grad is not None and dense.bias.grad is not None
        pairs.append((sparse.bias.grad, dense.bias.grad))
    for actual, expected in pairs:
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * scale)
    assert x_sparse.grad.stride() == x.grad.stride()
    assert sparse.weight.grad is None


LAYOUTS = ("contiguous", "channels_last", "channels_last weight", "slice", "channels_last slice")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense(case: Case, layout: str) -> None:
    dense = case.dense()
    input = case.input()
    if layout.startswith("channels_last"):
        input = input.contiguous(memory_format=torch.channels_last)
    if layout.endswith("slice"):
        outer = input.new_full((case.batch, case.in_channels + 2, *case.size), torch.nan)
        if layout.startswith("channels_last"):
            outer = outer.contiguous(memory_format=torch.channels_last)
        input = outer[:, 1:-1].copy_(input)
    if layout == "channels_last weight":
        dense = dense.to(memory_format=torch.channels_last)
    compare(dense, SparseConv2d.from_dense(dense, case.channels), input, ROUNDING[torch.float64])


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case, memory_format: torch.memory_format) -> None:
    dense = case.dense(torch.float32)
    input = case.input(torch.float32).contiguous(memory_format=memory_format)
    compare(dense, SparseConv2d.from_dense(dense, case.channels), input, ROUNDING[torch.float32])


HALVES = [c for c in CASES if c.name in ("1x1", "1x1, stride", "3x3", "groups", "depthwise", "reflect")]


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_half_types(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    dense = case.dense(dtype)
    input = case.input(dtype).contiguous(memory_format=memory_format)
    compare(dense, SparseConv2d.from_dense(dense, case.channels), input, ROUNDING[dtype])


@pytest.mark.parametrize("backward_inside", (False, True))
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("1x1", "3x3", "depthwise", "circular")], ids=str
)
def test_autocast(case: Case, backward_inside: bool) -> None:
    dense = case.dense(torch.float32)
    sparse = SparseConv2d.from_dense(dense, case.channels)
    x = case.input(torch.float32).requires_grad_()
    x_sparse = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, output_sparse = dense(x), sparse(x_sparse)
    assert output_sparse.dtype == torch.bfloat16 and torch.equal(output, output_sparse)
    grad_output = torch.randn_like(output)
    with torch.autocast("cpu", dtype=torch.bfloat16) if backward_inside else contextlib.nullcontext():
        output.backward(grad_output)
        output_sparse.backward(grad_output)
    assert dense.weight.grad is not None and sparse.channel_weight.grad is not None
    expected = sparse.read_rows(dense.weight.grad, sparse.channels)
    assert sparse.channel_weight.grad.dtype == torch.float32
    bound = ROUNDING[torch.bfloat16]
    torch.testing.assert_close(
        sparse.channel_weight.grad, expected, rtol=0, atol=bound * float(expected.abs().max())
    )
    torch.testing.assert_close(x_sparse.grad, x.grad, rtol=0, atol=bound * float(x.grad.abs().max()))  # type: ignore[union-attr]


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_gradcheck(case: Case) -> None:
    sparse = SparseConv2d.from_dense(case.dense(), case.channels)
    input = case.input()[:1].requires_grad_()
    weight = sparse.weight.detach()

    def layer(input: torch.Tensor, rows: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": weight, "channel_weight": rows}
        parameters |= {"bias": bias[0]} if bias else {}
        return torch.func.functional_call(sparse, parameters, (input,))

    bias = [] if sparse.bias is None else [sparse.bias]
    # a parameter that is not the layer's own is written into a copy of the weight
    inputs = (input, sparse.channel_weight.detach().clone().requires_grad_(), *bias)
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_unbatched(requires_grad: bool) -> None:
    dense = nn.Conv2d(4, 6, 3, padding=1)
    sparse = SparseConv2d.from_dense(dense, [0, 3])
    x = torch.randn(4, 7, 6, requires_grad=requires_grad)
    output = sparse(x)
    torch.testing.assert_close(output, dense(x), rtol=0, atol=0)
    output.sum().backward()
    assert sparse.channel_weight.grad is not None and (x.grad is not None) == requires_grad


SAVED = [
    c for c in CASES if c.name in ("3x3", "same, uneven", "reflect", "no channel", "groups", "depthwise")
]


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_saves_selected_channels_only(case: Case) -> None:
    sparse = SparseConv2d.from_dense(case.dense(), case.channels)
    x = case.input().requires_grad_()
    selected = case.batch * len(case.channels) * case.size[0] * case.size[1] * 8
    assert saved_bytes(sparse, lambda: sparse(x)) == selected
    with torch.no_grad():
        assert saved_bytes(sparse, lambda: sparse(x)) == 0


def test_saves_nothing_where_nothing_needs_grad() -> None:
    sparse = SparseConv2d(4, 4, 3, channels=2)
    sparse.requires_grad_(False)
    x = torch.randn(1, 4, 5, 5)
    assert saved_bytes(sparse, lambda: sparse(x)) == 0 and not sparse(x).requires_grad
    sparse.bias.requires_grad_(True)  # type: ignore[union-attr]
    assert saved_bytes(sparse, lambda: sparse(x)) == 0 and sparse(x).requires_grad
    tensors: list[torch.Tensor] = []
    sparse.channel_weight.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        sparse(x)  # the input needs no gradient: not even a reference to the weight
    assert all(t.data_ptr() != sparse.weight.data_ptr() for t in tensors)


def test_all_channels_save_the_input_itself() -> None:
    sparse = SparseConv2d(4, 4, 3)
    x = torch.randn(2, 4, 5, 5)
    tensors: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        sparse(x)
    assert any(t.data_ptr() == x.data_ptr() for t in tensors)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_all_channels_of_a_part_save_a_copy(memory_format: torch.memory_format) -> None:
    """The input itself would keep what it is a part of."""
    sparse = SparseConv2d(4, 4, 3, channels=[0, 1, 2, 3])
    whole = torch.randn(2, 12, 8, 8).contiguous(memory_format=memory_format)
    part = whole.split(4, 1)[1].requires_grad_()
    assert saved_bytes(sparse, lambda: sparse(part)) == 2 * 4 * 8 * 8 * 4
    sparse(part).sum().backward()
    (expected,) = torch.autograd.grad(
        torch.nn.functional.conv2d(part, sparse.weight.detach().requires_grad_(), sparse.bias).sum(), part
    )
    torch.testing.assert_close(part.grad, expected)


def test_autocast_saves_the_cast_channels_and_no_second_weight() -> None:
    sparse = SparseConv2d(8, 16, 3, channels=2, padding=1)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(sparse, lambda: sparse(x)) == 2 * 2 * 5 * 5 * 2


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("1x1", "3x3", "depthwise")], ids=str)
def test_autocast_around_backward_alone_casts_nothing(case: Case, memory_format: torch.memory_format) -> None:
    sparse = SparseConv2d.from_dense(case.dense(torch.float32), case.channels)
    x = case.input(torch.float32).contiguous(memory_format=memory_format).requires_grad_()
    output = sparse(x)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (grad,) = torch.autograd.grad(output, x, grad_output)
    torch.testing.assert_close(grad, expected)


LARGE = (
    Case("1x1", 64, 48, 1, (32, 32), (1,)),
    Case("1x1, stride", 64, 96, 1, (32, 32), (1,), {"stride": 2}),
    Case("3x3", 16, 16, 3, (64, 64), (1,), {"padding": 1}),
    Case("3x3, stride", 16, 16, 3, (64, 64), (1,), {"padding": 1, "stride": 2}),
    Case("depthwise", 64, 64, 3, (32, 32), (1,), {"padding": 1, "groups": 64}),
    Case("depthwise, stride", 64, 64, 5, (32, 32), (1,), {"padding": 2, "stride": 2, "groups": 64}),
)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_backward_holds_one_full_size_tensor(case: Case) -> None:
    sparse = SparseConv2d.from_dense(case.dense(torch.float32), case.channels)
    # oneDNN itself copies contiguous tensors into its own layout and back, in forward as in backward
    x = case.input(torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = sparse(x)
    grad_output = torch.randn_like(output)
    with peak_memory(x.device) as peak:
        torch.autograd.grad(output, (x, sparse.channel_weight, sparse.bias), grad_output)
    assert (
        peak.bytes < 1.4 * 4 * x.numel()
    )  # the rest: packed weights, a quarter of the pixels under stride 2


def test_a_folded_layer_is_no_dense_one() -> None:
    for arguments in ({"norm": nn.BatchNorm2d(4)}, {"margins": (1, 0, 0, 1)}):
        sparse = SparseConv2d(3, 4, 3, channels=2).fold(**arguments)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=r"^to_dense\(\): got a layer with a folded norm or padding, expected"
        ):
            sparse.to_dense()
        with pytest.raises(ValueError, match=r"^module: got a layer with a folded norm or padding, expected"):
            SparseConv2d.from_dense(sparse)


def test_double_backward_is_refused() -> None:
    sparse = SparseConv2d(4, 4, 3, channels=2)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    for loss in (sparse(x).square().sum(), sparse(x).sum()):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="sparse_conv2d has no double backward"):
            grad.square().sum().backward()


def test_second_derivatives_are_no_zeros() -> None:
    sparse = SparseConv2d(4, 4, 3, channels=2)
    x = torch.randn(1, 4, 5, 5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sparse(x).square().sum()

    with pytest.raises(RuntimeError, match="sparse_conv2d has no double backward"):
        torch.autograd.functional.hessian(loss, x)
    (grad,) = torch.autograd.grad(loss(x), sparse.channel_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_conv2d has no double backward"):
        torch.autograd.grad(grad.sum(), sparse.channel_weight)


def test_vmap_is_refused() -> None:
    sparse = SparseConv2d(4, 4, 3, channels=2)
    with pytest.raises(NotImplementedError, match=r"sparse_conv2d cannot run under torch.vmap"):
        torch.vmap(sparse)(torch.randn(3, 1, 4, 5, 5))


@pytest.mark.parametrize(
    ("input", "error", "words"),
    (
        (torch.ones(2, 5, 6, 6), ValueError, r"input: got shape \(2, 5, 6, 6\), expected \(N, 4, H, W\)"),
        (torch.ones(4, 6), ValueError, r"input: got shape \(4, 6\)"),
        (torch.ones(1, 2, 4, 6, 6), ValueError, r"input: got shape \(1, 2, 4, 6, 6\)"),
        ([[1.0]], TypeError, "input: got list, expected a tensor"),
        (None, TypeError, "input: got NoneType, expected a tensor"),
    ),
)
def test_bad_input(input: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SparseConv2d(4, 4, 3, channels=2)(input)


def test_function_without_module() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    channels = torch.tensor([0, 2])
    rows = weight.transpose(0, 1)[channels].clone().requires_grad_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    dense = weight.clone().requires_grad_()
    grad_output = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    sparse_conv2d(x, weight, None, rows, channels, padding=1).backward(grad_output)
    nn.functional.conv2d(x, dense, padding=1).backward(grad_output)
    torch.testing.assert_close(rows.grad, dense.grad.transpose(0, 1)[channels])  # type: ignore[union-attr]
    assert not sparse_conv2d(x, weight, None, None, channels, padding=1).requires_grad


@bad_channels_of_two_rows
def test_bad_channels_of_the_function(channels: Any, error: type[Exception], words: str) -> None:
    rows = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(error, match=words):
        sparse_conv2d(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), None, rows, channels)
