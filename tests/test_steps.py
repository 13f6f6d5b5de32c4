"""Step times: every row has its turn, ratios are of a round, and the reports take them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from figures import assert_drawn, saved_figures
from image_folders import write_images
from in_print import assert_readable
from provenance import PROVENANCE
from test_training_studies import outcome_of

from trady_kernels.study import steps as steps_module
from trady_kernels.study.budgets import efficiency_section
from trady_kernels.study.cells import CellFile
from trady_kernels.study.report import report
from trady_kernels.study.results import RECIPES, SCHEMES, Request, results_matrix
from trady_kernels.study.statistics import Quartiles
from trady_kernels.study.steps import (
    STEPS,
    StepTimes,
    Timing,
    Timings,
    plot_steps,
    row_of,
    step_plan,
    step_times,
    steps_section,
    time_steps,
    times_beside,
)
from trady_kernels.study.studies import STUDIES
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings
from trady_kernels.training.settings import Settings

KINDS = (Timing, StepTimes)


def test_one_run_a_network_with_all_its_rows() -> None:
    plan = step_plan(results_matrix(Request()), 9)
    assert [(cell.task, cell.rounds) for cell in plan.cells] == [("fashion-mnist", 9), ("movie-reviews", 9)]
    for cell, budgets in zip(plan.cells, SCHEMES.values(), strict=True):
        assert len(cell.rows) == sum(map(len, budgets.values()))
        assert {"trady at 2.2%", "trady at 1%", "full", "full+checkpoint"} <= set(cell.rows)
    assert plan.size == 2 and plan.recipes.keys() == {"fashion-mnist", "movie-reviews"}


def test_every_row_has_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps of a small network: channels drawn anew for each, another row first in each round."""
    write_images(tmp_path / "pets", {"cats": 9, "dogs": 9})
    recipe = Settings(
        model="mobilenet_v2_w035", data=str(tmp_path / "pets"), image_size=32, batch_size=4, threads=1
    )
    order: list[str] = []
    step = steps_module._Row.step

    def noted(row: steps_module._Row) -> float:
        order.append(row.training.result.scheme)
        return step(row)

    monkeypatch.setattr(steps_module._Row, "step", noted)
    found = time_steps(Timing("pets", ("trady at 5%", "full", "full+accumulate"), 2), recipe).milliseconds
    assert {row: len(times) for row, times in found.items()} == dict.fromkeys(found, 2)
    assert list(found) == ["trady at 5%", "full", "full+accumulate"]
    names = ["trady", "full", "full+accumulate"]
    assert order == [*names, *names[1:], names[0], names[2], *names[:2]]
    assert all(time > 0 for times in found.values() for time in times)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipes = {"mnist": RECIPES["mnist"]}
    timings: Timings = CellFile(tmp_path / STEPS, KINDS, recipes)
    timings.begin(PROVENANCE)
    found = {
        "trady at 2.2%": [10.0, 30.0, 20.0],
        "full": [20.0, 100.0, 50.0],
        "full+checkpoint": [30.0, 150.0, 75.0],
    }
    timings.add(Timing("mnist", tuple(found), 3), StepTimes(found))
    cells: Trainings = CellFile(tmp_path / "results.json", (Training, TrainingOutcome), recipes)
    cells.begin(PROVENANCE)
    for scheme, budget in (("trady", "2.2%"), ("full", ""), ("full+checkpoint", "")):
        for seed in range(2):
            cells.add(Training("mnist", scheme, budget, 0.1, seed, False), outcome_of(0.8 + 0.01 * seed))
    return tmp_path


def test_ratios_are_those_of_a_round(folder: Path) -> None:
    """Of trady 0.5, 0.3 and 0.4: the median, and the quartiles half way to the other two."""
    timings = STUDIES["steps"].load(folder)
    times = step_times(timings)
    trady = times["efficientnet_lite0", row_of("trady", "2.2%")]
    assert trady.milliseconds == Quartiles(15.0, 20.0, 25.0)
    assert dataclasses.astuple(trady)[1] == pytest.approx((0.35, 0.4, 0.45))
    assert times["efficientnet_lite0", "full"].of_full == Quartiles(1.0, 1.0, 1.0)
    text = "\n".join(steps_section(timings))
    assert "a batch of 32 samples of mnist" in text and "median and quartiles of 3 rounds" in text
    assert "20 (15 to 25) | 0.40 (0.35 to 0.45) |" in text and "| 1.50 (1.50 to 1.50) |" in text


def test_table_and_picture_have_one_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the ratios, which is not that of the milliseconds; the picture has the quartiles too."""
    timings = STUDIES["steps"].load(folder)
    found = {"full": [10.0, 10.0, 50.0], "slower": [12.0, 12.0, 12.0], "faster": [9.0, 30.0, 40.0]}
    timings.begin(PROVENANCE)
    timings.add(Timing("mnist", tuple(found), 3), StepTimes(found))
    medians = {row: times.milliseconds.median for (_, row), times in step_times(timings).items()}
    assert medians == {"full": 10.0, "slower": 12.0, "faster": 30.0}
    rows = [line.split("|")[2].strip() for line in steps_section(timings) if line.startswith("| eff")]
    assert rows == ["faster", "full", "slower"]
    figures = saved_figures(monkeypatch)
    plot_steps(folder / "steps", timings)
    assert_drawn(figures[0])
    assert_readable(figures[0])
    (axes,) = figures[0].axes
    places = [label.get_text() for label in axes.get_yticklabels()]
    assert places == rows and axes.get_ylim()[0] > axes.get_ylim()[1], "the first one at the top"
    for row, container in zip(places, axes.containers, strict=True):
        ratio = step_times(timings)["efficientnet_lite0", row].of_full
        bar = container.lines[2][0].get_segments()[0][:, 0]
        assert ratio is not None and bar == pytest.approx((ratio.low, ratio.high))


def test_reports_take_them(folder: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = STUDIES["results"].load(folder)
    row = next(line for line in report(cells).splitlines() if line.startswith("| trady "))
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["20 (15 to 25)", "0.40 (0.35 to 0.45)"]
    row = next(line for line in efficiency_section(cells) if "| trady " in line)
    assert row.split("|")[-2].strip() == "60 (55 to 65)"
    (folder / STEPS).unlink()
    assert times_beside(cells) == {}
    row = next(line for line in report(cells).splitlines() if line.startswith("| trady "))
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["not timed", ""]


@pytest.mark.parametrize("name", ["steps", "efficiency"])
def test_reports_and_plots(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    written, *plots = STUDIES[name].report(folder)
    assert f"`trady study {name}`" in written.read_text()
    assert [plot.name for plot in plots] == [f"study-{name}.png", f"study-{name}.svg"]
    assert all(plot.stat().st_size for plot in plots) and figures[0] is figures[1]
    assert_drawn(figures[0])
    if name == "efficiency":
        assert len(figures[0].axes) == 5
        (folder / STEPS).unlink()
        STUDIES[name].report(folder)
        assert len(figures[-1].axes) == 4, "without step times no panel of them"


def test_a_cell_is_the_same_after_its_file() -> None:
    cell = Timing("mnist", ("full",), 3)
    assert Timing(**dataclasses.asdict(cell) | {"rows": ["full"]}) == cell
