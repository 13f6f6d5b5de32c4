"""Optimiser state follows its channels; entering rows step as in a fresh optimiser."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn, optim

from trady_kernels import SparseConv2d, SparseLinear
from trady_kernels.nn.optimizer_state import CHANNELS, ENTERED, RULES


@dataclass(frozen=True)
class Case:
    """An optimiser and the arguments it is made with."""

    cls: type[optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ("foreach", "for-loop")

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.cls.__name__}({settings})"

    def make(self, parameters: Any, form: str = "default") -> optim.Optimizer:
        flags = {
            "default": {},
            "foreach": {"foreach": True},
            "for-loop": {"foreach": False},
            "fused": {"fused": True},
        }
        return self.cls(parameters, **self.arguments, **flags[form])


FUSED = ("foreach", "for-loop", "fused")
DECAY = {"weight_decay": 0.1}
CASES = (
    Case(optim.SGD, {"lr": 0.1, "momentum": 0.9, **DECAY}, FUSED),
    Case(optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}, FUSED),
    Case(optim.Adam, {"lr": 0.01}, FUSED),
    Case(optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True, **DECAY}, FUSED),
    Case(optim.AdamW, {"lr": 0.01, **DECAY}, FUSED),
    Case(optim.AdamW, {"lr": torch.tensor(0.01), "amsgrad": True, **DECAY}, ("for-loop", "fused")),
    Case(optim.NAdam, {"lr": 0.01, **DECAY}),
    Case(optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "maximize": True, **DECAY}),
    Case(optim.RAdam, {"lr": 0.01, **DECAY}),
    Case(optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.9), "decoupled_weight_decay": True, **DECAY}),
    Case(optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, **DECAY}),
    Case(optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3, "lr_decay": 0.01, **DECAY}, FUSED),
    Case(optim.Rprop, {"lr": 0.01}),
)
ORDERS = ("lazily", "handed over", "loaded after select", "loaded before select")
RUNS = [
    *(pytest.param(case, form, "lazily", id=f"{case} {form}") for case in CASES for form in case.forms),
    *(pytest.param(case, "default", order, id=f"{case} {order}") for case in CASES for order in ORDERS),
]


def layer_of(channels: Any = (0, 1, 4), dtype: torch.dtype = torch.float64) -> SparseConv2d:
    return SparseConv2d(6, 4, 2, bias=False, dtype=dtype, channels=channels)


class Twin:
    """A dense parameter with the rows of some channels, and an optimiser of its own that knows no select."""

    def __init__(self, layer: SparseConv2d, channels: list[int], case: Case, form: str) -> None:
        rows = layer.read_rows(layer.weight.detach(), torch.tensor(channels))
        self.channels, self.rows = channels, nn.Parameter(rows.clone())
        self.optimizer = case.make([self.rows], form)

    def step(self, grad: torch.Tensor) -> None:
        self.rows.grad = grad[self.channels].clone()
        self.optimizer.step()

    def distance(self, layer: SparseConv2d) -> float:
        rows = layer.read_rows(layer.weight.detach(), torch.tensor(self.channels))
        return float((rows - self.rows.detach()).abs().max())


def step(layer: SparseConv2d, optimizer: optim.Optimizer, grad: torch.Tensor) -> None:
    layer.channel_weight.grad = grad[layer.channels].clone()
    optimizer.step()


def gradients(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 6, 4, 2, 2, dtype=dtype)


def reload(layer: SparseConv2d, optimizer: optim.Optimizer, case: Case, form: str) -> optim.Optimizer:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = case.make([layer.channel_weight], form)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize(("case", "form", "order"), RUNS)
def test_staying_rows_carry_state_and_entering_rows_are_fresh(case: Case, form: str, order: str) -> None:
    layer = layer_of()
    optimizer = case.make([layer.channel_weight], form)
    grads = gradients(13)
    # torch keeps NAdam's product of momenta in float32, and once loaded in the parameter's float64
    exact = 1e-9 if case.cls is optim.NAdam and order.startswith("loaded") else 1e-15
    staying = Twin(layer, [1, 4], case, form)
    for grad in grads[:5]:
        step(layer, optimizer, grad)
        staying.step(grad)
    assert staying.distance(layer) == 0
    if order == "loaded before select":
        optimizer = reload(layer, optimizer, case, form)
    entering = Twin(layer, [3, 5], case, form)
    layer.select([1, 3, 4, 5], optimizer if order == "handed over" else None)
    if order == "loaded after select":
        optimizer = reload(layer, optimizer, case, form)
    for grad in grads[5:9]:
        step(layer, optimizer, grad)
        staying.step(grad)
        entering.step(grad)
        assert staying.distance(layer) < exact
        assert entering.distance(layer) < 1e-6
    late = Twin(layer, [0], case, form)  # had state once, left, and comes back beside rows of two ages
    layer.select([0, 1, 3])
    for grad in grads[9:]:
        step(layer, optimizer, grad)
        for twin in (staying, entering, late):
            twin.step(grad)
        assert late.distance(layer) < 1e-6
        rows = layer.channel_weight
        assert float((rows[1] - staying.rows[0]).detach().abs().max()) < exact
        assert float((rows[2] - entering.rows[0]).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_when_no_row_stays_the_optimiser_is_fresh(case: Case) -> None:
    layer = layer_of()
    optimizer = case.make([layer.channel_weight])
    grads = gradients(10)
    for grad in grads[:5]:
        step(layer, optimizer, grad)
    twin = Twin(layer, [2, 3], case, "default")
    layer.select([2, 3])
    for grad in grads[5:]:
        step(layer, optimizer, grad)
        twin.step(grad)
    assert twin.distance(layer) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_before_the_first_step(case: Case) -> None:
    layer = layer_of([])
    optimizer = case.make([layer.channel_weight])  # Adagrad fills its state here, for no row
    twin = Twin(layer, [2, 3], case, "default")
    layer.select([2, 3])
    for grad in gradients(3):
        step(layer, optimizer, grad)
        twin.step(grad)
    assert twin.distance(layer) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_has_the_size_of_the_rows(case: Case) -> None:
    layer, dense = layer_of(), nn.Parameter(torch.zeros(2))
    optimizer = case.make([layer.channel_weight, dense])
    for selection in ([0, 1, 4], [1, 3, 4, 5], [2], []):
        layer.select(selection)
        layer.channel_weight.grad = torch.randn_like(layer.channel_weight)
        dense.grad = torch.ones_like(dense)
        optimizer.step()
        state = optimizer.state[layer.channel_weight]
        shapes = {value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.dim()}
        assert shapes == {layer.channel_weight.shape}
        assert state[CHANNELS] == tuple(selection)
        assert (ENTERED in state) == (RULES[case.cls].update is not None)
        assert CHANNELS not in optimizer.state[dense] and ENTERED not in optimizer.state[dense]


def test_select_with_optimizer_rearranges_at_once() -> None:
    layer = layer_of()
    optimizer = optim.Adam([layer.channel_weight])
    step(layer, optimizer, gradients(1)[0])
    moments = optimizer.state[layer.channel_weight]["exp_avg"]
    kept = moments[2].clone()
    layer.select([3, 4], optimizer)
    state = optimizer.state[layer.channel_weight]
    assert state[CHANNELS] == (3, 4) and state[ENTERED] == (1, 0)
    assert torch.equal(state["exp_avg"][1], kept) and not state["exp_avg"][0].any()
    moments = state["exp_avg"]
    layer.select([2, 4], optimizer)
    assert state["exp_avg"] is moments  # as many rows: in place, at the same address
    assert torch.equal(moments[1], kept)


def test_no_state_stays_no_state() -> None:
    layer = layer_of()
    optimizer = optim.SGD([layer.channel_weight], lr=0.1)
    step(layer, optimizer, gradients(1)[0])
    layer.select([3], optimizer)
    step(layer, optimizer, gradients(1)[0])
    assert CHANNELS not in optimizer.state.get(layer.channel_weight, {})


@pytest.mark.parametrize("cls", (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam))
def test_first_step_late_in_training_is_no_larger_than_a_fresh_one(cls: Any) -> None:
    layer = layer_of([0], torch.float32)
    optimizer = cls([layer.channel_weight], lr=0.01)
    for grad in gradients(60, torch.float32):
        step(layer, optimizer, grad)
    optimizer.state[layer.channel_weight]["step"].fill_(1000)
    layer.select([0, 3])
    before = layer.channel_weight.detach().clone()
    fresh = nn.Parameter(before.clone())
    other = cls([fresh], lr=0.01)
    grad = gradients(1, torch.float32)[0]
    step(layer, optimizer, grad)
    fresh.grad = grad[[0, 3]].clone()
    other.step()
    torch.testing.assert_close(layer.channel_weight[1], fresh[1])


def test_old_rows_need_no_correction_any_more() -> None:
    layer = layer_of([0])
    optimizer = optim.Adam([layer.channel_weight], betas=(0.5, 0.6))
    step(layer, optimizer, gradients(1)[0])
    layer.select([0, 3], optimizer)
    assert optimizer.state[layer.channel_weight][ENTERED] == (0, 1)
    for grad in gradients(100):
        step(layer, optimizer, grad)
    assert optimizer.state[layer.channel_weight][ENTERED] == ()


def test_step_skipped_by_a_gradient_scaler_moves_nothing() -> None:
    layer = layer_of([0], torch.float32)
    optimizer = optim.Adam([layer.channel_weight], fused=True)
    step(layer, optimizer, gradients(1, torch.float32)[0])
    layer.select([0, 3], optimizer)
    step(layer, optimizer, gradients(1, torch.float32)[0])
    before = layer.channel_weight.detach().clone()
    # what torch.amp.GradScaler sets around a fused step that it wants skipped
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    step(layer, optimizer, gradients(1, torch.float32)[0])
    assert torch.equal(layer.channel_weight, before)


def test_step_without_gradient_moves_nothing() -> None:
    layer = layer_of([0])
    optimizer = optim.Adam([layer.channel_weight])
    step(layer, optimizer, gradients(1)[0])
    layer.select([0, 3])
    before, version = layer.channel_weight.detach().clone(), layer.weight._version
    optimizer.step()
    assert torch.equal(layer.channel_weight, before) and layer.weight._version == version


def test_closure() -> None:
    layer = layer_of()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for optimizer in (optim.Adam([layer.channel_weight]), optim.LBFGS([layer.channel_weight], max_iter=4)):

        def closure(optimizer: optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            return loss.item()

        first = closure()
        for _ in range(3):
            optimizer.step(closure)
        assert closure() < first
        assert torch.equal(layer.read_rows(layer.weight.detach(), layer.channels), layer.channel_weight)


class OwnStep(optim.Adam):
    """A subclass with its own ``step`` is unknown."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["secret"] = torch.ones_like(parameter)


@pytest.mark.parametrize("first", ("subclass", "base"))
def test_subclass_that_inherits_step_is_what_it_inherits_from(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    step_now = optim.Adam.step
    unwrapped = step_now.__wrapped__ if hasattr(step_now, "hooked") else step_now
    monkeypatch.setattr(optim.Adam, "step", unwrapped)  # as if no Adam had been made in this process

    class LoggingAdam(optim.Adam):
        pass

    if first == "base":
        optim.Adam([nn.Parameter(torch.zeros(1))])
    layer = layer_of()
    optimizer = LoggingAdam([layer.channel_weight])
    step(layer, optimizer, gradients(1)[0])
    layer.select([3, 4], optimizer)
    assert optimizer.state[layer.channel_weight]["exp_avg"].shape[0] == 2


UNKNOWN: tuple[Callable[[Any], optim.Optimizer], ...] = (
    optim.Adadelta,
    optim.Adamax,
    optim.ASGD,
    optim.Adafactor,
    OwnStep,
    lambda parameters: optim.LBFGS(parameters, max_iter=2),
)


@pytest.mark.parametrize("make", UNKNOWN, ids=lambda make: getattr(make, "__name__", str(make)))
@pytest.mark.parametrize("same_count", (False, True), ids=("other count", "same count"))
def test_unknown_optimisers_are_refused(make: Any, same_count: bool) -> None:
    layer, other = layer_of(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    other.grad = torch.ones_like(other)
    optimizer = make([other, layer.channel_weight])
    name = type(optimizer).__name__
    for grad in gradients(3):
        layer.channel_weight.grad = grad[layer.channels].clone()
        optimizer.step(lambda: torch.tensor(1.0))
    chosen = [0, 1, 5] if same_count else [0, 1]
    with pytest.raises(NotImplementedError, match=f"optimizer: got {name}, whose state cannot follow"):
        layer.select(chosen, optimizer)
    assert layer.channels.tolist() == [0, 1, 4]
    layer.select([0, 1, 4], None)
    optimizer.step(lambda: torch.tensor(1.0))  # the same channels: nothing to follow
    layer.select(chosen)
    layer.channel_weight.grad = torch.ones_like(layer.channel_weight)
    before = layer.channel_weight.detach().clone()
    with pytest.raises(NotImplementedError, match=f"make a new {name} after select"):
        optimizer.step(lambda: torch.tensor(1.0))
    assert torch.equal(layer.channel_weight, before)
    fresh = make([other, layer.channel_weight])
    fresh.step(lambda: torch.tensor(1.0))


def test_every_supported_class_is_tested() -> None:
    assert {case.cls for case in CASES} == set(RULES)


def test_two_parameter_groups_and_two_layers() -> None:
    model = nn.Sequential(SparseLinear(6, 6, channels=[0, 1]), SparseLinear(6, 4, channels=[2]))
    optimizer = optim.AdamW(
        [
            {"params": [model[0].channel_weight], "lr": 0.1},
            {"params": [model[1].channel_weight, model[1].bias]},
        ]
    )
    for chosen in ([0, 1], [1, 3], [3, 4, 5]):
        model[0].select(chosen)  # type: ignore[operator]
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[model[1].channel_weight][CHANNELS] == (2,)
    assert optimizer.state[model[1].channel_weight][ENTERED] == ()


def test_deepcopied_optimiser_state_is_its_own() -> None:
    layer = layer_of()
    optimizer = optim.Adam([layer.channel_weight])
    step(layer, optimizer, gradients(1)[0])
    saved = copy.deepcopy(optimizer.state_dict())
    layer.select([1, 2])
    step(layer, optimizer, gradients(1)[0])
    layer.select([0, 1, 4])
    optimizer.load_state_dict(saved)
    layer.select([0, 1, 4], optimizer)
    assert optimizer.state[layer.channel_weight][CHANNELS] == (0, 1, 4)
    assert optimizer.state[layer.channel_weight]["exp_avg"].shape[0] == 3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64), ids=str)
def test_loaded_channels_and_ages_are_exact(dtype: torch.dtype) -> None:
    layer = SparseLinear(70_000, 1, bias=False, dtype=dtype, channels=[0, 257, 65_537])
    optimizer = optim.Adam([layer.channel_weight])
    layer.channel_weight.grad = torch.ones_like(layer.channel_weight)
    optimizer.step()
    state = optimizer.state[layer.channel_weight]
    state["step"].fill_(70_001)
    layer.select([257, 65_537, 69_999], optimizer)
    expected = {CHANNELS: (257, 65_537, 69_999), ENTERED: (0, 0, 70_001)}
    assert {name: state[name] for name in expected} == expected
    for source in (optimizer, optim.Adam([layer.channel_weight])):  # loaded twice, without a step in between
        other = optim.Adam([layer.channel_weight])
        source.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.load_state_dict(copy.deepcopy(source.state_dict()))
        layer.select([65_537, 69_999], other)
        state = other.state[layer.channel_weight]
        assert state[CHANNELS] == (65_537, 69_999) and state[ENTERED] == (0, 70_001)
        layer.select([257, 65_537, 69_999])


def test_state_dicts_with_tuples_still_load() -> None:
    layer = layer_of([0])
    optimizer = optim.Adam([layer.channel_weight])
    for channels in ([0], [0, 3]):
        layer.select(channels)
        step(layer, optimizer, gradients(1)[0])
    saved = copy.deepcopy(optimizer.state_dict())
    for name, value in ((CHANNELS, (0, 3)), (ENTERED, (0, 1))):
        assert isinstance(saved["state"][0][name], torch.Tensor)
        saved["state"][0][name] = value
    other = optim.Adam([layer.channel_weight])
    other.load_state_dict(saved)
    layer.select([3], other)
    assert other.state[layer.channel_weight][CHANNELS] == (3,)
    assert other.state[layer.channel_weight][ENTERED] == (1,)


# -- forgotten layers ------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        SparseLinear(6, 6, channels=2), nn.ReLU(), SparseLinear(6, 6, channels=2), nn.Linear(6, 3)
    )


def train(model: nn.Module, *optimizers: optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_optimiser_without_a_selected_layer_warns_once() -> None:
    model = network()
    optimizer = optim.SGD([*model[0].parameters(), *model[3].parameters()], lr=0.01)
    with pytest.warns(
        UserWarning, match="SGD steps without 1 selected channel_weight that has a gradient"
    ) as caught:
        train(model, optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)


def test_no_warning_where_every_layer_is_held() -> None:
    model, two = network(), network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optim.SGD(model.parameters(), lr=0.01))
    first, second = (optim.SGD(half.parameters(), lr=0.01) for half in (two[:2], two[2:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(two, first, second)


def test_no_warning_of_another_network_or_of_layers_without_channels() -> None:
    generator, critic = network(), network()
    generator[0].select([])  # type: ignore[operator]
    dense = nn.Sequential(nn.Linear(6, 6))
    generator(torch.randn(4, 6)).sum().backward()
    critic(torch.randn(4, 6)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.SGD(dense.parameters(), lr=0.1).step()
        optim.SGD([p for p in generator.parameters() if p.requires_grad], lr=0.1).step()
