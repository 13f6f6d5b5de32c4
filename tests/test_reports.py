"""The document of all studies and the command that makes it: what was run, what was found, and when each part is written."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provenance import PROVENANCE
from test_gradient_studies import AGREEING
from test_importance import FOUND
from test_training_studies import filled, outcome_of

from trady_kernels.cli import main
from trady_kernels.cli import study as command
from trady_kernels.study import studies as studies_module
from trady_kernels.study.cells import CellFile
from trady_kernels.study.draws import resampling_plan, sensitivity_plan
from trady_kernels.study.gradients import Gradients, Look
from trady_kernels.study.importance import DRAWN, Importance, Watch, importance_plan
from trady_kernels.study.recipes import recipe_table, recipes_of
from trady_kernels.study.results import RECIPES, Request
from trady_kernels.study.statistics import verdict
from trady_kernels.study.steps import STEPS, StepTimes, Timing, Timings
from trady_kernels.study.studies import STUDIES, Reports, document
from trady_kernels.study.trainings import KINDS, Training, Trainings
from trady_kernels.study.verdicts import Verdict, overview

SCIPY = "scipy is not installed: pip install scipy"
DRAWING = "matplotlib is not installed: pip install matplotlib"


def table_below(text: str, head: str) -> dict[str, list[str]]:
    """Rows of the first table behind a heading, by their first column."""
    lines = text.split(f"{head}\n")[1].splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("| "))
    rows: dict[str, list[str]] = {}
    for line in lines[first + 2 :]:
        if not line.startswith("| "):
            break
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[name] = cells
    return rows


# ---- claims -----------------------------------------------------------------------------------------------


def test_a_verdict_is_its_sentence_and_a_row_of_the_overview() -> None:
    said = Verdict.of("tasks differ (TraDy)", "a network", verdict(0.01, 1.0), "3 of 3")
    everywhere = Verdict.of("tails are heavy", "", "holds in part", "4 of 5")
    assert said == "*Tasks differ (TraDy)*, a network: holds, 3 of 3."
    assert everywhere == "*Tails are heavy*: holds in part, 4 of 5."
    lines = overview({"tails": ["a line", everywhere], "histograms": ["no claim"], "channels": ["", said]})
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["Tails are heavy", "", "[tails](#trady-study-tails)", "holds in part"],
        ["Tasks differ (TraDy)", "a network", "[channels](#trady-study-channels)", "holds"],
    ]
    assert overview({"tails": ["*Not structured*, anywhere: holds, 1 of 1."]}) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Cells of a few studies."""
    filled(tmp_path / "resampling.json", resampling_plan(Request("usual", ("mnist",))))
    filled(tmp_path / "sensitivity.json", sensitivity_plan(Request("usual")))
    cells: Trainings = CellFile(tmp_path / "results.json", KINDS, {"mnist": RECIPES["mnist"]})
    cells.begin(PROVENANCE)
    for seed in range(2):
        for scheme, budget, rate in (("trady", "2.2%", 0.1), ("trady", "7%", 0.1), ("full", "", 0.01)):
            top1 = 0.8 + 0.0001 * seed * len(budget) + 0.01 * (budget == "7%")
            cells.add(Training("mnist", scheme, budget, rate, seed, False), outcome_of(top1))
    cells.add(Training("mnist", "trady", "2.2%", 9.0, 0, True), outcome_of(0.1))
    return tmp_path


def test_the_document_begins_with_all_claims(folder: Path) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    text = document(folder)
    assert text.index("## Claims") < text.index("## From")
    claims = table_below(text, "## Claims")
    assert claims["A larger budget buys accuracy (TraDy)"] == [
        "efficientnet_lite0, trady, 7% against 2.2%",
        "[budget](#trady-study-budget)",
        "holds",
    ]
    for claim, (where, link, said) in claims.items():
        name = link[1 : link.index("]")]
        assert f"\n### `trady study {name}`\n" in text
        assert f"*{claim}*, {where}: {said}, " in text, "the sentence and the row are one verdict"
    assert "tested in [results.md](results.md)" in text
    (folder / "results.json").unlink()
    assert "results.md" not in document(folder)


# ---- what was trained -------------------------------------------------------------------------------------


def test_recipes_stand_once_below_each_file(folder: Path) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    text = document(folder)
    assert "falls to 0 along a cosine" in text.split("## Claims")[0]
    resampling = table_below(text, "## From resampling.json")
    assert resampling == {
        "mnist": ["efficientnet_lite0", "250", "all", "12", "1", "32", "64x64", "3", "0.05"]
    }
    grid = table_below(text, "## From sensitivity.json")
    assert grid["mnist"][1:] == ["1000", "all", "5", "0.5", "32", "64x64", "3", "0.017, 0.05, 0.15"]
    # Of final runs: the trial at 9 is none, and has no seed of its own.
    assert table_below(text, "## From results.json")["mnist"][-2:] == ["2", "0.01, 0.1"]
    assert text.count("| training samples |") == 3, "budget and efficiency have one file"


def test_recipes_of_runs_whose_rate_is_not_their_own(tmp_path: Path) -> None:
    """Full fine-tuning at its own rate, watched runs at the samplers'; steps are timed, and no training."""
    pytest.importorskip("scipy", reason=SCIPY)
    recipes = {task: RECIPES[task] for task in ("mnist", "tweets")}
    looks: CellFile[Look, Gradients] = CellFile(tmp_path / "gradients.json", (Look, Gradients), recipes)
    watched: CellFile[Watch, Importance] = CellFile(
        tmp_path / "importance.json", (Watch, Importance), recipes
    )
    timings: Timings = CellFile(tmp_path / STEPS, (Timing, StepTimes), recipes)
    for cells in (looks, watched, timings):
        cells.begin(PROVENANCE)
    looks.add(Look("tweets", 0), AGREEING)
    watched.add(Watch("mnist", "trady", 0, 100), FOUND)
    timings.add(Timing("mnist", ("full",), 1), StepTimes({"full": [1.0]}))
    text = document(tmp_path)
    assert table_below(text, "## From gradients.json") == {
        "tweets": ["minilm", "1000", "all", "3", "0.5", "32", "32 tokens", "1", "0.05"]
    }, "a task without a run is left out"
    assert table_below(text, "## From importance.json")["mnist"][-1] == "0.05"
    assert text.count("| training samples |") == 2


def test_many_rates_are_a_range(tmp_path: Path) -> None:
    cells: Trainings = CellFile(tmp_path / "cells.json", KINDS, {"mnist": RECIPES["mnist"]})
    cells.begin(PROVENANCE)
    for rate in (0.3, 0.001, 0.02, 0.1):
        cells.add(Training("mnist", "trady", "1%", rate, 0, False), outcome_of(0.5))
    assert " 0.001 to 0.3 |" in recipes_of(cells, lambda cell, recipe: cell.learning_rate)[-1]


def test_recipe_table() -> None:
    recipe = dataclasses.replace(RECIPES["tweets"], train_samples=None)
    assert recipe_table({"mine": recipe}, {"seeds": {"mine": "3"}}) == [
        "| task | network | training samples | test samples | epochs | warm-up | batch |     input | seeds |",
        "| ---- | ------- | ---------------- | ------------ | -----: | ------: | ----: | --------: | ----: |",
        "| mine | minilm  | all              | all          |      3 |     0.5 |    32 | 32 tokens |     3 |",
    ]


def test_studies_without_runs_say_how_to_run_them(folder: Path) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    text = document(folder)
    for name, study in STUDIES.items():
        if study.section is None:
            continue
        part = text.split(f"### `trady study {name}`\n")[1].split("\n#")[0]
        not_run = f"Not run yet: `trady study {name} --output FOLDER`." in part
        assert not_run == (not (folder / study.cells).exists())
        assert ("![" in part) != not_run


def test_a_ranking_that_is_gone_is_not_taken_for_a_study_without_runs(folder: Path) -> None:
    recipe = dataclasses.replace(RECIPES["mnist"], ranking=str(folder / "gone.json"))
    cells: Trainings = CellFile(folder / "pool.json", KINDS, {"mnist": recipe})
    cells.begin(PROVENANCE)
    cells.add(Training("mnist", "trady", "2.2%", 0.1, 0, False, pool="6 layers by rgn"), outcome_of(0.5))
    with pytest.raises(FileNotFoundError, match="gone"):
        document(folder)


# ---- when it is made --------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often the sections of some studies are made from here on."""
    made = dict.fromkeys(names, 0)

    def counted(name: str, section: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
        def make(cells: Any) -> list[str]:
            made[name] += 1
            return section(cells)

        return make

    for name in names:
        section = STUDIES[name].section
        assert section is not None
        changed = dataclasses.replace(STUDIES[name], section=counted(name, section))
        monkeypatch.setitem(studies_module.STUDIES, name, changed)  # type: ignore[arg-type]
    return made


def test_every_section_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    pytest.importorskip("matplotlib", reason=DRAWING)
    made = counting(monkeypatch, "resampling", "sensitivity", "budget", "efficiency")
    assert main(["study", "all", "--report-only", "--output", str(folder)]) == 0
    assert made == dict.fromkeys(made, 1)


def test_a_section_is_made_anew_after_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one of a file beside its own: efficiency shows the times of steps."""
    pytest.importorskip("scipy", reason=SCIPY)
    made = counting(monkeypatch, "sensitivity", "budget", "efficiency")
    reports = Reports(folder)
    before = reports.document()
    assert reports.document() == before and made == {"sensitivity": 1, "budget": 1, "efficiency": 1}
    timings: Timings = CellFile(folder / STEPS, (Timing, StepTimes), {"mnist": RECIPES["mnist"]})
    timings.begin(PROVENANCE)
    timings.add(Timing("mnist", ("full",), 1), StepTimes({"full": [1.0]}))
    assert "0 (0 to 0) |" in reports.document() and "0 (0 to 0) |" not in before
    assert made == {"sensitivity": 1, "budget": 1, "efficiency": 2}
    cells = STUDIES["budget"].load(folder)
    cells.begin(PROVENANCE)
    cells.add(Training("mnist", "lora", "2.2%", 0.1, 0, False), outcome_of(0.8))
    assert "| lora " in reports.document() and made == {"sensitivity": 1, "budget": 2, "efficiency": 3}


# ---- all of them ------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the studies in the order in which they run, in place of their runs; whose plans and reports are real."""
    names: list[str] = []

    def run(study: Any, plan: Any, args: Any, console: Any) -> None:
        assert plan.size
        names.append(study.name)

    monkeypatch.setattr(command, "_run_missing", run)
    return names


def test_studies_that_cannot_be_run_are_left_out_before_the_first_run(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that no ranking ships for: single layers cannot be looked at, everything else can."""
    task = "timm:resnet18 on digits"
    assert main(["study", "all", "--quick", "--task", task, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ran == [name for name in STUDIES if name not in ("results", "pool", "ablation")]
    for name in ("pool", "ablation"):
        said = f"{name}: left out: ranking: got none for timm:resnet18, expected a file: trady rank --model"
        assert out.index(said) < out.index("tails: ")
    assert main(["study", "pool", "--quick", "--task", task, "--output", str(tmp_path)]) == 2
    assert "ranking: got none for timm:resnet18" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "extra"), (("scipy", "study"), ("matplotlib", "cli")))
def test_what_reports_need_is_asked_for_before_anything_runs(
    name: str,
    extra: str,
    tmp_path: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest)
    )
    assert main(["study", "tails", "--quick", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{name} is not installed" in said and f"trady-kernels[{extra}]" in said and not ran


def test_what_no_study_can_run_is_refused(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "all", "--task", "cats", "--output", str(tmp_path)]) == 2
    assert "task: got 'cats', expected one of" in capsys.readouterr().err and not ran


def test_runs_of_other_settings_are_found_before_the_first_run(
    folder: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Here of the last study but one to run."""
    assert main(["study", "all", "--task", "mnist", "--full", "--output", str(folder)]) == 2
    assert "has mnist with train_samples" in capsys.readouterr().err and not ran


def test_each_study_is_reported_as_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an interruption of the next one leaves is no less than if that had not been asked for."""
    pytest.importorskip("scipy", reason=SCIPY)
    pytest.importorskip("matplotlib", reason=DRAWING)

    def run(study: Any, plan: Any, args: Any, console: Any) -> None:
        if study.name == "efficiency":
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run_missing", run)
    assert main(["study", "all", "--task", "mnist", "--output", str(folder)]) == 130
    written = sorted(name for name in os.listdir(folder) if name.endswith(".svg"))
    assert written == ["study-budget.svg", "study-resampling.svg"]
    assert "`trady study budget`" in (folder / "study.md").read_text()
    assert "interrupted; the same command goes on" in capsys.readouterr().out


def test_one_that_has_nothing_to_report_keeps_no_other_one_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    pytest.importorskip("matplotlib", reason=DRAWING)
    (folder / "results.json").unlink()
    cells: Trainings = CellFile(folder / "results.json", KINDS, {"mnist": RECIPES["mnist"]})
    cells.begin(PROVENANCE)
    cells.add(Training("mnist", "trady", "2.2%", 9.0, 0, True), outcome_of(0.1))
    assert main(["study", "all", "--report-only", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: cells: " in out for name in ("budget", "efficiency", "results"))
    assert "study-sensitivity.svg" in out and re.search(r"all: done in \d+ s\n$", out)
    assert main(["study", "results", "--report-only", "--output", str(folder)]) == 2


@pytest.mark.parametrize("drawn", DRAWN)
def test_every_way_of_drawing_can_be_asked_for(drawn: str) -> None:
    """By the name that tables have, alone or among others."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["importance", "--scheme", f"{drawn},s-det-rgn", "--output", "out"])
    plan = importance_plan(Request("quick", schemes=args.scheme))
    assert [cell.drawn for cell in plan.cells] == [drawn, "s-det-rgn"]


def test_ways_of_drawing_that_there_are_none_of() -> None:
    with pytest.raises(ValueError, match="scheme: got 'full', expected one of trady"):
        importance_plan(Request("quick", schemes=("trady in medyate's pool", "full")))


def test_a_way_of_drawing_with_another_name_in_an_older_file(tmp_path: Path) -> None:
    plan = importance_plan(Request("quick"))
    cells: CellFile[Watch, Importance] = CellFile(tmp_path / "importance.json", plan.kinds, plan.recipes)
    cells.begin(PROVENANCE)
    for cell in plan.ready(cells):
        cells.add(cell, FOUND)
    text = cells.path.read_text()
    assert text.count("trady in medyate's pool") == 1
    cells.path.write_text(text.replace("trady in medyate's pool", "trady, medyate's pool"))
    assert set(CellFile(cells.path, plan.kinds, plan.recipes)) == set(plan.ready(cells))
