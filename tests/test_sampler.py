from __future__ import annotations

import copy
import importlib.util
import io
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from networks import ResidualNet, as_trained
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Backward, Cost, measure_layers, total
from trady_kernels.models import MobileNetV2
from trady_kernels.models.loading import load_model
from trady_kernels.nn import SparseLinear
from trady_kernels.selection import SCHEMES, LayerFractions, NothingSelected, SparseUpdate
from trady_kernels.selection.schemes import find_scheme
from trady_kernels.selection.schemes.d_full_random import DFullRandom
from trady_kernels.selection.schemes.late import Late

X = torch.randn(2, 3, 10, 9, generator=torch.Generator().manual_seed(0))
Selection = Mapping[str, torch.Tensor]


def sparse_net() -> ResidualNet:
    return tk.sparsify(as_trained(ResidualNet()), X)


def ranking_of(model: nn.Module) -> tk.LayerRanking:
    """The first layers hold nearly everything: the pool is blocks.0.depthwise, blocks.1.project and neck."""
    scores = dict.fromkeys(sparse_layers(model), 0.01)
    scores |= {"blocks.1.project": 5.0, "neck": 3.0, "blocks.0.depthwise": 2.0}
    return tk.LayerRanking(scores)


POOL = ["blocks.0.depthwise", "blocks.1.project", "neck"]


def sampler(model: nn.Module | None = None, **arguments: Any) -> tk.ChannelSampler:
    return tk.ChannelSampler(model or sparse_net(), X, **({"budget": 2_000} | arguments))


def equal(first: Selection, second: Selection) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cost_of(sampler: tk.ChannelSampler) -> Cost:
    """Counted anew from what the layers hold."""
    return total(
        sampler.layers[name].channel * len(layer.channels) for name, layer in sampler._modules.items()
    )


# -- budgets ---------------------------------------------------------------------------------------


BUDGETS = (1, 17, 60, 61, 500, "3%", "31.4%", "99.9%", "300 B", "2KiB", "10 kB")


@pytest.mark.parametrize("counts", ["free", "fixed"])
@pytest.mark.parametrize("scheme", [name for name, s in SCHEMES.items() if s.budgeted and not s.given])
def test_cost_never_exceeds_the_budget_and_the_rest_buys_nothing(scheme: str, counts: str) -> None:
    model = sparse_net()
    norms = {name: torch.rand(layer.channel_count) for name, layer in sparse_layers(model).items()}
    for seed, budget in enumerate(BUDGETS):
        drawn = sampler(
            model,
            budget=budget,
            scheme=scheme,
            counts=counts,
            ranking=ranking_of(model),
            seed=seed,
            gradients=lambda: norms,
        )
        assert drawn.budget is not None
        counted, limit = drawn.budget.of, drawn.budget.limit(drawn.full_cost)
        for _ in range(3):
            assert drawn.cost == cost_of(drawn)
            assert counted(drawn.cost) <= limit
            unselected = [
                counted(drawn.layers[name].channel)
                for name in drawn.pool
                if len(drawn.selection[name]) < drawn.layers[name].channels
            ]
            if unselected:
                assert limit - counted(drawn.cost) < min(unselected)
            assert all(len(drawn.selection[name]) == 0 for name in drawn.layers if name not in drawn.pool)
            model(X).square().sum().backward()  # for what observes gradients
            drawn.resample()


@pytest.mark.parametrize("budget", BUDGETS)
def test_chosen_fractions_never_exceed_the_budget(budget: int | str) -> None:
    gains = {name: {0.125: 1.0, 0.5: 2.0, 1.0: 3.0} for name in sparse_layers(sparse_net())}
    scheme = SparseUpdate(LayerFractions("small", "50%", contributions=gains))
    drawn = sampler(budget=budget, scheme=scheme)
    assert drawn.budget is not None and drawn.cost == cost_of(drawn)
    assert drawn.budget.of(drawn.cost) <= drawn.budget.limit(drawn.full_cost)
    assert drawn.cost.elements or budget in (1, 17)


def test_kinds_of_budget_count_what_they_say() -> None:
    model = sparse_net()
    full = sampler(model).full_cost
    assert sampler(model, budget="10%").cost.elements <= full.elements // 10
    drawn = sampler(model, budget="4KiB")
    stored = sum(
        (layer.channel_weight.numel() * 4)
        + drawn.layers[name].channel.activation_elements * len(layer.channels) * len(X) * 4
        for name, layer in sparse_layers(model).items()
    )
    assert stored == drawn.cost.bytes <= 4096


@pytest.mark.parametrize("budget", [10**12, "1GB", "100%", "150%"])
def test_a_budget_above_the_full_cost_selects_everything_and_says_so(budget: int | str) -> None:
    drawn = sampler(budget=budget)
    assert drawn.cost == drawn.full_cost
    assert "everything is selected" in drawn.report()


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: pip install numpy")
    model = sparse_net()
    assert equal(sampler(model, seed=numpy.int64(3)).selection, sampler(model, seed=3).selection)
    found = tk.select_fraction(model, numpy.float32(0.5), numpy.int64(3))
    assert equal(found, tk.select_fraction(model, 0.5, 3))
    scores = {"a": numpy.float64(0.5), "b": numpy.float32(0.25), "c": numpy.int64(0)}
    ranking = tk.LayerRanking(scores)
    assert ranking == tk.LayerRanking({"a": 0.5, "b": 0.25, "c": 0}) and ranking.top(numpy.float32(0.5)) == [
        "a"
    ]
    budget, rate = 2_000, numpy.float32(0.125)
    plain = tk.rank_layers(model, [X] * 3, torch.sum, learning_rate=0.125)
    assert tk.rank_layers(model, [X] * 3, torch.sum, learning_rate=rate) == plain
    norms = tk.channel_norms(model, [X] * 9, torch.sum, budget=budget, seed=numpy.int64(3))
    assert equal(norms, tk.channel_norms(model, [X] * 9, torch.sum, budget=budget, seed=3))


def test_a_seed_that_no_generator_takes() -> None:
    with pytest.raises(ValueError, match=r"seed: got 9223372036854775808, expected one of 64 bits"):
        sampler(seed=1 << 63)


def test_a_budget_below_the_cheapest_channel_selects_nothing_and_says_so() -> None:
    with pytest.warns(
        NothingSelected, match=r"budget: got 1, below the cheapest channel \(\d+ elements\): nothing"
    ):
        drawn = sampler(budget=1)
    assert drawn.cost == Cost()
    assert "the budget is below the cheapest channel (" in drawn.report()


# -- schemes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_pools_and_when_they_draw(name: str) -> None:
    model = tk.sparsify(as_trained(ResidualNet()), X, biases=SCHEMES[name].biases)
    budget = (
        (200 if name == "late" else 1_000) if SCHEMES[name].budgeted else None
    )  # less than all of the pool
    drawn = sampler(
        model,
        budget=budget,
        scheme=SparseUpdate(LayerFractions("small", 1, {"neck": 1})) if name == "sparse-update" else name,
        ranking=ranking_of(model),
        gradients=lambda: {
            name: torch.rand(cost.channels) for name, cost in measure_layers(model, X).items()
        },
    )
    pools = {
        "trady": POOL,
        "s-topk-random": POOL,
        "head-only": [],
        "bias-only": [],
        "sparse-update": ["neck"],
        "late": [name for name in POOL if name in Late().reach(measure_layers(model, X))],
    }
    assert drawn.pool == pools.get(name, list(sparse_layers(model)))
    before = drawn.selection
    drawn.resample()
    assert equal(drawn.selection, before) == (not SCHEMES[name].every_epoch)
    expected = {"head-only": Cost(), "bias-only": Cost(), "full": drawn.full_cost}
    if name in expected:
        assert drawn.cost == expected[name]


def test_bias_only_wants_biases_that_train() -> None:
    with pytest.raises(
        ValueError, match=r"^scheme: got 'bias-only' .*expected one from sparsify\(model, biases"
    ):
        sampler(budget=None, scheme="bias-only")
    model = tk.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4))
    model[0].bias.requires_grad_(True)  # by hand
    drawn = tk.ChannelSampler(model, torch.randn(2, 4), budget=None, scheme="bias-only")
    assert drawn.backward == Backward("0", 8, 8)


@pytest.mark.parametrize("name", ["head-only", "full"])
def test_schemes_without_a_budget_ignore_one(name: str) -> None:
    drawn = sampler(budget=10, scheme=name)
    assert drawn.cost == {"head-only": Cost(), "full": drawn.full_cost}[name]
    assert f"the scheme {name} has no budget" in drawn.report()


@pytest.mark.parametrize("counts", ["free", "fixed"])
def test_counts(counts: str) -> None:
    drawn = sampler(counts=counts)
    first = drawn.selection
    costs, counted = set(), set()
    for _ in range(8):
        drawn.resample()
        costs.add(drawn.cost.elements)
        counted.add(tuple(len(channels) for channels in drawn.selection.values()))
        assert not equal(drawn.selection, first)
    assert (len(counted) == 1) == (counts == "fixed")
    if counts == "fixed":
        assert counted == {tuple(len(channels) for channels in first.values())}


# -- the draw --------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["free", "fixed"])
def test_inclusion_is_uniform_within_each_layer_and_every_pool_layer_is_reached(counts: str) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    model = sparse_net()
    drawn = sampler(model, budget="30%", counts=counts)
    draws = 600
    hits = {name: torch.zeros(layer.channels) for name, layer in drawn.layers.items()}
    sizes: dict[str, list[int]] = {name: [] for name in hits}
    for _ in range(draws):
        for name, channels in drawn._draw().items():
            hits[name][channels] += 1
            sizes[name].append(len(channels))
    for name, count in hits.items():
        channels = drawn.layers[name].channels
        mean = sum(sizes[name]) / draws
        if counts == "free":
            assert mean > 0, name
        if not 0 < mean < channels:
            continue
        # Given k of C in a draw, hits have variance k/C (1 - k/C) and correlation -1/(C - 1).
        variance = sum(k / channels * (1 - k / channels) for k in sizes[name])
        statistic = float(((count - count.mean()) ** 2).sum() / variance * (channels - 1) / channels)
        p = stats.chi2.sf(statistic, channels - 1)
        assert 1e-4 < p < 1 - 1e-6, (name, p, count)


@pytest.mark.parametrize(
    "name", ["trady", "late", "d-full-random", "s-full-random", "s-topk-random", "medyate"]
)
def test_every_channel_of_the_pool_is_as_likely_to_come_first(name: str) -> None:
    """Whatever its layer; the second too, so that nothing but the first is shuffled."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    scheme, generator = find_scheme(name), torch.Generator().manual_seed(0)
    orders = [scheme.order({"few": 3, "many": 40, "some": 7}, generator) for _ in range(3_000)]
    for place in (0, 1, -1):
        count = torch.stack([order[place] for order in orders]).bincount(minlength=50)
        assert 1e-4 < stats.chisquare(count.numpy()).pvalue < 1 - 1e-6, (place, count)


def test_same_seed_same_channels_whatever_else_draws() -> None:
    first = sampler(seed=5)
    torch.manual_seed(99)
    torch.rand(17)
    second = sampler(seed=5)
    state = torch.get_rng_state()
    for _ in range(3):
        assert equal(first.selection, second.selection)
        first.resample()
        torch.rand(3)
        second.resample()
    other = sampler(seed=6)
    assert not equal(first.selection, other.selection)
    torch.set_rng_state(state)
    other.resample()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_without_memory_gets_the_same_channels() -> None:
    with torch.device("meta"):
        model = tk.sparsify(ResidualNet(), X.to("meta"))
    found, expected = tk.ChannelSampler(model, X.to("meta"), budget="4KiB"), sampler(budget="4KiB")
    assert found.layers == expected.layers and equal(found.selection, expected.selection)


def test_what_is_selected_is_what_the_layers_train() -> None:
    drawn = sampler()
    for _ in range(3):
        for name, layer in drawn._modules.items():
            assert torch.equal(layer.channels, drawn.selection[name])
            assert layer.channel_weight.requires_grad == bool(len(drawn.selection[name]))
        drawn.resample()


def momentum_by_channel(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[tuple[str, int], torch.Tensor]:
    """Of every selected channel; zero where its layer has none yet."""
    found = {}
    for name, layer in sparse_layers(model).items():
        rows = layer.channel_weight
        momentum = optimizer.state.get(rows, {}).get("momentum_buffer", torch.zeros_like(rows))
        for channel, row in zip(layer.channels.tolist(), momentum, strict=True):
            found[name, channel] = row.detach().clone()
    return found


def check_that_state_follows(model: nn.Module, redraw: Callable[[torch.optim.Optimizer], object]) -> None:
    """Channels that stay keep their momentum, those that enter have none."""
    optimizer = torch.optim.SGD(tk.trainable_parameters(model), 0.01, momentum=0.9)
    stayed = entered = 0
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        before = momentum_by_channel(model, optimizer)
        redraw(optimizer)
        for channel, row in momentum_by_channel(model, optimizer).items():
            stayed += channel in before and bool(row.any())
            entered += channel not in before
            torch.testing.assert_close(row, before.get(channel, torch.zeros_like(row)), rtol=0, atol=0)
    assert stayed and entered


def test_resampling_trains_on_with_the_optimizers_state() -> None:
    model = sparse_net()
    check_that_state_follows(model, sampler(model).resample)


def test_a_draw_over_a_real_networks_channels_takes_milliseconds() -> None:
    x = torch.randn(1, 3, 32, 32)
    drawn = tk.ChannelSampler(tk.sparsify(MobileNetV2(10), x), x, budget="20%")
    assert sum(layer.channels for layer in drawn.layers.values()) > 15_000
    elapsed = []
    for _ in range(5):
        start = time.process_time()
        drawn._draw()
        elapsed.append(time.process_time() - start)
    assert min(elapsed) < 0.2  # a tensor operation a channel would take seconds


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["free", "fixed"])
def test_state_dict_resumes_the_draw(counts: str) -> None:
    drawn = sampler(counts=counts, seed=3)
    drawn.resample()
    file = io.BytesIO()
    torch.save(drawn.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = sampler(counts=counts, seed=77)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert equal(resumed.selection, drawn.selection)
        assert resumed.cost == drawn.cost == cost_of(resumed)
        drawn.resample()
        resumed.resample()


@pytest.mark.gpu
def test_a_state_loaded_onto_a_gpu_resumes_the_draw() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate")
    for _ in range(2):
        drawn.resample()
        model(X).square().sum().backward()
    file = io.BytesIO()
    torch.save(drawn.state_dict(), file)
    file.seek(0)
    resumed = sampler(scheme="medyate", seed=77)
    resumed.load_state_dict(torch.load(file, map_location="cuda", weights_only=True))
    for _ in range(2):
        drawn.resample()
        resumed.resample()
        assert equal(resumed.selection, drawn.selection)


class Elsewhere:
    """A tensor on a device that this machine may not have."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def cpu(self) -> torch.Tensor:
        return self._tensor


def test_the_generators_state_may_be_on_another_device() -> None:
    drawn, resumed = sampler(seed=3), sampler(seed=77)
    state = drawn.state_dict()
    resumed.load_state_dict(state | {"generator": Elsewhere(state["generator"])})
    drawn.resample()
    resumed.resample()
    assert equal(resumed.selection, drawn.selection)


def test_a_saved_state_is_not_changed_by_later_draws() -> None:
    drawn = sampler(counts="fixed")
    state = drawn.state_dict()
    before = copy.deepcopy(state)
    drawn.resample()
    assert equal(state["selection"], before["selection"])
    assert torch.equal(state["generator"], before["generator"])


@dataclass(frozen=True)
class BadState:
    name: str
    change: Callable[[dict[str, Any]], object]
    message: str


BAD_STATES = (
    BadState("not a state", lambda s: s.clear(), "expected what ChannelSampler.state_dict() returned"),
    BadState("version", lambda s: s.update(version=9), "got version 9, expected 2"),
    BadState("scheme", lambda s: s.update(scheme="full"), "got scheme 'full', expected 'medyate'"),
    BadState(
        "budget", lambda s: s.update(budget="1 bytes"), "got budget '1 bytes', expected '2,000 elements'"
    ),
    BadState("pool", lambda s: s.update(pool=["fc"]), "got pool ['fc'], expected ["),
    BadState("layers", lambda s: s["selection"].pop("stem"), "got a selection of other layers"),
    BadState(
        "range", lambda s: s["selection"].update(stem=torch.tensor([3])), "got a selection of other layers"
    ),
    BadState(
        "order", lambda s: s["selection"].update(stem=torch.tensor([2, 1])), "got a selection of other layers"
    ),
    BadState(
        "a list", lambda s: s.update(selection=[torch.tensor([1])]), "got selection [tensor([1])], expected"
    ),
    BadState("generator", lambda s: s.update(generator=torch.zeros(3)), "got generator tensor([0., 0., 0.])"),
    BadState("no generator", lambda s: s.update(generator=None), "got generator None, expected that of"),
    BadState("observed", lambda s: s.update(observed={"stem": "much"}), "got observed {'stem': 'much'}"),
    BadState("gradients", lambda s: s.update(gradients=[1]), "got gradients [1], expected that of"),
    BadState("sums", lambda s: s.update(gradients={"stem": (torch.ones(9), 1)}), "got gradients {'stem'"),
    BadState("no pass", lambda s: s.update(gradients={"neck": (torch.ones(2), 0)}), "got gradients {'neck'"),
    BadState(
        "foreign", lambda s: s.update(gradients={"layer1": (torch.ones(2), 1)}), "got gradients {'layer1'"
    ),
    BadState("since_draw", lambda s: s.update(since_draw={}), "got since_draw {}, expected that of"),
    BadState("norms", lambda s: s["since_draw"].update(last=3), "got since_draw {'epochs'"),
)


def unchanged(drawn: tk.ChannelSampler, before: dict[str, Any]) -> bool:
    """Whether the sampler and its layers are as they were."""
    after = drawn.state_dict()
    layers = {name: layer.channels for name, layer in drawn._modules.items()}
    return (
        equal(layers, before["selection"])
        and equal(after.pop("selection"), before["selection"])
        and torch.equal(after.pop("generator"), before["generator"])
        and all(repr(value) == repr(before[name]) for name, value in after.items())
    )


@pytest.mark.parametrize("case", BAD_STATES, ids=lambda case: case.name)
def test_a_state_of_something_else_is_refused_and_changes_nothing(case: BadState) -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", resampling="2 epochs")
    drawn.resample()
    model(X).square().sum().backward()
    state = copy.deepcopy(drawn.state_dict())
    before = drawn.state_dict()
    state["selection"] = {name: channels[:1] for name, channels in state["selection"].items()}
    state["observed"] = {"stem": torch.ones(3)}
    state["gradients"] = {}
    case.change(state)
    with pytest.raises(ValueError, match="state_dict: got") as caught:
        drawn.load_state_dict(state)
    assert case.message in str(caught.value) and "\n" not in str(caught.value)
    assert unchanged(drawn, before)


def wrote_to_both(model: nn.Module) -> nn.Module:
    """The last layer with channels holds two values, of which neither can win."""
    layer = [layer for layer in sparse_layers(model).values() if len(layer.channels)][-1]
    with torch.no_grad():
        layer.weight.add_(1)
        layer.channel_weight.mul_(2)
    return model


def test_a_draw_that_a_layer_refuses_changes_none() -> None:
    model = sparse_net()
    drawn, other = sampler(model, scheme="medyate"), sampler(scheme="medyate", seed=5)
    model(X).square().sum().backward()
    before = drawn.state_dict()
    wrote_to_both(model)
    draws: tuple[Callable[[], object], ...] = (
        drawn.resample,
        lambda: drawn.load_state_dict(other.state_dict() | {"observed": {"stem": torch.ones(3)}}),
        lambda: tk.select_fraction(model, 0.5),
    )
    for draw in draws:
        with pytest.raises(RuntimeError, match="weight and channel_weight were both written"):
            draw()
        assert unchanged(drawn, before)


def test_a_draw_that_an_optimizer_refuses_changes_none() -> None:
    model = sparse_net()
    drawn = sampler(model)
    rows = [layer.channel_weight for layer in sparse_layers(model).values() if len(layer.channels)]
    optimizer = torch.optim.ASGD(rows, 0.01)
    for parameter in rows[-1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = drawn.state_dict()
    with pytest.raises(NotImplementedError, match="ASGD"):
        drawn.resample(optimizer)
    assert unchanged(drawn, before)


# -- the backward pass -----------------------------------------------------------------------------


def conv_flops(
    selected: torch.Size,
    grad_output: torch.Size,
    channels: torch.Size,
    in_channels: int,
    geometry: list[int],
    groups: int,
    out_val: object = None,
) -> int:
    return 2 * selected[1] * grad_output.numel() // groups * math.prod(geometry[:2])


def linear_flops(selected: torch.Size, grad_output: torch.Size, out_val: object = None) -> int:
    return 2 * selected.numel() * grad_output[-1]


def flops_of_backward(model: nn.Module, x: torch.Tensor) -> int:
    """What the operators of a backward pass say they compute: products, convolutions, our own."""
    ours = {
        torch.ops.trady.conv2d_channel_grad: conv_flops,
        torch.ops.trady.linear_channel_grad: linear_flops,
    }
    loss = model.train()(x).square().sum()
    # In the reference backend a weight gradient is one operator that stands for all it calls.
    with tk.backend("reference"), FlopCounterMode(display=False, custom_mapping=ours) as counter:
        loss.backward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Network:
    name: str
    make: Callable[[], nn.Module]
    layers: int


NETWORKS = (
    Network("ResidualNet", ResidualNet, 9),
    Network("resnet18", lambda: load_model("torchvision:resnet18", 5, pretrained=False).model, 21),
    Network("mobilenet_v2", lambda: load_model("torchvision:mobilenet_v2", 5, pretrained=False).model, 53),
)


@pytest.mark.parametrize("biases", (False, 3, True), ids=str)
@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_the_backward_pass_computes_what_is_counted(case: Network, biases: bool | int) -> None:
    if case.name != "ResidualNet" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install torchvision")
    x = torch.randn(2, 3, 32, 32)
    model = tk.sparsify(as_trained(case.make()), x, biases=biases)
    names = list(sparse_layers(model))
    ends = set()
    for seed in range(4):
        top = random.Random(seed).sample(names, 3)
        ranking = tk.LayerRanking(dict.fromkeys(names, 0.0) | dict.fromkeys(top, 1.0))
        drawn = tk.ChannelSampler(model, x, budget="1%", ranking=ranking, seed=seed)
        backward = drawn.backward
        ends.add(backward.ends_at)
        assert flops_of_backward(model, x) == len(x) * backward.flops
        note = next(line for line in drawn.report().splitlines() if "backward pass" in line)
        share = f"{backward.macs / drawn.full_backward.macs:.2%} of a full one"
        assert note.startswith(f"the backward pass ends at {backward.ends_at}, layer ")
        for part in (f"of {case.layers} in", f"{backward.flops:,} FLOPs a sample", share):
            assert part in note
        trained = len(tk.conversion_report(model).biases)
        assert (f"biases (train, not in the budget): {trained}, " in drawn.report()) == bool(biases)
    first = next(iter(drawn.layers))
    assert ends == {first} if biases is True else len(ends) > 1


def test_the_full_backward_pass_computes_what_is_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    x = torch.randn(2, 3, 10, 9)
    full = tk.ChannelSampler(tk.sparsify(model, x), x, budget="10%").full_backward
    assert full.ends_at == "0"
    assert flops_of_backward(tk.densify(model), x) == len(x) * full.flops


def test_what_trains_beside_the_selection_is_counted() -> None:
    x = torch.randn(2, 4)
    model = tk.sparsify(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), x)
    drawn = tk.ChannelSampler(model, x, budget=None, scheme="head-only")
    assert drawn.backward == Backward("3", 16, 0)  # the head
    model[3].requires_grad_(False)
    assert drawn.backward == Backward(None, 0, 0)
    assert "the backward pass computes nothing: no layer trains" in drawn.report()
    model[1].bias.requires_grad_(True)
    assert drawn.backward == Backward("1", 0, 32)
    drawn.load_state_dict(drawn.state_dict() | {"selection": {**drawn.selection, "0": torch.tensor([1])}})
    assert drawn.backward == Backward("0", 4, 48)


class EveryOther(DFullRandom):
    """Tries every other channel of the pool alone, ``at_most`` so many."""

    at_most: int | None = None

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        order = super().order(sizes, generator)
        return order[order % 2 == 0][: self.at_most]


def test_fixed_counts_of_an_order_that_leaves_channels_out() -> None:
    scheme = EveryOther()
    drawn = sampler(scheme=scheme, counts="fixed", budget=1_000)
    starts = accumulate((drawn.layers[name].channels for name in drawn.pool), initial=0)
    start_of = dict(zip(drawn.pool, starts, strict=False))
    before = drawn.selection
    drawn.resample()
    assert not equal(drawn.selection, before)
    for name, channels in drawn.selection.items():
        assert len(channels) == len(before[name])
        assert not ((start_of[name] + channels) % 2).any()
    before, scheme.at_most = drawn.selection, 1
    with pytest.raises(
        ValueError, match=r"^counts: got 'fixed' for the scheme .*, expected at least the \d+ of"
    ):
        drawn.resample()
    assert equal(drawn.selection, before)


@pytest.mark.parametrize("kind", (torch.optim.SGD, torch.optim.AdamW), ids=lambda kind: kind.__name__)
def test_fixed_counts_leave_every_tensor_where_it_is(kind: type[torch.optim.Optimizer]) -> None:
    """So that a CUDA graph recorded before trains the new channels."""
    model = sparse_net()
    drawn = sampler(model, scheme="d-full-random", counts="fixed")
    parameters = tk.trainable_parameters(model)
    optimizer = kind(parameters, lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    model(X).sum().backward()
    optimizer.step()

    def addresses() -> list[int]:
        states = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        tensors = [*model.state_dict(keep_vars=True).values(), *parameters, *states]
        tensors += [module.channels for module in model.modules() if hasattr(module, "channels")]
        return [tensor.data_ptr() for tensor in tensors]

    before, selection = addresses(), drawn.selection
    drawn.resample(optimizer)
    assert addresses() == before
    assert any(not torch.equal(old, drawn.selection[name]) for name, old in selection.items())


# -- the report ------------------------------------------------------------------------------------


def test_report_reads_as_a_table() -> None:
    model = sparse_net()
    drawn = sampler(model, ranking=ranking_of(model))
    lines = drawn.report().splitlines()
    table = lines[: len(drawn.layers) + 2]
    for line, (name, layer) in zip(table[1:], drawn.layers.items(), strict=False):
        count = len(drawn.selection[name])
        each, cost = layer.channel, layer.channel * count
        rank = list(ranking_of(model)).index(name) + 1
        cells = [rank, "yes" if name in POOL else "no", layer.channels, each.elements, each.macs, count]
        cells += [cost.elements, cost.bytes, cost.macs]
        assert line.split() == [name, *(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells)]
    assert table[-1].split()[-3] == f"{drawn.cost.elements:,}"
    assert "no ranking given" not in drawn.report()
    assert "head (dense, trains, not in the budget): head" in lines
    assert "no ranking given: the pool is every sparse layer" in sampler(model).report()
    assert "ranked by" not in drawn.report()
    other = sampler(model, scheme="medyate", ranking=ranking_of(model))
    assert "ranked by rgn, where medyate takes lara: rank_layers(..., metric='lara')" in other.report()
    asked = sampler(model, scheme="medyate", ranking=ranking_of(model), pool="97%")
    assert "ranked by" not in asked.report()


def test_report_names_what_stays_dense() -> None:
    class Net(nn.Sequential):
        pass

    model = Net(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    report = tk.ChannelSampler(tk.sparsify(model, x), x, budget="50%").report()
    assert "stays dense and frozen: 1, its weight is computed" in report


def test_layers_built_by_hand_need_no_sparsify() -> None:
    model = nn.Sequential(SparseLinear(4, 4), SparseLinear(4, 2))
    drawn = tk.ChannelSampler(model, torch.randn(2, 4), budget=10)
    assert drawn.cost.elements <= 10
    assert "no ranking given" in drawn.report()


# -- bad input -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    name: str
    arguments: Mapping[str, Any]
    error: type[Exception]
    message: str


BAD = (
    Bad("scheme", {"scheme": "best"}, ValueError, "scheme: got 'best', expected one of trady, s-topk-random"),
    Bad("scheme type", {"scheme": 3}, ValueError, "scheme: got 3, expected one of"),
    Bad("budget", {"budget": "12 bananas"}, ValueError, "budget: got '12 bananas', expected a positive int"),
    Bad("no budget", {"budget": None}, TypeError, "budget: got None, expected a positive int"),
    Bad("counts", {"counts": "some"}, ValueError, "counts: got 'some', expected 'free' or 'fixed'"),
    Bad("seed", {"seed": 0.5}, TypeError, "seed: got 0.5, expected an int"),
    Bad("ranking type", {"ranking": {"stem": 1.0}}, TypeError, "ranking: got dict, expected a LayerRanking"),
    Bad(
        "foreign ranking",
        {"ranking": tk.LayerRanking({"stem": 1.0, "layer1": 2.0})},
        ValueError,
        "ranking: got one that names 'layer1', expected a score for each sparse layer",
    ),
    Bad(
        "partial ranking",
        {"ranking": tk.LayerRanking({"stem": 1.0, "head": 2.0})},
        ValueError,
        "ranking: got one that lacks 'blocks.0.expand', expected a score",
    ),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_input_gets_one_sentence_and_selects_nothing(case: Bad) -> None:
    model = sparse_net()
    with pytest.raises(case.error) as caught:
        sampler(model, **case.arguments)
    assert str(caught.value).startswith(case.message) and "\n" not in str(caught.value)
    assert all(len(layer.channels) == 0 for layer in sparse_layers(model).values())


def test_a_dense_network_is_sent_to_sparsify() -> None:
    with pytest.raises(
        ValueError, match=r"model: got a ResidualNet without sparse layers.*sparsify\(model\)"
    ):
        sampler(ResidualNet())


def test_an_example_that_misses_a_layer_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, left: bool = True) -> torch.Tensor:
            return self.head(self.left(x) if left else self.right(x))

    model = tk.sparsify(Branches())
    with pytest.raises(ValueError, match="example_input: the run does not call the sparse layer 'right'"):
        tk.ChannelSampler(model, torch.randn(2, 4), budget=100)


def test_an_optimizer_that_cannot_follow_leaves_the_draw_where_it_was() -> None:
    model = sparse_net()
    drawn = sampler(model)
    before = drawn.state_dict()
    with pytest.raises(TypeError, match="optimizer: got str"):
        drawn.resample("adam")  # type: ignore[arg-type]
    after = drawn.state_dict()
    assert equal(after["selection"], before["selection"])
    assert torch.equal(after["generator"], before["generator"])
