"""The studies of single layers: pools of the first ones, one alone, one frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
from provenance import PROVENANCE
from test_training_studies import outcome_of

from trady_kernels.selection import LayerRanking, Pool
from trady_kernels.study.cells import CellFile
from trady_kernels.study.layers import (
    ablation_plan,
    ablation_section,
    counts_of,
    held_by,
    pool_plan,
    pool_section,
    published_count,
    rankings_of,
)
from trady_kernels.study.results import RATES, RECIPES, Request
from trady_kernels.study.studies import STUDIES
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings

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
    assert {cell.learning_rate for cell in plan.cells} == {RATES["efficientnet_lite0"]["full"]}
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
    assert rows[0][:2] == ["rgn", "random"] and "86.1 ± 1.1" in rows[0] and rows[0][-1] == "81.0 ± 1.0"
    verdicts = [line for line in text.splitlines() if line.startswith("*")]
    assert verdicts[0].startswith(
        f"*Drawing from the first {PUBLISHED} layers, which hold 97% of the RGN, is better"
    )
    assert verdicts[0].endswith("mnist: holds, +5.10 (p < 0.001), 3 of 3 won.")
    assert "random channels beat those of the largest gradient (TraDy)" in verdicts[1]
    assert "mnist: holds, +" in verdicts[1] and "at a third of the rate" in verdicts[1]
    assert "Pools by LaRa are better than pools by RGN (MeDyate)*, mnist: not decided" in verdicts[2]
    assert all("tweets: not decided" in verdict for verdict in verdicts[3:6])
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
    alone = "A layer's score tells what it brings alone (TraDy)*, mnist: holds, Spearman's correlation of layers is 1.00 by rgn"
    frozen = "costs when frozen (TraDy)*, mnist: the opposite was found, Spearman's correlation of layers is -1.00 by rgn"
    assert f"{alone} (p < 0.001)" in text and f"{frozen} (p < 0.001)" in text


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
