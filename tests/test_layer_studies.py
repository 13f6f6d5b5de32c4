"""The studies of single layers: pools of the first ones, one alone, one frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figures import assert_drawn
from networks import ResidualNet, load_tiny
from provenance import PROVENANCE
from test_training_studies import outcome_of, tiny_recipe, trained
from torch import nn

from trady_kernels.selection import LayerRanking, Pool
from trady_kernels.selection.ranking import METRICS
from trady_kernels.study import layers as layers_module
from trady_kernels.study.cells import CellFile, Listed
from trady_kernels.study.layers import (
    ablation_plan,
    ablation_section,
    counts_of,
    held_by,
    plot_pool,
    pool_plan,
    pool_section,
    published_count,
    rankings_of,
)
from trady_kernels.study.results import RATES, RECIPES, Request, Size
from trady_kernels.study.studies import STUDIES
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings
from trady_kernels.training import loop
from trady_kernels.training.plot import COLOURS

KINDS = (Training, TrainingOutcome)
TASKS = ("mnist", "tweets")
PUBLISHED = published_count({"rgn": LayerRanking.shipped("efficientnet_lite0")})
RANKING = list(LayerRanking.shipped("efficientnet_lite0"))


def test_pools_have_these_sizes() -> None:
    images, sentences = (rankings_of(RECIPES[task]) for task in TASKS)
    held = held_by(images["rgn"])
    published = next(count for count in range(1, 50) if held[count - 1] >= 0.97)
    assert counts_of(images) == sorted({6, 12, 24, 49, published}) and counts_of(sentences)[-1] == 36
    plan = pool_plan(Request("usual", TASKS))
    assert len(set(plan.cells)) == plan.size
    for task, rankings in zip(TASKS, (images, sentences), strict=True):
        pools = {cell.pool for cell in plan.cells if cell.task == task}
        assert len(pools) == 3 * (len(counts_of(rankings)) - 1) + 1
        for cell in plan.cells:
            settings = cell.settings(plan.recipes[cell.task])
            assert settings.pool == cell.pool and Pool.parse(cell.pool).metric in ("rgn", "lara", "norm")
    quick = pool_plan(Request("quick"))
    assert {cell.task for cell in quick.cells} == {"digits"} and quick.size == 2 * 4
    for make in (pool_plan, ablation_plan):
        with pytest.raises(ValueError, match="size: got 'tiny'"):
            make(Request("tiny"))


def test_a_ranking_of_ones_own(tmp_path: Path) -> None:
    """Pools and places are by it alone, and trainings are told of it."""
    LayerRanking(dict.fromkeys(RANKING[:9], 1.0), "lara").save(tmp_path / "mine.json")
    request = Request("usual", ("mnist",), ranking=str(tmp_path / "mine.json"))
    plan = pool_plan(request)
    assert {cell.pool.rpartition(" by ")[2] for cell in plan.cells} == {"lara"}
    for cell in plan.cells:
        assert cell.settings(plan.recipes["mnist"]).ranking == str(tmp_path / "mine.json")
    assert {cell.pool.rpartition(" ")[2] for cell in ablation_plan(request).cells} == {
        "",
        "100%",
        *RANKING[:9],
    }
    with pytest.raises(ValueError, match="ranking: got none for timm:resnet18, expected a file: trady rank"):
        pool_plan(Request("usual", ("timm:resnet18 on digits",)))


def test_ablations_name_every_layer() -> None:
    plan = ablation_plan(Request("usual", ("mnist",)))
    assert plan.size == len(set(plan.cells)) == 2 * (2 + 2 * 49)
    assert {cell.learning_rate for cell in plan.cells} == {0.0033}
    assert RATES["efficientnet_lite0"]["full"] == 0.01
    assert {cell.pool for cell in plan.cells} == {
        *("", "100%"),
        *(f"{kind} {name}" for kind in ("only", "without") for name in RANKING),
    }
    assert ablation_plan(Request("quick")).size == 2 + 2 * 5


def test_what_the_first_layers_hold() -> None:
    assert held_by(LayerRanking({"a": 1.0, "b": 3.0})) == [0.75, 1.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """On images the paper's pool is best, drawn from at random; the better a layer's RGN the more it brings alone, and the less
    it costs frozen."""
    plan = pool_plan(Request("usual", TASKS))
    cells: Trainings = CellFile(tmp_path / "pool.json", KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        best = cell.pool.startswith(f"{PUBLISHED} layers") and (cell.task, cell.scheme) == ("mnist", "trady")
        cells.add(cell, outcome_of(0.8 + (0.05 + 0.001 * cell.seed) * best + 0.01 * cell.seed))
    plan = ablation_plan(Request("usual", ("mnist",)))
    cells = CellFile(tmp_path / "ablation.json", KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        kind, _, name = cell.pool.partition(" ")
        place = RANKING.index(name) if name else 0
        top1 = {"": 0.5, "100%": 0.95, "only": 0.9 - 0.005 * place, "without": 0.9 - 0.001 * place}[kind]
        cells.add(cell, outcome_of(top1 + 0.01 * cell.seed))
    return tmp_path


def test_pool_section(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = "\n".join(pool_section(STUDIES["pool"].load(folder)))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| rgn ")
    ]
    assert rows[0][:3] == ["rgn", "random", "0.05"] and rows[1][:3] == ["rgn", "deterministic", "0.017"]
    assert "86.1 ± 1.1" in rows[0] and rows[0][-1] == "81.0 ± 1.0"
    verdicts = [line for line in text.splitlines() if line.startswith("*")]
    assert verdicts[0].startswith(
        f"*Drawing from the first {PUBLISHED} layers, which hold 97% of the RGN, is better"
    )
    assert verdicts[0].endswith("mnist, rate 0.05: holds, +5.10 (p < 0.001), 3 of 3 seeds won.")
    # 5.0, 5.1 and 5.2 points of the seeds in 3 of 13 pools; all layers are one pool, not one a metric.
    assert verdicts[1] == (
        "*Inside a pool random channels beat those of the largest gradient (TraDy)*, mnist, rate 0.05 against 0.017: holds, "
        "+1.18 (p < 0.001), 3 of 3 seeds won, means over 39 pairs of runs."
    )
    assert (
        "Pools by LaRa are better than pools by RGN (MeDyate)*, mnist, rate 0.05: not decided" in verdicts[2]
    )
    assert "means over 12 pairs of runs" in verdicts[2]
    assert all("tweets, rate 0.2" in verdict and "not decided" in verdict for verdict in verdicts[3:6])
    shares = held_by(LayerRanking.shipped("efficientnet_lite0"))
    half = next(place for place, share in enumerate(shares, start=1) if share >= 0.5)
    assert f"efficientnet_lite0: {'holds' if half < 12.25 else 'does not hold'}, in {half} of 49" in text


def test_ablation_section(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = "\n".join(ablation_section(STUDIES["ablation"].load(folder)))
    first = next(line for line in text.splitlines() if line.startswith(f"| {RANKING[0]} "))
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    scores = LayerRanking.shipped("efficientnet_lite0")
    assert cells[1] == f"{100 * scores[RANKING[0]] / sum(scores.values()):.2f}"
    assert cells[-2:] == ["40.0 ± 0.0", "5.0 ± 0.0"]
    assert text.count("| _blocks.") + text.count("| _conv") == 49
    alone = "A layer's score tells what it brings alone (TraDy)*, mnist, rate 0.0033: holds, Spearman's correlation of layers is 1.00 by rgn"
    frozen = "costs when frozen (TraDy)*, mnist, rate 0.0033: the opposite was found, Spearman's correlation of layers is -1.00 by rgn"
    assert f"{alone} (p < 0.001)" in text and f"{frozen} (p < 0.001)" in text


def some(path: Path, outcome: Callable[[Training], TrainingOutcome | None]) -> Trainings:
    """A file with those runs of the study of pools, on one task, that have an outcome."""
    plan = pool_plan(Request("usual", ("mnist",)))
    cells: Trainings = CellFile(path, KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        if (found := outcome(cell)) is not None:
            cells.add(cell, found)
    return cells


def test_pairs_are_of_the_same_seed(tmp_path: Path) -> None:
    """Of a study that is half done: pools of all layers lack seed 0, which is better by far; the others are equal."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")

    def outcome(cell: Training) -> TrainingOutcome | None:
        wanted = {f"{PUBLISHED} layers by rgn": (0, 1, 2), "49 layers by rgn": (1, 2)}.get(cell.pool, ())
        if cell.scheme != "trady" or cell.seed not in wanted:
            return None
        return outcome_of(0.9 if cell.seed == 0 else 0.8 + 0.01 * cell.seed)

    text = "\n".join(pool_section(some(tmp_path / "pool.json", outcome)))
    assert "(TraDy)*, mnist, rate 0.05: not decided at the level of 5%, +0.00" in text
    assert "0 of 2 seeds won." in text and "Inside a pool" not in text


def test_runs_of_other_rates_stand_apart(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = some(tmp_path / "pool.json", lambda cell: outcome_of(0.8 + 0.01 * cell.seed))
    for cell in list(cells):
        if cell.scheme == "d-det-rgn":
            cells.add(dataclasses.replace(cell, learning_rate=0.05), outcome_of(0.1 + 0.02 * cell.seed))
    text = "\n".join(pool_section(cells))
    assert (
        text.count("| deterministic | 0.017 | 81.0 ± 1.0")
        == text.count("| deterministic |  0.05 | 12.0 ± 2.0")
        == 3
    )
    inside = [line for line in text.splitlines() if line.startswith("*Inside a pool")]
    assert ["against 0.017: not decided" in line for line in inside] == [True, False]
    assert (
        "mnist, rate 0.05 against 0.05: holds, +69.00 (p < 0.001), 3 of 3 seeds won, means over 39 pairs"
        in inside[1]
    )


def test_ablations_of_other_rates_stand_apart(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells: Trainings = CellFile(tmp_path / "ablation.json", KINDS, {"mnist": RECIPES["mnist"]})
    cells.begin(PROVENANCE)
    for rate, scale in ((0.01, 1.0), (0.3, 0.5)):
        cells.add(Training("mnist", "head-only", "", rate, 0, False), outcome_of(0.5 * scale))
        for pool, top1 in (("100%", 0.9), (f"only {RANKING[0]}", 0.8), (f"without {RANKING[0]}", 0.7)):
            cells.add(Training("mnist", "trady", "100%", rate, 0, False, pool=pool), outcome_of(top1 * scale))
    text = "\n".join(ablation_section(cells))
    for rate, alone, frozen in ((0.01, "30.0", "20.0"), (0.3, "15.0", "10.0")):
        section = text.partition(f"mnist, efficientnet_lite0, rate {rate:g}:")[2]
        first = next(line for line in section.splitlines() if line.startswith(f"| {RANKING[0]} "))
        assert [cell.strip() for cell in first.split("|")[-3:-1]] == [alone, frozen]


def test_ablations_that_learned_nothing_are_named(tmp_path: Path) -> None:
    """And what is found without them; of a few layers no correlation is told."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")

    def text(count: int) -> str:
        """The more of the gradient a layer has, the less it costs frozen; without the first two nothing is learned."""
        cells: Trainings = CellFile(tmp_path / f"{count}.json", KINDS, {"mnist": RECIPES["mnist"]})
        cells.begin(PROVENANCE)
        cells.add(Training("mnist", "head-only", "", 0.1, 0, False), outcome_of(0.5))
        cells.add(Training("mnist", "trady", "100%", 0.1, 0, False, pool="100%"), outcome_of(0.9))
        for place, name in enumerate(RANKING[:count]):
            frozen = Training("mnist", "trady", "100%", 0.1, 0, False, pool=f"without {name}")
            cells.add(frozen, outcome_of(0.2 if place < 2 else 0.9 - 0.01 * place))
        return "\n".join(ablation_section(cells))

    told = text(12)
    assert "mnist, rate 0.1: 2 of 12 runs with a frozen layer end below the head alone" in told
    assert "costs when frozen (TraDy)*, mnist, rate 0.1: not decided at the level of 5%" in told
    assert "of the layers without such a run the correlation is -1.00 by rgn (p < 0.001), " in told
    few = text(9)
    assert "2 of 9 runs with a frozen layer" in few and few.endswith("what freezing one costs is chance.")
    assert "A layer's score tells" not in few


def test_layers_that_lack_a_seed_are_not_compared(tmp_path: Path) -> None:
    """The second seed is the worse one by far, and only half of the layers have it."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells: Trainings = CellFile(tmp_path / "cells.json", KINDS, {"mnist": RECIPES["mnist"]})
    cells.begin(PROVENANCE)
    for seed, lower in enumerate((0.0, 0.3)):
        cells.add(Training("mnist", "head-only", "", 0.1, seed, False), outcome_of(0.5))
        for place, name in enumerate(RANKING[: 24 if seed == 0 else 12]):
            alone = Training("mnist", "trady", "100%", 0.1, seed, False, pool=f"only {name}")
            cells.add(alone, outcome_of(0.9 - lower - 0.01 * place))
    assert "Spearman's correlation of layers is 1.00 by rgn" in "\n".join(ablation_section(cells))


@pytest.mark.parametrize("name", ["pool", "ablation"])
def test_reports_and_plots(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figures: list[Any] = []
    written = layers_module.write_figure
    monkeypatch.setattr(
        layers_module,
        "write_figure",
        lambda path, figure: (figures.append(figure), written(path, figure)),
    )
    document, png, svg = STUDIES[name].report(folder)
    assert f"`trady study {name}`" in document.read_text()
    assert png.stat().st_size and svg.stat().st_size
    for figure in figures:
        assert_drawn(figure)
    titles = [axes.get_title() for axes in figures[0].axes]
    if name == "ablation":
        assert titles == ["mnist, rate 0.0033"] * 2  # what is drawn, the axes say
        return
    assert titles == [
        *("mnist, random", "mnist, deterministic", "tweets, random", "tweets, deterministic"),
        *("efficientnet_lite0", "minilm"),
    ]
    for axes in figures[0].axes:
        colours = {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in METRICS}
        assert colours == dict(zip(METRICS, COLOURS, strict=False)), "a metric has one colour everywhere"


def test_one_bad_run_does_not_set_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an arrow at the foot of the axis, with its value."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(layers_module, "write_figure", lambda path, figure: figures.append(figure))
    bad = Training("mnist", "trady", "2.2%", 0.05, 1, False, pool="12 layers by rgn")
    cells = some(
        tmp_path / "pool.json",
        lambda cell: outcome_of(0.4 if cell == bad else 0.8 + 0.01 * cell.seed + 0.001 * len(cell.pool)),
    )
    assert bad in cells
    plot_pool(tmp_path / "plot.png", cells)
    random, deterministic = figures[0].axes[:2]
    assert random.get_ylim() == deterministic.get_ylim() and random.get_ylim()[0] > 70
    assert [text.get_text() for text in random.texts] == ["40"] and not deterministic.texts


@pytest.mark.parametrize(
    ("make", "section", "words"),
    [
        (pool_plan, pool_section, ("| lara ", "K = 1 ", "K = 8 ")),
        (ablation_plan, ablation_section, ("| stem ", "| alone ", "rate 0.0033")),
    ],
)
def test_runs_of_a_tiny_network(
    make: Callable[[Request], Listed[Training, TrainingOutcome]],
    section: Callable[[Trainings], list[str]],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole study in seconds, trainings and all."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    monkeypatch.setattr(loop, "load_model", load_tiny)
    monkeypatch.setitem(RECIPES, "pets", tiny_recipe(tmp_path))
    changed: Any = layers_module
    monkeypatch.setattr(changed, "SMALLEST_BUDGET", "30%")  # of few channels
    for sizes in (changed._SIZES, changed._ABLATION_SIZES):
        monkeypatch.setitem(sizes, "quick", Size(1, {"epochs": 1}))
    layers = [
        name for name, part in ResidualNet().named_modules() if isinstance(part, nn.Conv2d | nn.Linear)
    ][:-1]
    scores = {name: float(len(layers) - place) for place, name in enumerate(layers)}
    LayerRanking(scores, "lara").save(tmp_path / "mine.json")
    plan = make(Request("quick", ("pets",), ranking=str(tmp_path / "mine.json")))
    cells = trained(plan, tmp_path / "cells.json")
    assert len(cells) == plan.size == {pool_plan: 4, ablation_plan: 4}[make]
    assert all(cells[cell].curves and not cells[cell].diverged for cell in cells)
    text = "\n".join(section(cells))
    assert all(word in text for word in words)
