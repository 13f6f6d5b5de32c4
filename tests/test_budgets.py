"""What the studies of budgets make of runs of the results table: means, verdicts and pictures."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from figures import assert_drawn, saved_figures
from in_print import assert_readable
from provenance import PROVENANCE
from test_training_studies import outcome_of

from trady_kernels.study.budgets import (
    _budget_verdicts,
    _rows,
    budget_section,
    by_network,
    efficiency_section,
    finals_of,
    plot_budget,
    plot_efficiency,
)
from trady_kernels.study.cells import CellFile
from trady_kernels.study.plot import SHOWN, over_tasks, plot_savings, shown_of
from trady_kernels.study.results import RECIPES, SCHEMES
from trady_kernels.study.steps import STEPS, StepTimes, Timing, Timings
from trady_kernels.study.trainings import KINDS, Training, TrainingOutcome, Trainings
from trady_kernels.study.verdicts import Verdict
from trady_kernels.training.ingredients import Spec

IMAGES, TEXTS = ("mnist", "digits"), ("tweets",)


@pytest.fixture
def cells(tmp_path: Path) -> Trainings:
    found: Trainings = CellFile(
        tmp_path / "results.json", KINDS, {task: RECIPES[task] for task in (*IMAGES, *TEXTS)}
    )
    found.begin(PROVENANCE)
    return found


def add(
    cells: Trainings, task: str, scheme: str, budget: str, top1s: tuple[float, ...], **differing: Any
) -> None:
    for seed, top1 in enumerate(top1s):
        cells.add(
            Training(task, scheme, budget, 0.1, seed, False),
            dataclasses.replace(outcome_of(top1), **differing),
        )


def images_of(cells: Trainings) -> dict[Training, TrainingOutcome]:
    return by_network(cells, finals_of(cells))["efficientnet_lite0"]


def test_accuracies_are_means_over_tasks(cells: Trainings) -> None:
    """Of every seed the mean over tasks: 82 and 86; the bar is their deviation. What has not run on all tasks is left out."""
    add(cells, "mnist", "frugal@5.2%", "2.2%", (0.80, 0.82))
    add(cells, "digits", "frugal@5.2%", "2.2%", (0.84, 0.90, 0.10))
    add(cells, "mnist", "frugal@2%", "1%", (0.7,), saved_bytes=0)
    add(cells, "digits", "frugal@2%", "1%", (0.8,), saved_bytes=2**20)
    add(cells, "mnist", "trady", "2.2%", (0.99,))
    tasks, series = over_tasks(images_of(cells))
    assert tasks == ["digits", "mnist"] and list(series) == ["frugal"]
    assert series["frugal"] == [
        pytest.approx((1.0, 75.0, 0.0)),  # half a MiB of gradients, and none or one saved
        pytest.approx((1.5, 84.0, 8**0.5)),
    ]


def test_runs_that_diverged_count_as_0_and_have_no_bytes(cells: Trainings) -> None:
    for task in IMAGES:
        add(cells, task, "trady", "2.2%", (0.8,))
        add(cells, task, "lora", "2.2%", (0.0,), diverged=True)
    cells.add(Training("mnist", "trady", "2.2%", 0.1, 0, False), TrainingOutcome(0.0, diverged=True))
    assert over_tasks(images_of(cells))[1] == {"trady": [pytest.approx((1.5, 40.0, 0.0))]}


def verdicts_of(cells: Trainings) -> dict[str, Verdict]:
    found = [line for line in _budget_verdicts(cells, _rows(cells)) if isinstance(line, Verdict)]
    return {verdict.where: verdict for verdict in found}


def test_a_source_is_named_for_its_own_scheme_alone(cells: Trainings) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    for scheme in ("trady", "medyate", "last-layers", "trady+momentum"):
        add(cells, "mnist", scheme, "1%", (0.80, 0.81, 0.82))
        add(cells, "mnist", scheme, "7%", (0.85, 0.87, 0.86))
    claims = {where.split(", ")[1]: verdict.claim for where, verdict in verdicts_of(cells).items()}
    assert claims == {
        "trady": "A larger budget buys accuracy (TraDy)",
        "medyate": "A larger budget buys accuracy (MeDyate)",
        "last-layers": "A larger budget buys accuracy",
        "trady+momentum": "A larger budget buys accuracy",
    }
    assert verdicts_of(cells)["efficientnet_lite0, trady, 7% against 1%"].verdict == "holds"


def test_one_pair_is_no_verdict(cells: Trainings) -> None:
    """Where the widest two budgets have one pair in common, the widest two that have more are compared."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    add(cells, "tweets", "trady", "1%", (0.7,))
    add(cells, "tweets", "trady", "2.2%", (0.8, 0.8))
    assert not verdicts_of(cells)
    assert "buys accuracy" not in "\n".join(budget_section(cells))
    add(cells, "tweets", "trady", "7%", (0.85, 0.9))
    assert list(verdicts_of(cells)) == ["minilm, trady, 7% against 2.2%"]
    assert "won" in "\n".join(budget_section(cells))


def test_a_rate_at_an_end_of_those_tried_is_said_with_the_verdict(cells: Trainings) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    add(cells, "mnist", "trady", "1%", (0.80, 0.81))
    add(cells, "mnist", "trady", "7%", (0.85, 0.87))
    for rate in (0.05, 0.1, 0.2):
        cells.add(Training("mnist", "trady", "1%", rate, 0, True), outcome_of(0.8))
    (verdict,) = verdicts_of(cells).values()
    assert "(rates at an end of those tried, or of another budget: trady at 7% of another budget)" in verdict
    for rate in (0.05, 0.1, 0.2):
        cells.add(Training("mnist", "trady", "7%", rate, 0, True), outcome_of(0.8))
    (verdict,) = verdicts_of(cells).values()
    assert "won" in verdict and "rates at an end" not in verdict
    cells.add(Training("mnist", "frugal@2%", "1%", 0.1, 0, True), outcome_of(0.8))
    cells.add(Training("mnist", "frugal@2%", "1%", 0.2, 0, True), outcome_of(0.8))
    add(cells, "mnist", "frugal@2%", "1%", (0.80, 0.81))
    add(cells, "mnist", "frugal@14%", "7%", (0.85, 0.87))
    frugal = verdicts_of(cells)["efficientnet_lite0, frugal, 14% against 2%"]
    assert "frugal@14% at 7% of another budget, frugal@2% at 1% lowest)" in frugal


def test_what_is_counted_stands_beside_what_is_measured(cells: Trainings) -> None:
    """Of weights 85% are left out on average, where the paper has 93; 93.8% of the bytes are. 1% is no budget of the paper."""
    add(cells, "mnist", "trady", "2.2%", (0.8,))
    add(cells, "mnist", "trady", "1%", (0.8,))
    (said,) = (line for line in efficiency_section(cells) if isinstance(line, Verdict))
    assert said.verdict == "holds in part" and said.where == "efficientnet_lite0"
    assert "2.2%, the papers' smallest budget" in said and "as it is counted (TraDy)" in said
    assert "weights 85.0% (at least 93%)" in said
    assert "measured, 93.8% of the bytes that a step saves" in said
    shares = {"weight_share": [0.05], "activation_share": [0.01], "gradient_share": [0.02]}
    curves = {**outcome_of(0.8).curves, **shares, "saved_bytes": [2.0**23]}
    add(cells, "mnist", "trady", "2.2%", (0.8,), curves=curves)
    (said,) = (line for line in efficiency_section(cells) if isinstance(line, Verdict))
    assert said.verdict == "holds" and "measured, 50.0% of the bytes" in said


@pytest.fixture
def whole(cells: Trainings) -> Trainings:
    """Every row of the results table on both networks, as near to each other as they are there; with step times."""
    for task in (*IMAGES, *TEXTS):
        for budget, schemes in SCHEMES[RECIPES[task].model].items():
            for place, scheme in enumerate(schemes):
                mebibytes = round(2**20 * (0.2 + 0.15 * place**2))
                top1 = 0.8 + 0.003 * (place * 7 % 23)
                own = budget if Spec.parse(scheme).budgeted else ""
                add(cells, task, scheme, own, (top1, top1 + 0.01), saved_bytes=mebibytes)
    timings: Timings = CellFile(cells.path.with_name(STEPS), (Timing, StepTimes), cells.recipes)
    timings.begin(PROVENANCE)
    found = {"trady at 2.2%": [30.0, 50.0], "medyate at 2.2%": [60.0, 50.0], "full": [100.0, 100.0]}
    timings.add(Timing("mnist", tuple(found), 2), StepTimes(found))
    return cells


def test_every_scheme_is_named_beside_its_points(
    whole: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside its panel, and no name lies on another: a panel a network."""
    figures = saved_figures(monkeypatch)
    plot_budget(tmp_path / "budget", whole)
    assert (tmp_path / "budget.png").exists() and (tmp_path / "budget.svg").exists()
    assert_drawn(figures[0])
    assert_readable(figures[0])
    images, texts = figures[0].axes
    assert images.get_title() == "efficientnet_lite0, mean over digits, mnist"
    for axes, model in ((images, "efficientnet_lite0"), (texts, "minilm")):
        names = [text for text in axes.texts if text.get_text()]
        rows = itertools.chain(*SCHEMES[model].values())
        assert {text.get_text() for text in names} == {row.partition("@")[0] for row in rows}
        boxes = {text.get_text(): text.get_window_extent() for text in names}
        panel = axes.get_window_extent()
        for name, box in boxes.items():
            assert panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
            assert not any(box.overlaps(other) for at, other in boxes.items() if at != name), name


def test_what_is_kept_is_drawn_for_a_few_schemes(
    whole: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of panels a network: of every scheme the percentages kept, on a logarithmic axis, and the time of a step beside."""
    figures = saved_figures(monkeypatch)
    plot_efficiency(tmp_path / "efficiency", whole)
    figure = figures[0]
    assert_readable(figure)
    assert len(figure.axes) == 10
    for axes in (*figure.axes[:4], *figure.axes[5:9]):
        names = [line.get_label() for line in axes.lines]
        assert {"trady", "medyate", "full"} < set(names) <= set(SHOWN) and len(names) <= 6
        assert axes.get_yscale() == "log"
    weights, *_, times = figure.axes[:5]
    trady = next(line for line in weights.lines if line.get_label() == "trady")
    assert trady.get_ydata().tolist() == pytest.approx([10.0, 20.0])
    assert weights.get_ylabel() == "efficientnet_lite0\nkept (%)"
    assert figure.axes[5].get_ylabel() == "minilm\nkept (%)"
    medians = [container.lines[0].get_ydata()[0] for container in times.containers]
    assert medians == pytest.approx([40.0, 55.0, 100.0])
    low, high = times.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((35.0, 45.0)), "from quartile to quartile"
    assert figure.axes[9].get_xlabel() == "not timed"


def test_nothing_kept_is_no_point_of_a_logarithmic_axis(
    cells: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figures(monkeypatch)
    nothing = {**outcome_of(0.8).curves, "weight_share": [0.0, 0.0]}
    add(cells, "mnist", "head-only", "", (0.8,), curves=nothing)
    add(cells, "mnist", "trady", "2.2%", (0.8,))
    plot_savings(tmp_path / "savings", by_network(cells, finals_of(cells)))
    weights = figures[0].axes[0]
    assert 1 < weights.get_ylim()[0] < 10 and weights.get_ylim()[1] < 100


def test_which_schemes_have_a_line() -> None:
    few = ["mine", "trady", "yours"]
    assert shown_of(few) == few
    rows = SCHEMES["efficientnet_lite0"]["2.2%"]
    assert shown_of(rows) == ["trady", "medyate", "sparse-update", "full", "frugal@5.2%", "ample@1.8%"]
    assert shown_of(f"mine@{n}%" for n in range(9)) == [f"mine@{n}%" for n in range(6)]
