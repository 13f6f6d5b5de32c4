"""``d-det-rgn``, ``s-det-rgn``, ``last-layers``: the order worked out by hand, and what they ask for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sampler import X, cost_of, equal, sampler, sparse_net

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Cost, LayerCost, measure_layers
from trady_kernels.selection import SCHEMES
from trady_kernels.selection.schemes.late import Late

TARGET = torch.tensor([1, 3])


def random_norms(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.channel_count, generator=generator, dtype=torch.float64)
        for name, layer in sparse_layers(sparse_net()).items()
    }


@pytest.mark.parametrize("scheme", ["d-det-rgn", "s-det-rgn"])
@pytest.mark.parametrize("budget", [500, 2_000, "4KiB"])
def test_the_highest_rgn_that_fits_comes_first(scheme: str, budget: int | str) -> None:
    model, norms = sparse_net(), random_norms(0)
    drawn = sampler(model, scheme=scheme, budget=budget, gradients=lambda: norms)
    costs = measure_layers(model, X)
    channels = [(name, index) for name in norms for index in range(len(norms[name]))]
    channels.sort(key=lambda at: -float(norms[at[0]][at[1]]) / costs[at[0]].channel.elements)
    assert drawn.budget is not None
    left = drawn.budget.limit(drawn.full_cost)
    expected: dict[str, list[int]] = {name: [] for name in norms}
    for name, index in channels:
        if drawn.budget.of(costs[name].channel) <= left:
            left -= drawn.budget.of(costs[name].channel)
            expected[name].append(index)
    assert {name: chosen.tolist() for name, chosen in drawn.selection.items()} == {
        name: sorted(indices) for name, indices in expected.items()
    }
    assert drawn.cost == cost_of(drawn)
    assert "an oracle" in drawn.report()


def test_the_dynamic_one_measures_before_each_draw_and_the_static_one_once() -> None:
    for scheme, calls in (("d-det-rgn", 3), ("s-det-rgn", 1)):
        asked: list[int] = []

        def measure(asked: list[int] = asked) -> dict[str, torch.Tensor]:
            asked.append(1)
            return random_norms(len(asked))

        drawn = sampler(scheme=scheme, budget=800, gradients=measure)
        first = drawn.selection
        drawn.resample()
        drawn.resample()
        assert len(asked) == calls
        assert equal(drawn.selection, first) == (calls == 1)


def test_channel_norms_are_what_it_takes() -> None:
    model = sparse_net()
    drawn = sampler(
        model,
        scheme="d-det-rgn",
        budget=800,
        gradients=lambda: tk.channel_norms(model, [(X, TARGET)], F.cross_entropy),
    )
    before = drawn.selection
    drawn.resample()  # the weights are the same
    assert equal(drawn.selection, before) and drawn.cost.elements > 700


@pytest.mark.parametrize("counts", ["free", "fixed"])
def test_an_interrupted_run_goes_on_with_the_same_channels(counts: str) -> None:
    drawn = sampler(scheme="d-det-rgn", budget=800, counts=counts, gradients=lambda: random_norms(1))
    file = io.BytesIO()
    torch.save(drawn.state_dict(), file)
    file.seek(0)
    resumed = sampler(scheme="d-det-rgn", budget=800, counts=counts, gradients=lambda: random_norms(2))
    assert not equal(resumed.selection, drawn.selection)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert equal(resumed.selection, drawn.selection) and resumed.cost == drawn.cost


def test_a_measurement_that_fails_changes_nothing() -> None:
    given: list[Callable[[], Mapping[str, torch.Tensor]]] = [lambda: random_norms(1), lambda: 1 / 0]
    drawn = sampler(scheme="d-det-rgn", budget=800, gradients=lambda: given.pop(0)())
    before = copy.deepcopy(drawn.state_dict())
    with pytest.raises(ZeroDivisionError):
        drawn.resample()
    after = drawn.state_dict()
    assert equal(after["selection"], before["selection"])
    assert torch.equal(after["generator"], before["generator"])


def one_missing() -> dict[str, torch.Tensor]:
    return {name: norms for name, norms in random_norms(0).items() if name != "neck"}


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        (None, ValueError, "gradients: got None, expected a function that measures"),
        (random_norms(0), TypeError, "gradients: got {"),
        (
            one_missing,
            ValueError,
            "gradients: the function gave None for layer 'neck', expected the norms of 8",
        ),
        (
            lambda: random_norms(0) | {"neck": torch.ones(3)},
            ValueError,
            "gradients: the function gave tensor([1., 1., 1.]) for layer 'neck'",
        ),
        (
            lambda: random_norms(0) | {"neck": torch.full((8,), torch.nan)},
            ValueError,
            "gradients: the function gave tensor([nan,",
        ),
    ],
    ids=["missing", "no function", "layer", "shape", "nan"],
)
def test_bad_gradients_get_one_sentence(gradients: Any, error: type[Exception], message: str) -> None:
    model = sparse_net()
    with pytest.raises(error) as caught:
        sampler(model, scheme="s-det-rgn", gradients=gradients)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not any(len(layer.channels) for layer in sparse_layers(model).values())


def test_the_last_layers_are_taken_whole() -> None:
    costs = measure_layers(sparse_net(), X)
    names = list(sparse_layers(sparse_net()))
    last, before = costs[names[-1]], costs[names[-2]]
    drawn = sampler(scheme="last-layers", budget=last.full.elements + 2 * before.channel.elements)
    counts = {name: len(chosen) for name, chosen in drawn.selection.items()}
    assert (counts[names[-1]], counts[names[-2]]) == (last.channels, 2)
    left = drawn.budget.amount - drawn.cost.elements if drawn.budget else 0
    assert left < min(costs[name].channel.elements for name in names[:-1])
    first = drawn.selection
    drawn.resample()
    assert equal(drawn.selection, first)
    assert not sampler(scheme="last-layers", budget=1).cost.elements


def test_late_layers_are_those_behind_which_a_third_of_the_elements_lies() -> None:
    """Inputs of 60, 6, 20, 9 and 5 elements: 5 + 9 is below a third of 100, 5 + 9 + 20 above it."""
    sizes = {"a": 60, "b": 6, "c": 20, "d": 9, "e": 5}
    layers = {name: LayerCost(name, 1, Cost(1, size, 4 * size, 1)) for name, size in sizes.items()}
    assert Late().reach(layers) == ["d", "e"]
    ranking = tk.LayerRanking({"a": 5.0, "b": 1.0, "c": 3.0, "d": 0.01, "e": 2.0})
    assert Late().pool(layers, ranking, None) == ["e"]
    assert Late().pool(layers, None, None) == ["d", "e"]
    large = {"a": layers["b"], "b": LayerCost("b", 1, Cost(1, 90, 360, 1))}
    assert Late().reach(large) == ["b"], "one layer at least"
    assert list(SCHEMES["trady"]().reach(layers)) == list(layers)


def test_late_draws_anew_inside_its_pool() -> None:
    drawn = sampler(scheme="late", budget=200)
    reached = set(Late().reach(drawn.layers))
    assert drawn.pool and set(drawn.pool) <= reached < set(drawn.layers)
    before = drawn.selection
    drawn.resample()
    assert not equal(drawn.selection, before) and drawn.cost.elements <= 200
    assert all(not len(chosen) for name, chosen in drawn.selection.items() if name not in drawn.pool)


class Backwards(torch.nn.Module):
    """Its layers are defined in the opposite order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)
        self.late = torch.nn.Conv2d(8, 4, 3, stride=2)
        self.early = torch.nn.Conv2d(3, 8, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(self.early(input).relu()).relu().mean((2, 3)))


def test_the_last_layers_are_those_called_last() -> None:
    example = torch.randn(2, 3, 8, 8)
    model = tk.sparsify(Backwards(), example, head="head")
    drawn = tk.ChannelSampler(model, example, budget=3 * (36 + 36), scheme="last-layers")
    assert list(drawn.layers) == ["early", "late"]
    assert (len(drawn.selection["early"]), len(drawn.selection["late"])) == (0, 3)
    # 288 input elements of the late layer are more than a third of 480, but the last layer is always within reach.
    assert tk.ChannelSampler(model, example, budget=72, scheme="late").pool == ["late"]
