"""The studies of single layers: pools of the first ones, one alone, one frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_training_studies import PROVENANCE, outcome_of

from trady_kernels.selection import LayerRanking, Pool
from trady_kernels.study.cells import CellFile
from trady_kernels.study.layers import (
    ablation_plan,
    ablation_section,
    counts_of,
    held_by,
    pool_plan,
    pool_section,
)
from trady_kernels.study.results import RATES
from trady_kernels.study.studies import STUDIES
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings

KINDS = (Training, TrainingOutcome)
TASKS = ("mnist", "tweets")
RANKING = list(LayerRanking.shipped("efficientnet_lite0"))


def test_pools_have_these_sizes() -> None:
    assert counts_of("efficientnet_lite0") == [3, 6, 12, 24, 37, 49] and counts_of("minilm")[-1] == 36
    plan = pool_plan("usual", TASKS)
    assert len(set(plan.cells)) == plan.size
    for task, model in zip(TASKS, ("efficientnet_lite0", "minilm"), strict=True):
        pools = {cell.pool for cell in plan.cells if cell.task == task}
        assert len(pools) == 3 * (len(counts_of(model)) - 1) + 1
        for cell in plan.cells:
            settings = cell.settings(plan.recipes[cell.task])
            assert settings.pool == cell.pool and Pool.parse(cell.pool).metric in ("rgn", "lara", "norm")
    quick = pool_plan("quick")
    assert {cell.task for cell in quick.cells} == {"digits"} and quick.size == 2 * 4
    for make in (pool_plan, ablation_plan):
        with pytest.raises(ValueError, match="size: got 'tiny'"):
            make("tiny")


def test_ablations_name_every_layer() -> None:
    plan = ablation_plan("usual", ("mnist",))
    assert plan.size == len(set(plan.cells)) == 2 * (2 + 2 * 49)
    assert {cell.learning_rate for cell in plan.cells} == {RATES["efficientnet_lite0"]["full"]}
    assert {cell.pool for cell in plan.cells} == {
        *("", "100%"),
        *(f"{kind} {name}" for kind in ("only", "without") for name in RANKING),
    }
    assert ablation_plan("quick").size == 2 + 2 * 5


def test_what_the_first_layers_hold() -> None:
    assert held_by(LayerRanking({"a": 1.0, "b": 3.0})) == [0.75, 1.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pools of half the layers are best; the better a layer's RGN the more it brings alone, and the less it costs frozen."""
    plan = pool_plan("usual", TASKS)
    cells: Trainings = CellFile(tmp_path / "pool.json", KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        best = cell.pool.startswith(("24 layers", "18 layers")) and cell.task == "mnist"
        cells.add(cell, outcome_of(0.8 + 0.05 * best + 0.01 * cell.seed))
    plan = ablation_plan("usual", ("mnist",))
    cells = CellFile(tmp_path / "ablation.json", KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        kind, _, name = cell.pool.partition(" ")
        place = RANKING.index(name) if name else 0
        top1 = {"": 0.5, "100%": 0.95, "only": 0.9 - 0.005 * place, "without": 0.9 - 0.001 * place}[kind]
        cells.add(cell, outcome_of(top1 + 0.01 * cell.seed))
    return tmp_path


def test_pool_section(folder: Path) -> None:
    text = "\n".join(pool_section(STUDIES["pool"].load(folder)))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| rgn ")
    ]
    assert rows[0][:2] == ["rgn", "random"] and rows[0][5] == "85.5 ± 0.7" and rows[0][-1] == "80.5 ± 0.7"
    assert "mnist: holds, K = 24 is best with 85.5, all 49 layers have 80.5" in text
    assert "tweets: does not hold" in text
    shares = held_by(LayerRanking.shipped("efficientnet_lite0"))
    half = next(place for place, share in enumerate(shares, start=1) if share >= 0.5)
    assert f"efficientnet_lite0: {'holds' if half < 12.25 else 'does not hold'}, in {half} of 49" in text


def test_ablation_section(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = "\n".join(ablation_section(STUDIES["ablation"].load(folder)))
    first = next(line for line in text.splitlines() if line.startswith(f"| {RANKING[0]} "))
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[1] == "1" and cells[-2:] == ["40.0 ± 0.0", "5.0 ± 0.0"]
    assert text.count("| _blocks.") + text.count("| _conv") == 49
    assert "alone rgn 1.00 (p 0.000)" in text and "frozen rgn -1.00 (p 0.000)" in text


@pytest.mark.parametrize("name", ["pool", "ablation"])
def test_reports_and_plots(name: str, folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    image = pytest.importorskip(
        "matplotlib.image", reason="matplotlib is not installed: pip install matplotlib"
    )
    written, png, svg = STUDIES[name].report(folder)
    assert f"`trady study {name}`" in written.read_text()
    assert 0.005 < (image.imread(png)[..., :3] < 0.9).any(-1).mean() < 0.8, "ink, on paper"
    assert svg.read_bytes().count(b"<path") > 10
