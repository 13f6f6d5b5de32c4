"""The studies that read training runs: which runs they have, and what their reports say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from figures import assert_drawn, saved_figures
from image_folders import write_images
from in_print import assert_readable
from networks import load_tiny
from provenance import PROVENANCE
from test_gradient_studies import AGREEING
from test_importance import FOUND

from trady_kernels.cli import main
from trady_kernels.study import draws as draws_module
from trady_kernels.study.budgets import budget_section, budgets_plan, efficiency_section
from trady_kernels.study.cells import CellFile, Listed
from trady_kernels.study.draws import (
    frequencies,
    plot_resampling,
    plot_sensitivity,
    resampling_plan,
    resampling_section,
    sensitivity_plan,
    sensitivity_section,
)
from trady_kernels.study.matrix import FACTORS
from trady_kernels.study.plot import scheme_style
from trady_kernels.study.results import RATES, RECIPES, SMALLEST_BUDGET, Request, Size, results_matrix
from trady_kernels.study.steps import StepTimes
from trady_kernels.study.studies import STUDIES, document
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, at_chance
from trady_kernels.training import loop
from trady_kernels.training.settings import Settings

TASKS = ("mnist", "digits")
KINDS = (Training, TrainingOutcome)


def outcome_of(top1: float) -> TrainingOutcome:
    curves = {
        "train_loss": [2.0, 0.5],
        "cost": [10.0, 10.0],
        "weight_share": [0.1, 0.2],
        "activation_share": [0.05, 0.05],
        "gradient_share": [0.02, 0.04],
        "saved_bytes": [2.0**20, 2.0**20],
    }
    return TrainingOutcome(
        top1, saved_bytes=2**20, dense_saved_bytes=2**24, gradient_bytes=2**19, step_ms=100.0, curves=curves
    )


TIMES = StepTimes({"trady at 2.2%": [1.0, 2.0], "full": [3.0, 4.0]})
#: Of the studies whose cells are no trainings.
OUTCOMES: dict[str, Any] = {"gradients.json": AGREEING, "importance.json": FOUND, "steps.json": TIMES}


def filled(path: Path, plan: Listed[Training, TrainingOutcome], top1: float = 0.8) -> Trainings:
    """A file with every run of a plan: half a point more for a later seed, and one with each step drawn anew."""
    cells: Trainings = CellFile(path, KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        often = cell.resampling == "1 steps"
        cells.add(cell, outcome_of(top1 + 0.005 * cell.seed + 0.01 * often * (1 + cell.seed)))
    return CellFile(path, KINDS)


def test_frequencies_are_those_that_a_run_has_room_for() -> None:
    """1,000 samples in batches of 32 are 32 steps an epoch."""
    short = frequencies(RECIPES["mnist"])
    assert list(short) == [
        *("once", "2 epochs", "epoch", "16 steps", "4 steps", "1 step", "norm 60%", "norm 30%")
    ]
    assert short["1 step"] == "1 steps", "the rule as it stands in files"
    assert short["2 epochs"] == "2 epochs" and short["once"] == "5 epochs", "of five in all"
    for size in ("usual", "full"):
        for recipe in resampling_plan(Request(size)).recipes.values():
            assert {"once", "10 epochs", "5 epochs", "2 epochs", "epoch", "1 step"} < set(frequencies(recipe))
    quick = resampling_plan(Request("quick"))
    assert {cell.task for cell in quick.cells} == {"digits"} and len(quick.cells) == quick.size == 6


def test_plans_name_each_run_once() -> None:
    for plan in (
        resampling_plan(Request("usual", TASKS)),
        sensitivity_plan(Request("usual")),
        sensitivity_plan(Request("full")),
    ):
        assert len(set(plan.cells)) == plan.size
        for cell in plan.cells:
            settings = cell.settings(plan.recipes[cell.task])
            assert settings.resampling == cell.resampling and settings.validation_share == 0
    grid = sensitivity_plan(Request("usual"))
    assert grid.size == 3 * 3 * 3 * len(FACTORS)
    several = resampling_plan(Request("usual", TASKS, ("trady", "d-full-random")))
    assert several.size == 2 * resampling_plan(Request("usual", TASKS)).size
    for scheme in ("full", "head-only", "frugal", "nonsense"):
        with pytest.raises(ValueError, match=f"scheme: got '{scheme}', expected one of trady"):
            resampling_plan(Request("usual", TASKS, (scheme,)))
    assert {cell.learning_rate for cell in grid.cells} == {0.017, 0.05, 0.15}
    assert {cell.resampling for cell in grid.cells} == {"5 epochs", "epoch", "7 steps"}
    assert {cell.budget for cell in resampling_plan(Request("usual")).cells} == {SMALLEST_BUDGET}
    some = budgets_plan(Request("quick"))
    assert list(some.recipes) == ["digits"] and some.size < 20
    assert budgets_plan(Request("usual", TASKS)).size == results_matrix(Request("usual", TASKS)).size
    for make in (resampling_plan, sensitivity_plan):
        with pytest.raises(ValueError, match="size: got 'tiny', expected one of quick, usual, full"):
            make(Request("tiny"))
        with pytest.raises(ValueError, match="task: got 'cats', expected one of fashion-mnist"):
            make(Request("quick", ("cats",)))


def test_resampling_section(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = "\n".join(
        resampling_section(filled(tmp_path / "resampling.json", resampling_plan(Request("usual", TASKS))))
    )
    assert f"at {SMALLEST_BUDGET} and the rate {RATES['efficientnet_lite0']['']:g}" in text
    rows = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 80.5 ± 0.5 | 80.5 ± 0.5 |" in rows["once"] and "+0.00" in rows["once"]
    # 1, 2, 3 points more with seeds 0, 1, 2, on both tasks.
    assert "82.5 ± 1.5" in rows["1 step"] and "+2.00 (p 0.0" in rows["1 step"]
    assert list(rows)[2:5] == ["once", "10 epochs", "5 epochs"] and "norm 30%" in rows
    assert "beat channels drawn once (TraDy)*, trady: not decided at the level of 5%, +0.00" in text
    assert "apart from a draw an epoch at 5%: 1 step (+2.00 (p 0.0" in text


def test_a_run_that_diverged_is_told(tmp_path: Path) -> None:
    plan = sensitivity_plan(Request("usual"))
    cells = filled(tmp_path / "sensitivity.json", plan)
    cells.add(plan.cells[0], TrainingOutcome(0.0, diverged=True))
    text = "\n".join(sensitivity_section(cells))
    assert text.count("(1 diverged)") == 1 and "53.8 ± 46.6 (1 diverged)" in text


def graded(path: Path, dead: tuple[Training, ...] = ()) -> Trainings:
    """The grid: every budget and rate a point better than the one before, 7% two; some runs at chance."""
    plan = sensitivity_plan(Request("usual"))
    cells: Trainings = CellFile(path, KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    rates = sorted({cell.learning_rate for cell in plan.cells})
    lost = outcome_of(0.1)
    lost = dataclasses.replace(lost, curves={**lost.curves, "train_loss": [2.5, 2.299]})
    for cell in plan.cells:
        better = rates.index(cell.learning_rate) + {"1%": 0, "2.2%": 1, "7%": 3}[cell.budget]
        cells.add(cell, lost if cell in dead else outcome_of(0.8 + 0.01 * better + 0.001 * cell.seed))
    return cells


#: Two runs of the best budget and rate, of ten classes.
DEAD = tuple(Training("mnist", "trady", "7%", 0.15, seed, False, "epoch") for seed in (0, 1))


@pytest.mark.parametrize(
    ("dead", "ranges"),
    [
        (
            (),
            "learning rate 81.1 (0.017) to 83.1 (0.15), budget 81.1 (1%) to 84.1 (7%), frequency 82.2 throughout.",
        ),
        (
            DEAD,
            "learning rate 81.1 (0.017) to 83.0 (0.15), budget 81.1 (1%) to 84.0 (7%), frequency 82.1 (every epoch) to 82.2 (once).",
        ),
    ],
)
def test_sensitivity_section(dead: tuple[Training, ...], ranges: str, tmp_path: Path) -> None:
    """Ranges say which values are worst and best; runs at chance are told, and make the best budget not the worst."""
    text = "\n".join(sensitivity_section(graded(tmp_path / "sensitivity.json", dead)))
    assert all(words in text for words in ("mnist, trady, once", "mnist, trady, every 7 steps", "rate 0.017"))
    assert f"mnist, trady: {ranges}" in text
    assert text.count("at chance)") == text.count("35.1 ± 43.4 (2 at chance)") == len(dead) / 2
    assert "not under 99% of that of equal guesses" in text


@pytest.mark.parametrize(
    ("data", "loss", "lost"),
    [
        ("mnist", 2.28, True),
        ("mnist", 2.27, False),
        ("tweets", 0.69, True),
        ("tweets", 0.68, False),
        ("/data/pets", 9.9, False),
    ],
)
def test_runs_at_chance(data: str, loss: float, lost: bool) -> None:
    """Equal guesses of ten classes have a loss of 2.303, of two 0.693; of a folder the classes are not known."""
    outcome = TrainingOutcome(0.1, curves={"train_loss": [3.0, loss]})
    assert at_chance(outcome, dataclasses.replace(RECIPES["mnist"], data=data)) == lost
    assert not at_chance(TrainingOutcome(0.0, diverged=True), RECIPES["mnist"])


def test_two_dead_runs_do_not_set_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has medians, a scale of the points without such runs, and hatches the others."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(draws_module, "write_figure", lambda path, figure: figures.append(figure))
    plot_sensitivity(tmp_path / "plot.png", graded(tmp_path / "sensitivity.json", DEAD))
    once, epoch = figures[0].axes[:2]
    assert (once.get_title(), epoch.get_title()) == ("mnist, once", "mnist, every epoch")
    assert_drawn(figures[0])
    assert epoch.images[0].get_clim() == pytest.approx((80.1, 85.1))
    assert epoch.images[0].get_array()[2, 2] == pytest.approx(10.0), "two of three"
    assert not once.patches and [patch.get_xy() for patch in epoch.patches] == [(1.5, 1.5)]


def test_losses_are_drawn_beside_those_of_a_draw_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine curves on each other show nothing: each seed's loss and accuracy over, and less, that of its own run a draw an epoch."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(draws_module, "write_figure", lambda path, figure: figures.append(figure))
    plan = resampling_plan(Request("usual", TASKS))
    cells = filled(tmp_path / "resampling.json", plan)
    cells.begin(PROVENANCE)
    for cell in plan.cells:
        if cell.resampling == "1 steps" and cell.task == "digits":
            outcome = outcome_of(0.9)
            curves = {**outcome.curves, "train_loss": [1.0, 2.0 if cell.seed else 0.125]}
            cells.add(cell, dataclasses.replace(outcome, curves=curves))
    plot_resampling(tmp_path / "plot.png", cells)
    assert_drawn(figures[0])
    accuracy, loss = figures[0].axes[2:4]
    names = [label.get_text() for label in accuracy.get_yticklabels()]
    assert names == [
        "once",
        *("10 epochs", "5 epochs", "2 epochs"),
        *("4 steps", "1 step"),
        *("norm 60%", "norm 30%"),
    ]
    ratios = loss.images[0].get_array()
    assert ratios.shape == (8, 2) and ratios[0].tolist() == [1.0, 1.0]
    assert ratios[names.index("1 step")].tolist() == pytest.approx([0.5, 4 ** (1 / 3)]), "1/4, 4 and 4"
    shown = [line for line in accuracy.lines if line.get_label() == "a seed"][names.index("1 step")]
    assert shown.get_xdata().tolist() == pytest.approx([10.0, 9.5, 9.0])


def tiny_recipe(folder: Path) -> Settings:
    """Two classes of small images that are easily told apart."""
    write_images(folder / "pets", {"cats": 8, "dogs": 8})
    return Settings(
        model="tiny",
        data=str(folder / "pets"),
        image_size=16,
        epochs=1,
        batch_size=4,
        threads=1,
        test_once=True,
    )


def trained(plan: Listed[Training, TrainingOutcome], path: Path) -> Trainings:
    """The runs of a plan, in this process."""
    cells: Trainings = CellFile(path, KINDS, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.ready(cells):
        cells.add(cell, plan.train(cell, plan.recipes[cell.task]))
    return CellFile(path, KINDS)


def test_a_grid_of_runs_of_a_tiny_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole study in seconds, trainings and all."""
    monkeypatch.setattr(loop, "load_model", load_tiny)
    monkeypatch.setitem(RECIPES, "pets", tiny_recipe(tmp_path))
    changed: Any = draws_module
    monkeypatch.setitem(changed._GRID_SIZES, "quick", Size(1, {"epochs": 2, "train_samples": 12}))
    plan = sensitivity_plan(Request("quick", ("pets",)))
    cells = trained(plan, tmp_path / "sensitivity.json")
    assert len(cells) == plan.size == 27 and all(cells[cell].curves for cell in cells)
    text = "\n".join(sensitivity_section(cells))
    for words in ("pets, trady, once", "pets, trady, every epoch", "pets, trady, every 1 step"):
        assert text.count(words) >= 3


def test_networks_of_different_rates_share_a_table(tmp_path: Path) -> None:
    cells = filled(tmp_path / "sensitivity.json", sensitivity_plan(Request("usual", ("mnist", "tweets"))))
    lines = [line for line in sensitivity_section(cells) if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and lines[0].count("rate") == 6
    values = [cell.strip() for line in lines if "tweets" in line for cell in line.split("|")[3:-1]]
    filled_in = "80.5 ± 0.5"  # at 0.067, 0.2 and 0.6 of the columns 0.017, 0.05, 0.067, 0.15, 0.2, 0.6
    assert values[:6] == ["", "", filled_in, "", filled_in, filled_in]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Cells of every study that reads training runs."""
    filled(tmp_path / "resampling.json", resampling_plan(Request("usual", TASKS)))
    filled(tmp_path / "sensitivity.json", sensitivity_plan(Request("usual")))
    recipes = {task: RECIPES[task] for task in TASKS}
    cells: Trainings = CellFile(tmp_path / "results.json", KINDS, recipes)
    cells.begin(PROVENANCE)
    for task in TASKS:
        for place, (scheme, budget) in enumerate((("trady", "2.2%"), ("frugal@5.2%", "2.2%"), ("full", ""))):
            cells.add(Training(task, scheme, budget, 0.1, 0, False), outcome_of(0.8 + 0.05 * place))
    cells.add(Training("mnist", "medyate", "2.2%", 0.1, 0, True), outcome_of(0.1))
    return tmp_path


def test_sections_of_the_results_table(folder: Path) -> None:
    cells = STUDIES["results"].load(folder)
    text = "\n".join(budget_section(cells))
    assert "| frugal | " in text and "5.2%" in text and "1.5" in text and "mnist 85.0, digits 85.0" in text
    assert "medyate" not in text, "trials on held-out samples are no results"
    text = "\n".join(efficiency_section(cells))
    # Of weights 10 and 20% train in the two epochs, of the bytes a sixteenth is kept.
    assert "85.0 ± 5.8" in text and "93.8 ± 0.0" in text and "97.0 ± 1.2" in text


@pytest.mark.parametrize("name", ["resampling", "sensitivity", "budget", "efficiency"])
def test_reports_and_plots(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    written, png, svg = STUDIES[name].report(folder)
    assert written.read_text() == document(folder)
    assert document(folder).count("## From results.json") == 1, "studies of the same cells stand together"
    assert figures[0] is figures[1] and png.stat().st_size and svg.stat().st_size
    assert_drawn(figures[0])


def test_a_file_that_has_nothing_yet_is_no_obstacle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study that is half done, or was never begun, keeps no other one from its report."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    (folder / "results.json").unlink()
    cells: Trainings = CellFile(folder / "results.json", KINDS, {task: RECIPES[task] for task in TASKS})
    cells.begin(PROVENANCE)
    cells.add(Training("mnist", "medyate", "2.2%", 0.1, 0, True), outcome_of(0.1))
    assert main(["study", "resampling", "--report-only", "--output", str(folder)]) == 0
    text = (folder / "study.md").read_text()
    assert "Not run yet: `trady study resampling" not in text
    assert "Not run yet: `trady study budget --output FOLDER`." in text
    assert main(["study", "budget", "--report-only", "--output", str(folder)]) == 2
    assert "has no run on test samples yet" in capsys.readouterr().err
    (folder / "results.json").unlink()
    assert main(["study", "all", "--report-only", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "study-resampling.png" in out and "study-sensitivity.png" in out and "study-tails" not in out


def test_bad_devices_and_studies_that_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "tails", "--device", "banana", "--output", str(tmp_path / "out")]) == 2
    assert "device: got 'banana', expected 'cpu' or 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [name for name, study in STUDIES.items() if study.alone] == ["steps"]


@pytest.mark.parametrize("name", ["resampling", "sensitivity", "budget", "efficiency"])
def test_panels_say_what_they_show(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every axis has a name, its own or that of a row, and letters are as large as print needs."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    STUDIES[name].report(folder)
    assert_readable(figures[0])
    for axes in figures[0].axes:
        if axes.get_label() != "<colorbar>":
            beside = axes.get_shared_y_axes().get_siblings(axes)
            assert axes.get_xlabel() and axes.get_title() and any(one.get_ylabel() for one in beside)


def test_a_scheme_looks_the_same_everywhere() -> None:
    looks = {scheme: tuple(scheme_style(scheme).items()) for scheme in ("trady", "frugal@5.2%", "full")}
    assert len(set(looks.values())) == 3
    assert scheme_style("mine") == scheme_style("mine")
    assert scheme_style("frugal") == scheme_style("frugal@5.2%") != scheme_style("frugal@14%")


def test_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in turn, from runs that are there already: nothing is left to train."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    for study in STUDIES.values():
        if study.name == "results":
            continue  # all of its rows; the quick studies have some
        plan = study.plan(Request("quick"))
        cells: Any = CellFile(tmp_path / study.cells, study.kinds, plan.recipes)
        cells.begin(PROVENANCE)
        outcome = OUTCOMES.get(study.cells, outcome_of(0.8))
        while missing := [cell for cell in plan.ready(cells) if cell not in cells]:
            for cell in missing:
                cells.add(cell, outcome)
        assert len(cells) == plan.size
    assert main(["study", "all", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"\d+ of \d+:", out), "nothing was trained"
    assert re.search(r"\nall: done in (\d+ min )?\d+ s\n$", out)
    text = (tmp_path / "study.md").read_text()
    for name in STUDIES:
        assert f"{name}: {STUDIES[name].words[:20]}" in out or name == "results"
        assert f"`trady study {name}`" in text or name == "results"
    assert (tmp_path / "results.md").exists()
