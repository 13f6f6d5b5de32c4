"""The study of importance: expected updates against closed forms and real backward passes, shares, lags, the report."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from figures import assert_drawn
from image_folders import write_images
from networks import load_tiny
from provenance import PROVENANCE
from test_sampler import X, sampler, sparse_net

import trady_kernels as tk
from trady_kernels.batch import Example
from trady_kernels.cli import main
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_layers
from trady_kernels.study import importance as importance_module
from trady_kernels.study.cells import CellFile
from trady_kernels.study.expectation import expected_update, length_of
from trady_kernels.study.importance import (
    DRAWN,
    Importance,
    Watch,
    Watching,
    _lagged,
    importance_plan,
    importance_section,
    measurements_apart,
    most_for_their_cost,
    places_of,
    plot_importance,
    share_of,
)
from trady_kernels.study.results import RECIPES, Request, Size
from trady_kernels.study.studies import STUDIES
from trady_kernels.training import loop
from trady_kernels.training.loop import train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.results import SchemeResult
from trady_kernels.training.run import load_task
from trady_kernels.training.settings import Settings

TARGET = torch.tensor([1, 3])


def test_even_draws_have_no_bias_and_the_variance_of_the_closed_form() -> None:
    """Every pair of 6 channels once: p = 1/3 each, variance (1 - p) / p, corrected exactly for having seen all 15 pairs."""
    norms = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.5, 4.0, 0.0])}
    pairs = [
        {"a": torch.tensor([c for c in pair if c < 3]), "b": torch.tensor([c - 3 for c in pair if c >= 3])}
        for pair in itertools.combinations(range(6), 2)
    ]
    pairs = [{name: channels.long() for name, channels in pair.items()} for pair in pairs]
    many = expected_update(norms, pairs * 2_000)
    assert many.draws == 30_000
    assert many.bias == pytest.approx(0.0, abs=0.01) and many.variance == pytest.approx(2.0, rel=1e-3)
    # Few draws: the frequencies' own scatter is taken off, on average exactly.
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        drawn = [pairs[i] for i in torch.randint(15, (20,), generator=generator).tolist()]
        found.append(1 / (1 + expected_update(norms, drawn).variance))  # |u|^2 / E|x|^2
    assert sum(found) / len(found) == pytest.approx(1 / 3, rel=0.05)


def test_a_fixed_selection_has_no_variance_and_the_bias_of_what_it_lacks() -> None:
    norms = {"a": torch.tensor([3.0, 4.0])}
    found = expected_update(norms, [{"a": torch.tensor([1])}] * 3)
    assert (found.bias, found.variance) == (pytest.approx(0.6), pytest.approx(0.0, abs=1e-12))
    assert length_of(found.bias, found.variance) == pytest.approx(0.8), "4 of 5"
    with pytest.raises(ValueError, match="selections: got 1, expected at least two draws"):
        expected_update(norms, [{"a": torch.tensor([1])}])
    with pytest.raises(ValueError, match="selections: got 2 draws that share no channel with a gradient"):
        expected_update(norms, [{"a": torch.tensor([0])}, {"a": torch.tensor([1])}])


@pytest.mark.parametrize("scheme", ["trady", "d-full-random"])
def test_it_is_what_backward_passes_give(scheme: str) -> None:
    """Updates of a small network, put together from the rows' real gradients, beside the dense network's gradient."""
    model = sparse_net().eval()
    drawn = sampler(model, scheme=scheme, budget=1_500, pool="without stem" if scheme == "trady" else None)
    dense = tk.densify(copy.deepcopy(model)).requires_grad_(True)
    F.cross_entropy(dense(X), TARGET).backward()
    layers = sparse_layers(model)
    full = torch.cat([dense.get_submodule(name).weight.grad.flatten() for name in layers])
    norms = tk.channel_norms(model, [(X, TARGET)], F.cross_entropy)
    updates, selections = [], []
    for _ in range(300):
        model.zero_grad()
        F.cross_entropy(model(X), TARGET).backward()
        parts = []
        for layer in layers.values():
            scattered = torch.zeros_like(layer.weight)
            if len(layer.channels):
                layer.write_rows(scattered, layer.channels, layer.channel_weight.grad)
            parts.append(scattered.flatten())
        updates.append(torch.cat(parts))
        selections.append(drawn.selection)
        drawn.resample()
    stacked = torch.stack(updates).double()
    mean_square = stacked.square().sum(1).mean()
    square_of_mean = (stacked.sum(0).square().sum() - stacked.square().sum()) / (300 * 299)
    cosine = (stacked.mean(0) @ full.double()) / (square_of_mean.sqrt() * full.double().norm())
    found = expected_update(norms, selections)
    assert found.variance == pytest.approx(float((mean_square - square_of_mean) / square_of_mean), rel=1e-4)
    assert found.bias == pytest.approx(math.sqrt(max(1 - float(cosine) ** 2, 0)), abs=1e-3)
    length = float(square_of_mean.sqrt() / full.double().norm())
    assert length_of(found.bias, found.variance) == pytest.approx(length, rel=1e-3)


def test_shares() -> None:
    norms = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0, 12.0])}
    assert share_of(norms, {"a": torch.tensor([0]), "b": torch.tensor([0])}) == pytest.approx(5 / 13)
    assert share_of(norms, {"a": torch.tensor([], dtype=torch.int64)}) == 0.0
    assert share_of({"a": torch.zeros(2)}, {"a": torch.tensor([0])}) == 0.0


def test_most_for_their_cost() -> None:
    """By square for the price 9/2, 0, 16/100, 144/100: a's first comes first, b's second still fits 102, nothing else does."""
    norms = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0, 12.0])}
    for limit, expected in ((102, ([0], [1])), (103, ([0], [1])), (99, ([0, 1], []))):
        chosen = most_for_their_cost(norms, {"a": 2, "b": 100}, limit)
        assert (chosen["a"].tolist(), chosen["b"].tolist()) == expected
        assert share_of(norms, chosen) == pytest.approx(math.sqrt(153 if limit > 99 else 9) / 13)


def test_correlations_are_of_places_inside_layers() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    norms = torch.tensor([1.0, 5.0, 2.0, 2.0])
    assert places_of(norms).tolist() == [rank / 4 for rank in stats.rankdata(norms.numpy())]
    now = {"a": norms, "b": torch.tensor([0.1, 0.3, 0.2])}
    later = {"a": torch.tensor([0.3, 0.2, 0.5, 0.9]), "b": torch.tensor([3.0, 1.0, 2.0])}
    places = [{name: places_of(found) for name, found in measured.items()} for measured in (now, later)]
    whole = {"a": torch.arange(4), "b": torch.arange(3)}
    expected = stats.pearsonr(*(torch.cat(list(found.values())).numpy() for found in places)).statistic
    assert _lagged(places, [whole], 1) == pytest.approx(expected, abs=1e-4)
    # Of one layer it is Spearman's; of chosen channels their places among all.
    alone = [{"a": found["a"]} for found in places]
    spearman = stats.spearmanr(now["a"], later["a"]).statistic
    assert _lagged(alone, [{"a": torch.arange(4)}], 1) == pytest.approx(spearman, abs=1e-4)
    assert _lagged(alone, [{"a": torch.tensor([0, 1])}], 1) == pytest.approx(-1.0)
    assert _lagged(alone, [{"a": torch.tensor([2])}], 1) is None


def test_layers_of_larger_gradients_are_no_agreement() -> None:
    """Norms that have nothing to do with each other but for their layer."""
    generator = torch.Generator().manual_seed(0)
    measured = [
        {str(scale): 10.0**-scale * torch.rand(200, generator=generator) for scale in range(8)}
        for _ in range(2)
    ]
    places = [{name: places_of(found) for name, found in norms.items()} for norms in measured]
    everything = {name: torch.arange(200) for name in places[0]}
    correlation = _lagged(places, [everything], 1)
    assert correlation is not None and abs(correlation) < 0.1


@pytest.fixture
def recipe(tmp_path: Path) -> Settings:
    write_images(tmp_path / "pets", {"cats": 20, "dogs": 20})
    return Settings(
        model="mobilenet_v2_w035",
        data=str(tmp_path / "pets"),
        image_size=32,
        epochs=2,
        batch_size=2,
        budget="2.2%",
        learning_rate=0.05,
        threads=1,
    )


class Noting(Watching):
    """Notes which batches are looked at, and at the first draw what the oracle's channels and their rivals have."""

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        def noted(number: int = 0) -> Iterable[tuple[Example, torch.Tensor]]:
            self.numbers.append(number)
            return batches(number)

        if not self._norms:
            self.numbers: list[int] = []
            self.chosen_by = [number for number in range(4) if _is_oracles_choice(regime, batches, number)]
        super().on_selection(regime, noted)


def _is_oracles_choice(regime: Regime, batches: Batches, number: int) -> bool:
    """Whether no channel that a selection lacks has more norm for its cost, on those batches, than one it has, and costs no more."""
    norms = tk.channel_norms(regime.model, batches(number), F.cross_entropy)
    layers = measure_layers(regime.model, next(iter(batches()))[0])
    chosen, others = [], []
    for name, layer in sparse_layers(regime.model).items():
        cost = layers[name].channel.elements
        for channel, norm in enumerate(norms[name].tolist()):
            (chosen if channel in layer.channels.tolist() else others).append((cost, norm / cost))
    return all(
        max((score for cost, score in others if cost <= price), default=0.0) <= least
        for price in {cost for cost, _ in chosen}
        for least in [min(score for cost, score in chosen if cost == price)]
    )


@pytest.mark.parametrize("scheme", ["medyate", "d-det-rgn"])
def test_a_run_that_is_watched(
    scheme: str, recipe: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains as one that is not, and measures on other samples than it chooses by, each time on others."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    monkeypatch.setattr(loop, "load_model", load_tiny)
    settings = dataclasses.replace(recipe, schemes=(scheme,), budget="10%")
    data = load_task(settings)
    watching = Noting(25 if scheme == "medyate" else 2, measurements_apart(len(data.train), 2))
    results: list[SchemeResult] = [
        train_scheme(scheme, settings, data, tmp_path / f"{type(observer).__name__}.pt", observer)
        for observer in (watching, Observer())
    ]
    assert [e.train_loss for e in results[0].epochs] == [e.train_loss for e in results[1].epochs]
    assert results[0].top1 == results[1].top1
    found = watching.found(results[0].top1)
    assert watching.chosen_by[:1] == ([0] if scheme == "d-det-rgn" else []) and len(watching.chosen_by) < 4
    # Before each epoch a measurement, and the choice of most for its cost, for which costs are taken; after the last a measurement.
    assert watching.numbers == [1, 0, 0, 2, 0, 0, 3]
    assert len(found.all_channels) == len(found.selected) == len(found.held) == len(found.holdable) == 2
    assert all(-1 <= value <= 1 for value in found.all_channels if value is not None)
    for (start, end), most in zip(found.held, found.holdable, strict=True):
        assert 0 < start < 1 and 0 < end < 1 and 0 < most < 1
        assert start <= most + 0.1, "an oracle holds about what can be held, others less"
    assert found.variance is not None and found.bias is not None and 0 <= found.bias < 1
    assert found.variance == pytest.approx(0.0, abs=1e-9) if scheme == "d-det-rgn" else found.variance > 0.1


class Given(Watching):
    """Measures what it is given, by the number of the batches."""

    def __init__(self, measured: list[dict[str, torch.Tensor]]) -> None:
        super().__init__(draws=2, apart=2)
        self._given = measured

    def _norms_on(self, number: int) -> dict[str, torch.Tensor]:
        return self._given[number]


def test_what_can_be_held_is_scored_on_other_samples_than_it_is_chosen_on() -> None:
    model = sparse_net().eval()
    sampler(model, budget=1_500)
    layers = sparse_layers(model)
    chosen_on, scored_on = (
        {name: torch.zeros(layer.channel_count, dtype=torch.float64) for name, layer in layers.items()}
        for _ in range(2)
    )
    name = min(layers, key=lambda name: measure_layers(model, X)[name].channel.elements)
    chosen_on[name][1] = 1.0
    scored_on[name][1] = 3.0
    dear = max(layers, key=lambda name: measure_layers(model, X)[name].full.elements)
    scored_on[dear][-1] = 4.0
    watching = Given([chosen_on, scored_on])
    regime: Any = SimpleNamespace(model=model)
    watching.on_selection(regime, lambda number=0: [(X, TARGET)])
    assert watching._holdable == [pytest.approx(0.6)]


def test_samples_are_enough_for_measurements_on_different_ones() -> None:
    """Or a study says how many it takes; where they come again, a lag between the same ones is left out."""
    for size in ("quick", "usual"):
        for recipe in importance_plan(Request(size)).recipes.values():
            assert recipe.train_samples is not None
            assert measurements_apart(recipe.train_samples, recipe.batch_size) > recipe.epochs
    assert measurements_apart(383 + 128, 32) == 2
    with pytest.raises(ValueError, match="train_samples: got 383, expected at least 384: 4 batches of 32"):
        measurements_apart(383, 32)
    generator = torch.Generator().manual_seed(0)
    places = [{"a": torch.rand(9, generator=generator)} for _ in range(6)]
    lags = Watching(2, apart=2)._lags(places, [{"a": torch.arange(9)}] * 5)
    assert [lag is None for lag in lags] == [False, True, False, True, False]


FOUND = Importance(
    0.8,
    [0.9, 0.7, None],
    [0.5, None, None],
    [[0.2, 0.1], [0.3, 0.2], [0.4, 0.3]],
    [0.5, 0.6, 0.7],
    0.25,
    40.0,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = importance_plan(Request("usual", ("mnist", "tweets")))
    cells: CellFile[Watch, Importance] = CellFile(tmp_path / "importance.json", plan.kinds, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.ready(cells):
        # On images norms hold more, differently so with the seed; the layers do not matter.
        more = (0.1 + 0.01 * cell.seed) * (cell.drawn == "medyate") * (cell.task == "mnist")
        held = [[start + more, end] for start, end in FOUND.held]
        cells.add(cell, dataclasses.replace(FOUND, held=held))
    assert len(cells) == plan.size == 2 * 5 * 2 and {cell.draws for cell in cells} == {1000}
    cells.add(plan.cells[0], Importance(0.0, diverged=True))
    return tmp_path


def test_section(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = "\n".join(importance_section(STUDIES["importance"].load(folder)))
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): line
        for line in text.splitlines()
        if "± " in line
    }
    row = [cell.strip() for cell in rows["minilm", "trady"].split("|")[3:-1]]
    assert row == [
        *("30.0 ± 8.9", "20.0 ± 8.9", "60.0 ± 8.9", "0.90 ± 0.00", "", "0.50 ± 0.00", ""),
        *("2.4 ± 0.0", "0.25 ± 0.00", "40.00 ± 0.00"),
    ]
    assert "the learning rate 0.05 (efficientnet_lite0), 0.2 (minilm)" in text and "4 batches of 32" in text
    drawn = "the same layers (MeDyate)*"
    assert f"{drawn}, efficientnet_lite0: holds, 45.5% of its norm against 35.0%, +10.50 (p 0.03" in text
    assert f"{drawn}, minilm: not decided at the level of 5%, 35.0% of its norm against 35.0%" in text
    # The run that diverged leaves one pair.
    assert "than all layers (TraDy)*, efficientnet_lite0: not decided" in text
    assert "+0.00 over 1 pair of task and seed." in text
    assert text.count("equation 9 (MeDyate)*") == 2


def test_verdicts_on_lags_and_updates(folder: Path) -> None:
    """Ranks last in all runs but one; trady has more bias and less variance than draws from all layers, of nearly no bias."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = STUDIES["importance"].load(folder)
    cells.begin(PROVENANCE)
    for cell in list(cells):
        if cell.task == "tweets":
            scatter = 0.01 * cell.seed
            bias, variance = {"trady": (0.5, 30.0), "d-full-random": (0.05, 39.0)}.get(cell.drawn, (0.9, 2.0))
            lags = [0.8, 0.45 if (cell.drawn, cell.seed) == ("medyate", 0) else 0.6]
            cells.add(
                cell,
                dataclasses.replace(
                    FOUND, all_channels=lags, selected=lags, bias=bias + scatter, variance=variance - scatter
                ),
            )
    text = "\n".join(importance_section(cells))
    lasting = "(MeDyate draws by norms of earlier epochs)*, minilm: holds in part, in 9 of 10 runs; on average 0.80 after an epoch"
    assert f"{lasting} and 0.58 from the first epoch to the end, of selected channels 0.80 and 0.58." in text
    even = (
        "with a bias under 0.1 (ours)*, minilm: holds, in 2 of 2 runs; it has 2.5% of the gradient's length."
    )
    assert even in text
    # The scatter is that of the seed: differences are the same for both.
    assert "adds bias (ours)*, minilm: " in text and ", +0.45" in text
    assert "takes variance (ours)*, minilm: " in text and ", -9.00" in text
    both = "drawing by the norms seen so far, not evenly from the same layers, "
    assert text.count(f"*{both.capitalize()}") == 4


def test_report_and_plot(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    written, png, svg = STUDIES["importance"].report(folder)
    assert "`trady study importance`" in written.read_text()
    assert png.stat().st_size and svg.stat().st_size


def test_plot_has_a_line_for_each_way_of_drawing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(importance_module, "write_figure", lambda path, figure: figures.append(figure))
    plot_importance(folder / "plot.png", STUDIES["importance"].load(folder))
    assert_drawn(figures[0])
    shares, lagged = figures[0].axes[:2]
    assert len(shares.containers) == len(DRAWN) + 1, "and what can be held"
    assert len(lagged.containers) == 2 * len(DRAWN)


def test_command_on_a_small_network(
    recipe: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    changed: Any = importance_module
    monkeypatch.setitem(RECIPES, "pets", recipe)
    monkeypatch.setitem(changed._SIZES, "quick", Size(1, {"epochs": 1}))
    command = ["study", "importance", "--quick", "--task", "pets", "--scheme", "trady"]
    command += ["--output", str(tmp_path / "out"), "--jobs", "1"]
    assert main(command) == 0
    assert "1 of 1: pets, trady, seed 0: test" in capsys.readouterr().out
    run = STUDIES["importance"].load(tmp_path / "out")[Watch("pets", "trady", 0, 100)]
    assert len(run.held) == 1 and run.variance is not None and run.variance > 1
    with pytest.raises(ValueError, match="size: got 'tiny'"):
        importance_plan(Request("tiny"))
