from __future__ import annotations

import copy
import importlib.util
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from torch import nn

import trady_kernels as tk
from trady_kernels.cost import (
    Backward,
    Budget,
    Cost,
    LayerCall,
    LayerCost,
    measure_layers,
    measure_network,
    total,
)
from trady_kernels.models import MobileNetV2
from trady_kernels.models.loading import load_model


def test_mobilenet_v2_costs_what_the_paper_says() -> None:
    layers = measure_layers(MobileNetV2(width=0.35), torch.randn(2, 3, 128, 128))
    layers.pop("classifier")
    full = total(layer.full for layer in layers.values())
    assert len(layers) == 52
    assert (full.weight_elements, full.activation_elements) == (288_864, 963_456)
    assert full.elements == 1_252_320


@dataclass(frozen=True)
class Case:
    name: str
    layer: nn.Module
    input: tuple[int, ...]
    channels: int
    weight: int
    activation: int
    macs: int


CASES = (
    Case("conv", nn.Conv2d(6, 10, (3, 5), stride=2), (4, 6, 9, 11), 6, 150, 99, 150 * 4 * 4),
    Case("depthwise", nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 7, 5), 6, 18, 35, 18 * 35),
    Case("grouped", nn.Conv2d(6, 9, 1, groups=3), (2, 6, 4, 4), 6, 3, 16, 48),
    Case("unbatched conv", nn.Conv2d(6, 10, 1), (6, 4, 4), 6, 10, 16, 160),
    Case("linear", nn.Linear(6, 10), (3, 6), 6, 10, 1, 10),
    Case("tokens", nn.Linear(6, 10), (3, 7, 6), 6, 10, 7, 70),
    Case("unbatched linear", nn.Linear(6, 10), (6,), 6, 10, 1, 10),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cost_of_a_channel(case: Case, dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(case.layer)).to(dtype)
    cost = measure_layers(model, torch.randn(case.input, dtype=dtype))["0"]
    batched = len(case.input) > (3 if isinstance(case.layer, nn.Conv2d) else 1)
    batch = case.input[0] if batched else 1
    stored = (case.weight + batch * case.activation) * dtype.itemsize
    assert cost == LayerCost("0", case.channels, Cost(case.weight, case.activation, stored, case.macs))


def test_a_layer_called_twice_stores_two_inputs_and_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.layer(input=self.layer(input))

    cost = measure_layers(Twice(), torch.randn(3, 6))["layer"]
    assert cost.channel == Cost(6, 2, 4 * (6 + 2 * 3), 2 * 6)


class WithBias(nn.Linear):
    """Returns the bias for others to add."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return F.linear(input, self.weight), self.bias


class OfHidden(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(hidden, self.weight, self.bias)


class Doubles(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class OwnForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.hidden = nn.Linear(4, 4), WithBias(4, 4), OfHidden(4, 4)
        self.doubles, self.last = Doubles(4, 4), nn.Linear(4, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product, bias = self.pair(self.first(input))
        return self.last(self.doubles(self.hidden(hidden=product + bias)))


def test_layers_with_forwards_of_their_own() -> None:
    model, x = OwnForwards(), torch.randn(3, 4)
    tk.sparsify(model, x)
    network = measure_network(model, x)
    assert list(network.layers) == ["first", "doubles", "last"]
    assert [call.ancestors for call in network.calls] == [set(), {"first"}, {"first", "doubles"}]
    assert not any(call.after_parameter for call in network.calls)
    tk.ChannelSampler(model, x, budget=10)


def test_bytes_are_counted_in_the_dtype_that_autocast_stores() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        cost = measure_layers(model, torch.randn(3, 6))["0"]
    assert cost.channel.bytes == 4 * 10 + 2 * 3


def test_measuring_leaves_no_trace() -> None:
    model = as_trained(ResidualNet()).train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.stem.weight.requires_grad_(False)
    state = torch.get_rng_state()

    def draw(module: nn.Module, args: object) -> None:
        torch.rand(3)

    model.register_forward_pre_hook(draw)
    measure_layers(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.blocks[0].norm1.training and not model.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.blocks.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert torch.is_grad_enabled()


# -- the data flow ---------------------------------------------------------------------------------


def inputs_that_need_a_gradient(model: nn.Module, x: torch.Tensor, trained: str) -> set[str]:
    """Names of the layers whose input requires grad when one layer's weight alone trains."""
    needing = set()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                if args[0].requires_grad:
                    needing.add(name)

            handles.append(module.register_forward_pre_hook(note))
    weight = model.get_submodule(trained).weight
    assert isinstance(weight, nn.Parameter)
    weight.requires_grad_(True)
    model(x)
    weight.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return needing


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "torchvision:resnet18",  # downsampling convs
        "timm:mobilenetv3_small_050",  # squeeze-excite
        "timm:test_vit",
        "torchvision:squeezenet1_1",  # branches
    ],
)
def test_ancestors_are_the_layers_that_make_an_input_need_a_gradient(name: str) -> None:
    library = name.partition(":")[0]
    if library != name and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install {library}")
    model = as_trained(ResidualNet() if library == name else load_model(name, 5, pretrained=False).model)
    size = 160 if name == "timm:test_vit" else 32
    x = torch.randn(1, 3, size, size)
    model.eval().requires_grad_(False)
    network = measure_network(model, x)
    assert [call.name for call in network.calls] == list(network.layers)
    for layer in network.layers:
        expected = inputs_that_need_a_gradient(model, x, layer)
        assert {call.name for call in network.calls if layer in call.ancestors} == expected, layer
    assert not any(call.after_parameter for call in network.calls)


class Maze(nn.Module):
    """Branches, views written in place, a layer called twice, one without gradient, one without use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.branch = nn.Conv2d(2, 2, 1)
        self.blind = nn.Conv2d(3, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(2, 2, 1)
        self.cut = nn.Conv2d(2, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.last = nn.Linear(4, 2)

    def forward(self, input: torch.Tensor) -> dict[str, object]:
        x = self.first(input)
        x[:, :2].relu_()
        branch = self.branch(x[:, 2:])
        x = x.clone()
        x[:, :2] = branch
        self.unused(branch)
        with torch.no_grad():
            shift = self.blind(input)
        y = self.cut(branch.detach())
        y = self.twice(input=nn.functional.relu_(self.twice(y)))
        tokens = nn.functional.relu_(self.linear((x + shift + y).flatten(2).transpose(1, 2)))
        return {"out": [self.last(tokens * self.scale)], "shape": x.shape}


MAZE = (  # layer, channels, MACs a channel, ancestors, whether a parameter stands before it
    LayerCall("first", 3, 4 * 30, frozenset(), False),
    LayerCall("branch", 2, 2 * 30, frozenset({"first"}), False),
    LayerCall("cut", 2, 4 * 30, frozenset(), False),
    LayerCall("twice", 4, 4 * 30, frozenset({"cut"}), False),
    LayerCall("twice", 4, 4 * 30, frozenset({"cut", "twice"}), False),
    LayerCall("linear", 4, 4 * 30, frozenset({"first", "branch", "cut", "twice"}), False),
    LayerCall("last", 4, 2 * 30, frozenset({"first", "branch", "cut", "twice", "linear"}), True),
)


def compiled(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("made", "context"),
    [
        (lambda: Maze(), nullcontext),
        (lambda: Maze(), torch.no_grad),
        (lambda: Maze(), torch.inference_mode),
        (lambda: compiled(Maze()), nullcontext),
    ],
    ids=["plain", "no_grad", "inference_mode", "compiled"],
)
def test_a_maze(made: Callable[[], nn.Module], context: Callable[[], AbstractContextManager[None]]) -> None:
    model = made()
    with context():
        network = measure_network(model, torch.randn(2, 3, 5, 6))
    assert set(network.layers) == {call.name for call in MAZE} | {"blind", "unused"}
    assert network.calls == MAZE


@dataclass(frozen=True)
class Trained:
    name: str
    trained: Mapping[str, int]
    backward: Backward


TRAINED = (
    Trained("nothing but the parameter", {}, Backward("last", 0, 4 * 60)),
    Trained("a layer nothing comes back to", {"blind": 3}, Backward("last", 0, 4 * 60)),
    Trained("a bias", {"linear": 0}, Backward("linear", 0, 4 * 60)),
    Trained("one of two calls", {"twice": 1}, Backward("twice", 2 * 120, 4 * 120 + 4 * 120 + 4 * 60)),
    Trained("below", {"cut": 2, "last": 3}, Backward("cut", 2 * 120 + 3 * 60, 3 * 4 * 120 + 4 * 60)),
)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_backward_of_a_maze(case: Trained) -> None:
    network = measure_network(Maze(), torch.randn(2, 3, 5, 6))
    backward = network.backward(case.trained)
    assert backward == case.backward
    assert backward.flops == 2 * backward.macs == 2 * (backward.weight_grad_macs + backward.input_grad_macs)


def test_nothing_trains() -> None:
    assert measure_network(ResidualNet().requires_grad_(False), torch.randn(1, 3, 8, 8)).backward(
        {}
    ) == Backward(None, 0, 0)


def test_the_run_keeps_no_activation() -> None:
    alive: list[int] = []

    class Watched(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            alive.append(sum(reference() is not None for reference in references))
            output = input.sigmoid() * 2
            references.append(weakref.ref(output.untyped_storage()))
            return output

    references: list[weakref.ref[torch.UntypedStorage]] = []
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(2, 2, 1), Watched())]
    measure_network(nn.Sequential(*layers), torch.randn(1, 2, 5, 5))
    assert len(alive) == 6 and max(alive) <= 1


GOOD = (
    (28_000, Budget("elements", 28_000)),
    ("28000", Budget("elements", 28_000)),
    ("256KiB", Budget("bytes", 262_144)),
    (" 1 MB ", Budget("bytes", 1_000_000)),
    ("0.5 MiB", Budget("bytes", 524_288)),
    ("100 b", Budget("bytes", 100)),
    ("2kb", Budget("bytes", 2_000)),
    ("5%", Budget("share", 0.05)),
    (".5 %", Budget("share", 0.005)),
    ("150%", Budget("share", 1.5)),
)


@pytest.mark.parametrize(("given", "expected"), GOOD, ids=lambda value: repr(value))
def test_budgets(given: int | str, expected: Budget) -> None:
    budget = Budget.parse(given)
    assert budget.kind == expected.kind
    assert budget.amount == pytest.approx(expected.amount)


BAD = (
    ("12 bananas", ValueError),
    ("", ValueError),
    ("MB", ValueError),
    ("0", ValueError),
    ("0 KiB", ValueError),
    ("0.4 B", ValueError),
    ("0%", ValueError),
    ("-5%", ValueError),
    ("nan", ValueError),
    ("nan%", ValueError),
    ("inf MB", ValueError),
    ("1e400 MB", ValueError),
    ("9" * 400 + " MB", ValueError),
    ("1.5", ValueError),
    ("5 %%", ValueError),
    (0, ValueError),
    (-3, ValueError),
    (float("nan"), TypeError),
    (float("inf"), TypeError),
    (0.05, TypeError),
    (True, TypeError),
    (None, TypeError),
    ([5], TypeError),
)


@pytest.mark.parametrize(("given", "error"), BAD, ids=lambda value: repr(value))
def test_bad_budgets_get_one_sentence(given: object, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Budget.parse(given)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"budget: got {given!r}, expected a positive int")
    assert "\n" not in message


def test_share_is_of_elements_and_rounds_down() -> None:
    full = Cost(weight_elements=90, activation_elements=109, bytes=7, macs=3)
    assert Budget.parse("50%").limit(full) == 99
    assert Budget.parse("50%").of(full) == 199
    assert Budget.parse("50B").limit(full) == 50
    assert Budget.parse("50B").of(full) == 7


@pytest.mark.parametrize("example", [None, "text", 3, (), {"a": 1}], ids=repr)
def test_bad_example_is_named(example: object) -> None:
    with pytest.raises(TypeError, match=r"example_input: got .*expected a tensor"):
        measure_layers(ResidualNet(), example)  # type: ignore[arg-type]
