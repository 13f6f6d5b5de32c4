"""What stands between the layers: folded, lean, or named with what it keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import as_trained
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.nn import LeanMaxPool2d, LeanReLU, SparseConv2d
from trady_kernels.nn.norm import FoldedBatchNorm2d, FrozenBatchNorm2d
from trady_kernels.nn.padding import FoldedZeroPad2d

C, SIZE = 6, 9


class Net(nn.Module):
    """Padding, convolution, norm, activation, pooling; then a branch whose norm cannot be folded."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 2, 0))
        self.conv = nn.Conv2d(C, C, 3, bias=True)
        self.norm = nn.BatchNorm2d(C)
        self.act = act()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(C, C, 1)
        self.norm2 = nn.BatchNorm2d(C)
        self.act2 = act()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(C, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.norm(self.conv(self.pad(x)))))
        y = self.conv2(x)
        x = self.act2(y + self.norm2(y))
        return self.head(self.drop(x).mean((2, 3)))


class Skips(nn.Module):
    """A part that is called with None for an argument of which nothing says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)

    def forward(self, x, skip):  # type: ignore[no-untyped-def]
        y = self.conv(x)
        return self.norm(y) + (y if skip is None else skip)


class WithoutSkip(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.part, self.head, self.by_name = Skips(), nn.Linear(C, 3), by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:  # no graph of the whole
            x = x - 1
        y = self.part(x, skip=None) if self.by_name else self.part(x, None)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("by_name", [False, True])
def test_none_in_the_example_run_is_traced(by_name: bool) -> None:
    model, x = as_trained(WithoutSkip(by_name)).eval(), example()
    expected = model(x)
    tk.sparsify(model, x)
    assert not tk.conversion_report(model).folded
    torch.testing.assert_close(model(x), expected)


def example(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, C, SIZE, SIZE, dtype=dtype)


def trained_net(**arguments: Any) -> Net:
    net = as_trained(Net(**arguments))
    with torch.no_grad():
        net.norm.weight[1], net.norm.weight[2] = 0, -1.3
    return net


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 4 * ROUNDING[expected.dtype] * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def check_gradients(sparse: nn.Module, dense: nn.Module, x: torch.Tensor) -> None:
    """Against the dense network with evaluation-mode norms and dropout off."""
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    grad_output = torch.randn(len(x), 3, dtype=x.dtype)
    for model, given in zip((dense, sparse), inputs, strict=True):
        model.zero_grad()
        model.eval()(given).backward(grad_output)
    check(inputs[1].grad, inputs[0].grad)
    for name, layer in sparse_layers(sparse).items():
        check(
            layer.channel_weight.grad,
            layer.read_rows(dense.get_parameter(f"{name}.weight").grad, layer.channels),
        )


# -- folding ---------------------------------------------------------------------------------------


def test_what_is_folded_and_what_is_lean() -> None:
    model = trained_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tk.sparsify(model, example())
    report = tk.conversion_report(model)
    assert dict(report.folded) == {"norm": "conv", "pad": "conv"}
    assert report.frozen_norms == ("norm", "norm2")
    assert report.lean == ("act", "pool", "act2", "drop")
    assert type(model.norm) is FoldedBatchNorm2d and type(model.norm2) is FrozenBatchNorm2d
    assert type(model.pad) is FoldedZeroPad2d and type(model.pool) is LeanMaxPool2d
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_the_dense_networks(dtype: torch.dtype) -> None:
    dense = trained_net().to(dtype).eval()
    x = example(dtype)
    sparse = tk.sparsify(copy.deepcopy(dense), x)
    tk.select_fraction(sparse, 0.5)
    check(sparse(x), dense(x))
    check_gradients(sparse, dense, x)


def test_bytes_kept() -> None:
    """Selected channels, one bit an activation, one byte a pooled element, one bit of dropout: nothing else."""
    x = example()
    model = tk.sparsify(trained_net(), x).train()
    tk.select_fraction(model, 0.5)
    padded = (SIZE, SIZE - 1)  # after padding and a 3x3 convolution
    pooled = (padded[0] // 2, padded[1] // 2)
    maps = [2 * C * SIZE * SIZE, 2 * C * padded[0] * padded[1], 2 * C * pooled[0] * pooled[1]]
    conv_inputs = 4 * (maps[0] // 2 + maps[2] // 2)
    bits = (maps[1] + 7) // 8 + 2 * ((maps[2] + 7) // 8)
    head_input = 4 * 2 * C
    assert saved_bytes(model, lambda: model(x)) == conv_inputs + bits + maps[2] + head_input


def test_nothing_is_kept_below_the_lowest_selected_layer() -> None:
    x = example()
    model = tk.sparsify(trained_net(), x, head=None).train()
    assert saved_bytes(model, lambda: model(x)) == 0
    sparse_layers(model)["head"].select([0])
    assert saved_bytes(model, lambda: model(x)) == 4 * 2


def test_loading_another_state_dict_takes_effect() -> None:
    x = example()
    model = tk.sparsify(trained_net(), x).eval()
    other = trained_net().eval()
    with torch.no_grad():
        other.norm.running_mean.add_(1)
    model.load_state_dict(other.state_dict(), strict=True)
    check(model(x), other(x))


@pytest.mark.parametrize(
    "watch",
    [
        lambda net: net.conv.register_forward_hook(lambda *_: None),
        lambda net: net.norm.register_forward_pre_hook(lambda *_: None),
        lambda net: net.norm.register_full_backward_hook(lambda *_: None),
    ],
    ids=["output of the convolution", "input of the norm", "gradient of the norm"],
)
def test_what_is_watched_is_not_folded(watch: Callable[[Net], object]) -> None:
    dense = trained_net().double().eval()
    watch(dense)
    x = example(torch.float64)
    sparse = tk.sparsify(copy.deepcopy(dense), x)
    assert "norm" not in tk.conversion_report(sparse).folded
    tk.select_fraction(sparse, 0.5)
    check(sparse(x), dense(x))
    check_gradients(sparse, dense, x)


@pytest.mark.parametrize("name", ["conv", "norm"])
def test_a_second_call_folds_nothing_with_a_forward_put_on_it(name: str) -> None:
    model = trained_net().double().eval()
    handle = model.norm.register_forward_hook(lambda *_: None)
    x = example(torch.float64)
    tk.sparsify(model, x)
    handle.remove()
    module = model.get_submodule(name)
    module.forward = partial(type(module).forward, module)  # type: ignore[method-assign]
    expected = model(x)
    tk.sparsify(model, x)
    assert "norm" not in tk.conversion_report(model).folded
    assert torch.equal(model(x), expected)


def test_hooks_registered_later_see_values_and_gradients() -> None:
    dense = trained_net().double().eval()
    x = example(torch.float64)
    sparse = tk.sparsify(copy.deepcopy(dense), x)
    tk.select_fraction(sparse, 0.5)
    seen: list[torch.Tensor] = []
    for model in (dense, sparse):
        model.norm.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
    check_gradients(sparse, dense, x)
    check(seen[1], seen[0])


def test_a_norm_that_is_set_to_train_trains() -> None:
    dense = trained_net().double().eval()
    x = example(torch.float64)
    sparse = tk.sparsify(copy.deepcopy(dense), x).eval()
    tk.select_fraction(sparse, 0.5)
    sparse.norm.bias.requires_grad_(True)
    check_gradients(sparse, dense, x)
    check(sparse.norm.bias.grad, dense.norm.bias.grad)
    assert sparse.norm.weight.grad is None


def test_trainable_norms_stay_and_are_not_folded() -> None:
    x = example()
    model = tk.sparsify(trained_net(), x, freeze_norm=False).train()
    report = tk.conversion_report(model)
    assert dict(report.folded) == {"pad": "conv"} and type(model.norm) is nn.BatchNorm2d
    assert {"norm", "norm2"} <= set(report.kept)
    before = model.norm.running_mean.clone()
    model(x).sum().backward()
    assert model.norm.weight.grad is not None and not torch.equal(model.norm.running_mean, before)


def test_a_padding_that_cannot_be_folded_stays() -> None:
    net = trained_net()
    net.pad = nn.ConstantPad2d((0, 1, 2, 0), 1.5)
    x = example()
    expected = net.eval()(x)
    tk.sparsify(net, x)
    assert "pad" not in tk.conversion_report(net).folded and type(net.pad) is nn.ConstantPad2d
    check(net(x), expected)


# -- round trips -----------------------------------------------------------------------------------


def test_densify_restores_classes_and_forgets_folds() -> None:
    model = trained_net().eval()
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    x = example()
    expected = model(x)
    tk.sparsify(model, x)
    assert model.act.overwrites_input
    tk.densify(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(x), expected)


def test_twice_is_once() -> None:
    model = tk.sparsify(trained_net(), example())
    report = tk.conversion_report(model)
    classes = [type(module) for module in model.modules()]
    tk.sparsify(model, example())
    assert tk.conversion_report(model) == report
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_twins_read_their_own_norms(twin: Callable[[nn.Module], Any]) -> None:
    x = example()
    model = tk.sparsify(trained_net(), x).eval()
    other = twin(model)
    expected = model(x)
    with torch.no_grad():
        other.norm.running_mean.add_(1)
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)


# -- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_overwrites_what_nobody_else_needs(inplace: bool) -> None:
    x = example()
    model = tk.sparsify(trained_net(act=lambda: nn.ReLU(inplace)), x).eval()
    tk.select_fraction(model, 0.5)
    assert type(model.act) is LeanReLU and model.act.overwrites_input and not model.act2.overwrites_input
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.act.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    model.act2.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    model(x)
    assert [given.data_ptr() == made.data_ptr() for given, made in seen] == [True, inplace]


def test_lean_off() -> None:
    model = tk.sparsify(trained_net(), example(), lean=False)
    assert type(model.act) is nn.ReLU and type(model.pool) is nn.MaxPool2d and type(model.drop) is nn.Dropout
    report = tk.conversion_report(model)
    assert report.lean == () and "norm" in report.folded
    size = 2 * C * SIZE * (SIZE - 1)
    assert report.kept["act"] == 4 * size  # its output, which the pooling keeps too
    assert report.kept["pool"] == 8 * 2 * C * 4 * 4  # its indices


@pytest.mark.parametrize("lean", ["8-bit", 8, None])
def test_bad_lean_gets_one_sentence_and_changes_nothing(lean: Any) -> None:
    model = trained_net()
    with pytest.raises(ValueError, match=r'^lean: got .*, expected True, False or "8bit"$'):
        tk.sparsify(model, example(), lean=lean)
    assert not any(isinstance(module, SparseConv2d) for module in model.modules())


# -- what we do not know ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Keeps:
    name: str
    act: Callable[[], nn.Module]
    maps: int  # full-size float tensors that both activations keep together


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


KEEPS = (
    Keeps("silu keeps its input", nn.SiLU, 1),
    Keeps("somebody's own", Gate, 2),
)


@pytest.mark.parametrize("case", KEEPS, ids=lambda case: case.name)
def test_what_is_not_known_is_named_with_the_bytes_it_keeps(case: Keeps) -> None:
    x = example()
    report = tk.conversion_report(tk.sparsify(trained_net(act=case.act), x))
    assert report.kept["act"] == 4 * case.maps * 2 * C * SIZE * (SIZE - 1)
    assert set(report.kept) == {"act", "act2"}
    text = str(report)
    assert f"{report.kept['act']:,} B" in text and "2 frozen norms (1 folded into their convolution)" in text


def test_functional_activations_are_named_by_who_calls_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(self.conv(x))

    model = tk.sparsify(nn.Sequential(Block(), nn.Conv2d(C, 2, 1)), x := example(), head="1")
    assert dict(tk.conversion_report(model).kept) == {"0": 4 * x.numel()}
