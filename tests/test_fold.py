"""Batch norm and zero padding folded into ``SparseConv2d``, against the modules apart."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from networks import as_trained
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

from trady_kernels import SparseConv2d, sparse_conv2d
from trady_kernels.functional import FrozenNorm
from trady_kernels.memory import peak_memory
from trady_kernels.nn.norm import FoldedBatchNorm2d, FrozenBatchNorm2d
from trady_kernels.nn.norm_family import FoldedBatchNormAct2d
from trady_kernels.nn.padding import FoldedConstantPad2d, FoldedZeroPad2d
from trady_kernels.ops.backend import is_tracing

Margins = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """Zero padding, a convolution and a norm; the size of the input and the channels selected."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int | tuple[int, int]
    size: tuple[int, int]
    channels: tuple[int, ...]
    margins: Margins | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    affine: bool = True
    norm: bool = True
    batch: int = 2

    def __str__(self) -> str:
        return self.name

    def dense(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """The modules apart, in evaluation mode, with a norm that has been trained, zeros in it included."""
        padding = nn.Identity() if self.margins is None else nn.ZeroPad2d(self.margins)
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, **self.arguments, dtype=dtype)
        norm = nn.BatchNorm2d(self.out_channels, eps=1e-3, affine=self.affine, dtype=dtype)
        model = as_trained(nn.Sequential(padding, conv, norm if self.norm else nn.Identity()))
        if self.affine and self.norm:
            with torch.no_grad():
                norm.weight[::3] *= -1
                norm.weight[1] = 0
        return model.eval()

    def input(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(self.batch, self.in_channels, *self.size, dtype=dtype)


def fold(dense: nn.Sequential, channels: tuple[int, ...], norm_bias: bool = False) -> nn.Sequential:
    """A copy of the modules whose convolution does it all, by class swaps in place; the norm's bias may train."""
    folded = copy.deepcopy(dense)
    padding, conv, norm = folded
    SparseConv2d.take_over(conv, channels)
    assert isinstance(conv, SparseConv2d)
    if isinstance(norm, nn.BatchNorm2d):
        norm.requires_grad_(False).__class__ = FoldedBatchNorm2d
        if norm.affine:
            norm.bias.requires_grad_(norm_bias)
        conv.fold(norm=norm)
    if isinstance(padding, nn.ZeroPad2d):
        padding.__class__ = FoldedZeroPad2d
        conv.fold(margins=padding.padding)
    return folded


CASES = (
    Case("1x1", 6, 5, 1, (5, 7), (0, 4), None, {"bias": False}),
    Case("1x1, stride", 6, 5, 1, (6, 7), (0, 4), None, {"stride": (2, 3)}),
    Case("1x1 in margins", 6, 5, 1, (5, 7), (0, 4), (1, 1, 2, 2)),
    Case("3x3", 6, 5, 3, (7, 5), (1, 2, 5), None, {"padding": 1}),
    Case("no affine", 6, 5, 3, (7, 5), (1, 2, 5), None, {"padding": 1}, affine=False),
    Case("stride 2, as TensorFlow pads", 5, 4, 3, (8, 6), (1, 2), (0, 1, 0, 1), {"stride": 2, "bias": False}),
    Case(
        "margins before padding", 5, 4, (3, 2), (9, 8), (0, 3), (2, 0, 0, 1), {"padding": (0, 1), "stride": 2}
    ),
    Case("margins alone", 4, 3, 3, (5, 6), (0, 2), (1, 1, 2, 2), norm=False),
    Case("margins wider than the kernel", 4, 3, 2, (3, 4), (0, 2), (3, 4, 5, 3), {"dilation": (1, 2)}),
    Case("margins and same", 4, 3, (2, 3), (5, 6), (0, 2), (1, 0, 0, 2), {"padding": "same"}),
    Case("margins and valid", 4, 3, 3, (5, 6), (0, 2), (1, 0, 1, 0), {"padding": "valid"}),
    Case("margins, reflect of nothing", 4, 3, 3, (5, 6), (0, 2), (1, 0, 1, 1), {"padding_mode": "reflect"}),
    Case("dilation", 4, 6, 3, (9, 8), (0, 1), (2, 1, 2, 2), {"dilation": 2}),
    Case("groups", 8, 12, 3, (6, 5), (1, 2, 6), (0, 1, 0, 1), {"groups": 4, "padding": 1}),
    Case("depthwise", 6, 6, 3, (6, 7), (0, 5), (0, 1, 0, 1), {"groups": 6, "stride": 2}),
    Case("depthwise, multiplier 2", 4, 8, 3, (6, 7), (1, 3), None, {"groups": 4, "padding": 1}),
    Case("reflect", 4, 3, 3, (6, 7), (0, 3), None, {"padding": (2, 1), "padding_mode": "reflect"}),
    Case("no channel", 4, 3, 3, (6, 7), (), (1, 0, 0, 0), {"padding": 1}),
    Case("all channels", 4, 6, 3, (6, 7), (0, 1, 2, 3), (1, 0, 0, 0), {"padding": 1, "groups": 2}),
    Case("empty batch", 4, 3, 3, (6, 7), (0, 1), (0, 1, 0, 1), batch=0),
)
BY_NAME = {case.name: case for case in CASES}
USUAL = BY_NAME["margins before padding"]

# torch itself notes that even kernels under 'same' cost a padded copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def assert_near(actual: torch.Tensor | None, expected: torch.Tensor | None, rounding: float) -> None:
    assert actual is not None and expected is not None
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * scale, check_dtype=False)


def compare(dense: nn.Sequential, folded: nn.Sequential, input: torch.Tensor, rounding: float) -> None:
    """Output and all gradients, and that nothing but rows, bias and a norm's bias that trains gets one."""
    x, x_folded = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, output_folded = dense(x), folded(x_folded)
    assert output_folded.dtype == output.dtype and output_folded.stride() == output.stride()
    assert_near(output_folded, output, rounding)
    grad_output = torch.randn_like(output)
    dense.zero_grad()
    folded.zero_grad()
    output.backward(grad_output)
    output_folded.backward(grad_output)
    assert_near(x_folded.grad, x.grad, rounding)
    conv, sparse = dense[1], folded[1]
    assert isinstance(sparse, SparseConv2d) and sparse.weight.grad is None
    if len(sparse.channels):
        assert conv.weight.grad is not None
        assert_near(sparse.channel_weight.grad, sparse.read_rows(conv.weight.grad, sparse.channels), rounding)
    if sparse.bias is not None:
        assert_near(sparse.bias.grad, conv.bias.grad, rounding)
    for parameter, expected in zip(folded[2].parameters(), dense[2].parameters(), strict=True):
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            assert_near(parameter.grad, expected.grad, rounding)


@pytest.fixture(params=("weight", "weight, bias apart", "output"))
def scaled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test with the norm going over the weight, as on a CPU and as on a GPU, and over the output."""
    functions = "trady_kernels.functional.conv2d"
    monkeypatch.setattr(f"{functions}._scales_output", lambda *_: request.param == "output")
    apart = request.param == "weight, bias apart"
    monkeypatch.setattr(f"{functions}._adds_bias_apart", lambda _: apart and not is_tracing())


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("norm_bias", (False, True), ids=("", "norm bias"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_modules_apart(case: Case, memory_format: torch.memory_format, norm_bias: bool) -> None:
    dense = case.dense()
    folded = fold(dense, case.channels, norm_bias).train()
    compare(dense, folded, case.input().contiguous(memory_format=memory_format), 1e-12)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case, memory_format: torch.memory_format) -> None:
    dense = case.dense(torch.float32)
    input = case.input(torch.float32).contiguous(memory_format=memory_format)
    compare(dense, fold(dense, case.channels, norm_bias=True), input, ROUNDING[torch.float32])


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", ("3x3", "no affine", "depthwise", "1x1, stride"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_weights_with_float32_statistics(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    dense = case.dense(torch.float32)
    dense[1].to(dtype)
    folded = fold(dense, case.channels)
    exact = copy.deepcopy(dense).double()  # of the rounded weights
    input = case.input(dtype)
    x, x_folded = input.double().requires_grad_(), input.clone().requires_grad_()
    output, output_folded = exact(x), folded(x_folded)
    assert output_folded.dtype == dtype
    # every weight is rounded once more, in the forward as in the backward
    rounding = 2 * ROUNDING[dtype]
    assert_near(output_folded, output, rounding)
    grad_output = torch.randn_like(output_folded)
    output.backward(grad_output.double())
    output_folded.backward(grad_output)
    assert_near(x_folded.grad, x.grad, rounding)
    sparse = folded[1]
    assert sparse.channel_weight.grad.dtype == dtype
    assert_near(sparse.channel_weight.grad, sparse.read_rows(exact[1].weight.grad, sparse.channels), rounding)
    if sparse.bias is not None:
        assert_near(sparse.bias.grad, exact[1].bias.grad, rounding)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", ("3x3", "depthwise", "1x1", "margins before padding"))
def test_autocast(name: str) -> None:
    case = BY_NAME[name]
    dense = case.dense(torch.float32)
    folded = fold(dense, case.channels, norm_bias=True)
    x_folded = case.input(torch.float32).requires_grad_()
    exact = copy.deepcopy(dense).double()
    x_exact = x_folded.detach().double().requires_grad_()
    output = exact(x_exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output_folded = folded(x_folded)
        channels = len(case.channels) * case.batch * case.size[0] * case.size[1]
        assert saved_bytes(folded, lambda: folded(x_folded)) == 2 * channels
    assert output_folded.dtype == torch.bfloat16
    grad_output = torch.randn_like(output_folded)
    output.backward(grad_output.double())
    output_folded.backward(grad_output)
    rounding = 2 * ROUNDING[torch.bfloat16]
    assert_near(output_folded, output, rounding)
    assert x_folded.grad is not None and x_folded.grad.dtype == torch.float32
    assert_near(x_folded.grad, x_exact.grad, rounding)
    sparse = folded[1]
    assert sparse.channel_weight.grad.dtype == torch.float32
    assert_near(sparse.channel_weight.grad, sparse.read_rows(exact[1].weight.grad, sparse.channels), rounding)
    norm = folded[2]
    if norm.affine:  # a plain sum, of the same values and in float32
        assert norm.bias.grad.dtype == torch.float32
        expected = grad_output.double().sum((0, 2, 3))
        assert_near(norm.bias.grad, expected, case.batch * 8 * ROUNDING[torch.float32])


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("norm_bias", (False, True), ids=("", "norm bias"))
@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_keeps_selected_channels_and_references(case: Case, norm_bias: bool) -> None:
    folded = fold(case.dense(), case.channels, norm_bias)
    x = case.input().requires_grad_()
    selected = case.batch * len(case.channels) * case.size[0] * case.size[1] * 8  # without margins
    assert saved_bytes(folded, lambda: folded(x)) == selected
    with torch.no_grad():
        assert saved_bytes(folded, lambda: folded(x)) == 0


def test_two_forwards_before_one_backward() -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    inputs = [USUAL.input() for _ in range(2)]
    for model in (dense, folded):
        (model(inputs[0]).square().sum() + model(inputs[1]).sin().sum()).backward()
    expected = folded[1].read_rows(dense[1].weight.grad, folded[1].channels)
    assert_near(folded[1].channel_weight.grad, expected, 1e-12)


def test_changed_statistics_between_forward_and_backward_are_noticed() -> None:
    folded = fold(USUAL.dense(), USUAL.channels)
    output = folded(USUAL.input())
    folded[2].running_var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_state_dict_is_the_dense_one() -> None:
    dense, other = USUAL.dense(), USUAL.dense()
    folded = fold(dense, USUAL.channels)
    assert list(folded.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in dense.named_modules()]
    for name, value in dense.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value)
    folded.load_state_dict(other.state_dict())
    compare(other, folded, USUAL.input(), 1e-12)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "deepcopy twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("copied", COPIES)
def test_copies_fold_their_own_norm(copied: str) -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    twin: Any = COPIES[copied](folded)
    assert twin[1].folded_norm is twin[2] and twin[2] is not folded[2]
    x = USUAL.input()
    before = folded(x)
    with torch.no_grad():
        twin[2].running_mean.add_(1)
        twin[2].weight.mul_(3)
    assert torch.equal(folded(x), before)
    dense.load_state_dict(twin.state_dict())
    compare(dense, twin, x, 1e-12)


def test_moves_with_the_network() -> None:
    dense = USUAL.dense(torch.float32)
    folded = fold(dense, USUAL.channels)
    compare(dense.double(), folded.double(), USUAL.input(), 1e-12)
    compare(
        dense.to(memory_format=torch.channels_last),
        folded.to(memory_format=torch.channels_last),
        USUAL.input(),
        1e-12,
    )


def test_averaged_model() -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    average = torch.optim.swa_utils.AveragedModel(folded)
    average.update_parameters(folded)
    folded.load_state_dict(USUAL.dense().state_dict())
    average.update_parameters(folded)
    dense.load_state_dict(average.module.state_dict())
    x = USUAL.input()
    assert_near(average(x), dense(x), 1e-12)


def test_functional_call_of_the_network() -> None:
    dense, other = USUAL.dense(), USUAL.dense()
    folded = fold(dense, USUAL.channels)
    x = USUAL.input()
    state = {
        name: value.detach()
        for name, value in other.state_dict().items()
        if name.startswith("2.") and value.is_floating_point()
    }
    expected = torch.func.functional_call(dense, state, (x,))
    assert_near(torch.func.functional_call(folded, state, (x,)), expected, 1e-12)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("case", [BY_NAME["no channel"], BY_NAME["depthwise"], USUAL], ids=str)
def test_biases_train_alone_and_keep_nothing(case: Case, memory_format: torch.memory_format) -> None:
    dense = case.dense()
    folded = fold(dense, (), norm_bias=True)
    x = case.input().contiguous(memory_format=memory_format)  # needs no gradient
    assert saved_bytes(folded, lambda: folded(x)) == 0
    for trained in ("1.bias", "2.bias"), ("2.bias",), ("1.bias",):
        for name, parameter in folded.named_parameters():
            parameter.requires_grad_(name in trained)
        folded.zero_grad()
        dense.zero_grad()
        output, expected = folded(x), dense(x)
        assert_near(output, expected, 1e-12)
        grad_output = torch.randn_like(expected)
        expected.backward(grad_output)
        if folded[1].bias is None and trained == ("1.bias",):
            assert not output.requires_grad
            continue
        output.backward(grad_output)
        gradients = dict(dense.named_parameters())
        for name, parameter in folded.named_parameters():
            assert (parameter.grad is not None) == (name in trained)
            if name in trained:
                assert_near(parameter.grad, gradients[name].grad, 1e-12)


def test_a_norms_bias_through_checkpoint_and_gradcheck() -> None:
    folded = fold(BY_NAME["3x3"].dense(), (1, 4), norm_bias=True)
    conv, norm = folded[1:]
    x = BY_NAME["3x3"].input().requires_grad_()
    wanted = (x, norm.bias, conv.bias)
    plain = torch.autograd.grad(folded(x).square().sum(), wanted)
    output = torch.utils.checkpoint.checkpoint(folded, x, use_reentrant=False)
    for gradient, expected in zip(torch.autograd.grad(output.square().sum(), wanted), plain, strict=True):
        assert torch.equal(gradient, expected)
    assert torch.autograd.gradcheck(lambda *_: folded(x), wanted)


def test_a_norms_bias_is_read_at_every_forward() -> None:
    folded = fold(USUAL.dense(), (), norm_bias=True)
    optimizer = torch.optim.SGD([folded[2].bias], lr=0.5)
    x = USUAL.input()
    before = folded(x)
    before.sum().backward()
    optimizer.step()
    pixels = before.shape[0] * before.shape[2] * before.shape[3]
    assert_near(folded(x), before - 0.5 * pixels, 1e-12)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("names", (("weight",), ("weight", "bias")), ids=str)
def test_norm_whose_weight_trains_again_is_not_folded(names: tuple[str, ...]) -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    for name in names:
        getattr(folded[2], name).requires_grad_(True)
    x, x_folded = (USUAL.input().requires_grad_() for _ in range(2))
    x_folded.data.copy_(x)
    output, output_folded = dense(x), folded(x_folded)
    assert_near(output_folded, output, 1e-12)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    output_folded.backward(grad_output)
    assert_near(x_folded.grad, x.grad, 1e-12)
    assert_near(
        folded[1].channel_weight.grad, folded[1].read_rows(dense[1].weight.grad, folded[1].channels), 1e-12
    )
    for name in ("weight", "bias"):
        gradient = getattr(folded[2], name).grad
        assert (gradient is not None) == (name in names)
        if name in names:
            assert_near(gradient, getattr(dense[2], name).grad, 1e-12)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", ("3x3", "margins before padding", "depthwise", "no affine"))
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    case = BY_NAME[name]
    dense = case.dense()
    folded = fold(dense, case.channels, norm_bias=True)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, x_compiled = (case.input().requires_grad_() for _ in range(2))
        x_compiled.data.copy_(x)
        folded.zero_grad()
        dense.zero_grad()
        output, output_compiled = dense(x), compiled(x_compiled)
        assert_near(output_compiled, output, 1e-12)
        output.square().sum().backward()
        output_compiled.square().sum().backward()
        assert_near(x_compiled.grad, x.grad, 1e-12)
        rows = folded[1].read_rows(dense[1].weight.grad, folded[1].channels)
        assert_near(folded[1].channel_weight.grad, rows, 1e-12)
        if case.affine:
            assert_near(folded[2].bias.grad, dense[2].bias.grad, 1e-12)
        state = case.dense().state_dict()  # the graph reads the norm that is there now
        dense.load_state_dict(state)
        folded.load_state_dict(state)
    torch._dynamo.reset()


def test_traces() -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    traced = torch.fx.symbolic_trace(folded)
    compare(dense, folded, USUAL.input(), 1e-12)
    x = USUAL.input()
    assert_near(traced(x), dense(x), 1e-12)


def test_unfold_and_hand_back() -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    conv = folded[1]
    assert isinstance(conv, SparseConv2d) and conv.is_folded
    assert "folded_margins=(2, 0, 0, 1)" in str(conv) and "folded_norm=(eps=0.001)" in str(conv)
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    assert conv.unfold() is conv and not conv.is_folded
    assert torch.equal(conv(x), dense[1](x)) and "folded" not in str(conv)
    assert torch.equal(conv.to_dense()(x), dense[1](x))
    assert torch.equal(SparseConv2d.from_dense(conv)(x), dense[1](x))
    conv.fold(folded[2], (1, 1, 1, 1))
    conv.hand_back(nn.Conv2d)
    assert type(conv) is nn.Conv2d and not [name for name in conv.__dict__ if "folded" in name]
    assert torch.equal(conv(x), dense[1](x)) and conv.__dict__.keys() == dense[1].__dict__.keys()


def test_identities() -> None:
    x = torch.randn(2, 3, 4, 5)
    norm = as_trained(nn.BatchNorm2d(3))
    norm.add_module("drop", nn.Identity())
    norm.add_module("act", nn.Hardtanh(-0.1, 0.2))
    norm.__class__ = FoldedBatchNormAct2d
    assert torch.equal(norm(x), x.clamp(-0.1, 0.2)) and isinstance(norm, FrozenBatchNorm2d)
    for identity in (FoldedBatchNorm2d(3), FoldedZeroPad2d(2), FoldedConstantPad2d(1, 0.0)):
        assert identity.train()(x) is x


def test_unbatched_and_without_grad() -> None:
    dense = USUAL.dense()
    folded = fold(dense, USUAL.channels)
    x = USUAL.input()
    assert_near(folded(x[0]), dense(x)[0], 1e-12)
    with torch.no_grad():
        assert_near(folded(x), dense(x), 1e-12)
        assert_near(folded(x[0]), dense(x)[0], 1e-12)


def test_function_without_module() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    channels = torch.tensor([1])
    output = sparse_conv2d(
        x,
        weight,
        None,
        None,
        channels,
        padding=(1, 0, 2, 0),
        norm=FrozenNorm(None, None, mean, variance, 0.5),
    )
    expected = F.batch_norm(F.conv2d(F.pad(x, (1, 0, 2, 0)), weight), mean, variance, eps=0.5)
    assert_near(output, expected, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    (
        ({"norm": nn.ReLU()}, TypeError, "norm: got ReLU, expected an nn.BatchNorm2d"),
        ({"norm": nn.BatchNorm1d(4)}, TypeError, "norm: got BatchNorm1d"),
        ({"norm": nn.BatchNorm2d(3)}, ValueError, "norm: got 3 features, expected 4"),
        ({"norm": nn.BatchNorm2d(4, track_running_stats=False)}, ValueError, "track_running_stats=False"),
        ({"margins": (1, 1)}, ValueError, r"margins: got \(1, 1\)"),
        ({"margins": (0, -1, 0, 0)}, ValueError, r"margins: got \(0, -1, 0, 0\)"),
        ({"norm": nn.BatchNorm2d(4), "margins": (0, -1, 0, 0)}, ValueError, "margins"),
    ),
)
def test_bad_fold(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    conv = SparseConv2d(4, 4, 3)
    with pytest.raises(error, match=words):
        conv.fold(**arguments)
    assert not conv.is_folded


def test_can_fold_margins() -> None:
    assert SparseConv2d(4, 4, 3, padding=1).can_fold_margins((1, 2, 3, 4))
    assert SparseConv2d(4, 4, 3, padding="same").can_fold_margins((1, 2, 3, 4))
    assert not SparseConv2d(4, 4, 3).can_fold_margins((1, 2, -3, 4))
    reflecting = SparseConv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert not reflecting.can_fold_margins((1, 1, 1, 1))
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        reflecting.fold(margins=(1, 1, 1, 1))


def test_late_layer_makes_no_second_weight() -> None:
    dense = as_trained(
        nn.Sequential(nn.Identity(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
    ).eval()
    folded = fold(dense, (3,))
    alone = copy.deepcopy(folded)
    alone[1].unfold()
    x = torch.randn(2, 64, 4, 4, requires_grad=True)

    def peak(model: nn.Module) -> int:
        with peak_memory(x.device) as memory:
            output = model(x)
            torch.autograd.grad(output, (x, model[1].channel_weight), torch.ones_like(output))
        return memory.bytes

    peak(alone)
    assert peak(folded) < peak(alone) + dense[1].weight.numel() * 4 / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ("1x1, stride", "margins before padding"))
def test_inductor(name: str) -> None:
    torch._dynamo.reset()
    case = BY_NAME[name]
    dense = case.dense(torch.float32)
    folded = fold(dense, case.channels, norm_bias=True)
    compiled = torch.compile(folded, fullgraph=True, dynamic=True)
    for batch in (2, 9):
        x = torch.randn(batch, case.in_channels, *case.size, requires_grad=True)
        output, output_compiled = dense(x), compiled(x)
        assert_near(output_compiled, output, ROUNDING[torch.float32])
        grad_output = torch.randn_like(output)
        expected = torch.autograd.grad(output, (x, dense[2].bias), grad_output)
        found = torch.autograd.grad(output_compiled, (x, folded[2].bias), grad_output)
        for gradient, value in zip(found, expected, strict=True):
            assert_near(gradient, value, ROUNDING[torch.float32])
    torch._dynamo.reset()
