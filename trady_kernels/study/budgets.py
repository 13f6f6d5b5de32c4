"""Studies of what a budget buys and what is left out for it, from the runs of the results table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from trady_kernels.study.cells import NothingFinished
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.matrix import Matrix
from trady_kernels.study.plot import plot_budgets, plot_savings
from trady_kernels.study.results import SMALLEST_BUDGET, Request, results_matrix
from trady_kernels.study.statistics import paired_test
from trady_kernels.study.steps import row_of, times_beside
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, top1_words

#: What TraDy reports of its smallest budget, percent of what is counted: what it is, and the least.
_PUBLISHED = {
    "weight_share": ("weights", 93.0),
    "activation_share": ("activations", 97.5),
    "gradient_share": ("gradient FLOPs", 97.0),
}
_SMALLEST = ("trady", SMALLEST_BUDGET)
#: Rows and task where it has to be quick.
_QUICK_SCHEMES, _QUICK_TASKS = ("trady", "frugal@5.2%", "head-only"), ("digits",)


def budgets_plan(request: Request) -> Matrix:
    """The runs of the results table; where it has to be quick, some of them.

    Raises:
        ValueError: no such size or task.
    """
    if request.size == "quick":
        request = replace(request, tasks=request.tasks or _QUICK_TASKS, schemes=_QUICK_SCHEMES)
    return results_matrix(request)


def finals_of(cells: Trainings) -> dict[Training, TrainingOutcome]:
    """The runs on test samples.

    Raises:
        NothingFinished: there is none.
    """
    finals = {cell: cells[cell] for cell in cells if not cell.held_out}
    if not finals:
        raise NothingFinished(f"cells: {cells.path} has no run on test samples yet, expected some")
    return finals


def first_budget(finals: Iterable[Training]) -> str:
    """The budget with the most schemes; "" without one."""
    schemes: dict[str, set[str]] = {}
    for cell in finals:
        if cell.budget:
            schemes.setdefault(cell.budget, set()).add(cell.scheme)
    return max(sorted(schemes), key=lambda budget: len(schemes[budget]), default="")


def _rows(cells: Trainings) -> dict[tuple[str, str, str], dict[Training, TrainingOutcome]]:
    """Final runs by network, scheme and budget; the budget behind an @ is that of the row."""
    rows: dict[tuple[str, str, str], dict[Training, TrainingOutcome]] = {}
    for cell, outcome in finals_of(cells).items():
        scheme, _, own = cell.scheme.partition("@")
        key = (cells.recipes[cell.task].model, scheme, own or cell.budget)
        rows.setdefault(key, {})[cell] = outcome
    return rows


def _size(budget: str) -> float:
    return float(budget.rstrip("%")) if budget.endswith("%") else 0.0


def budget_section(cells: Trainings) -> list[str]:
    """Accuracy and measured bytes of every scheme at every budget."""
    found = _rows(cells)
    rows = []
    for model, scheme, budget in sorted(found, key=lambda key: (key[0], key[1], _size(key[2]))):
        runs = found[model, scheme, budget]
        tasks = [task for task in cells.recipes if any(cell.task == task for cell in runs)]
        by_task = (
            f"{task} {top1_words([o for cell, o in runs.items() if cell.task == task])}" for task in tasks
        )
        memory = spread([o.training_bytes / 2**20 for o in runs.values() if not o.diverged])
        rows.append([model, scheme, budget or "-", memory, ", ".join(by_task)])
    return [
        "What a step needs beside the weights, measured, and top-1 (mean and standard deviation; of bytes over tasks and seeds).",
        "",
        *markdown(["network", "scheme", "budget", "training memory (MiB)", "top-1"], rows),
        *_budget_verdicts(found),
    ]


def _budget_verdicts(found: Mapping[tuple[str, str, str], Mapping[Training, TrainingOutcome]]) -> list[str]:
    """Whether more memory buys accuracy, of every scheme that was run at several budgets."""
    lines = []
    for model, scheme in dict.fromkeys((model, scheme) for model, scheme, _ in found):
        budgets = sorted((b for m, s, b in found if (m, s) == (model, scheme) and b), key=_size)
        if len(budgets) < 2:
            continue
        least, most = (
            {(c.task, c.seed): 100 * o.top1 for c, o in found[model, scheme, budget].items()}
            for budget in (budgets[0], budgets[-1])
        )
        if least.keys() & most.keys():
            test = paired_test(most, least)
            lines += [
                "",
                f"*A larger budget buys accuracy (TraDy, MeDyate)*, {model}, {scheme}, {budgets[-1]} against {budgets[0]}: "
                f"{test.verdict}, {test.words}, {test.wins} of {test.pairs} won.",
            ]
    return lines


def plot_budget(path: Path, cells: Trainings) -> None:
    """Draw accuracy against measured bytes, a panel a task."""
    plot_budgets(path, finals_of(cells))


def efficiency_section(cells: Trainings) -> list[str]:
    """What each scheme leaves out, counted, and what that comes to, measured."""
    found, times = _rows(cells), times_beside(cells)
    rows, sentences = [], []
    for model, scheme, budget in sorted(found, key=lambda key: (key[0], key[1], _size(key[2]))):
        first = next(iter(found[model, scheme, budget]))
        runs = [outcome for outcome in found[model, scheme, budget].values() if outcome.curves]
        if not runs:
            continue

        left = {name: _left_out(runs, name) for name in _PUBLISHED}
        saved = spread(
            [100 * (1 - kept / run.dense_saved_bytes) for run in runs for kept in run.curves["saved_bytes"]]
        )
        step = times.get((model, row_of(first.scheme, first.budget)))
        time = "" if step is None or step.of_full is None else f"{100 * (1 - step.of_full):.0f}"
        rows.append([model, scheme, budget or "-", *map(spread, left.values()), saved, time])
        if (scheme, budget) == _SMALLEST:
            parts = [
                f"{words} {statistics.fmean(left[name]):.1f}% (at least {least:g}%)"
                for name, (words, least) in _PUBLISHED.items()
            ]
            holds = all(statistics.fmean(left[name]) >= least for name, (_, least) in _PUBLISHED.items())
            sentences += [
                "",
                f"*At its smallest budget the method leaves out nearly everything (TraDy)*, {model}: "
                f"{'holds' if holds else 'does not hold'}, of {', '.join(parts)}.",
            ]
    heads = [
        "network",
        "scheme",
        "budget",
        "weights (%)",
        "activations (%)",
        "gradient FLOPs (%)",
        "saved bytes (%)",
        "step time (%)",
    ]
    return [
        "Left out of what full fine-tuning takes: counted for weight gradients, stored inputs and their multiply-accumulates, "
        "measured for the bytes that a step saves for its backward pass (mean and standard deviation over tasks, seeds and "
        "epochs) and for the time of a step, of `trady study steps`.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _left_out(runs: list[TrainingOutcome], name: str) -> list[float]:
    """Percent of a share, of every run and epoch."""
    return [100 * (1 - share) for run in runs for share in run.curves[name]]


def plot_efficiency(path: Path, cells: Trainings) -> None:
    """Draw what is left out by epoch, of the budget that most schemes have, and what step times have of full fine-tuning's."""
    finals = finals_of(cells)
    first = first_budget(finals)
    shown: dict[str, dict[Training, TrainingOutcome]] = {}
    ratios: dict[tuple[str, str], float] = {}
    times = times_beside(cells)
    for cell, outcome in finals.items():
        if cell.budget in ("", first):
            model = cells.recipes[cell.task].model
            shown.setdefault(model, {})[cell] = outcome
            step = times.get((model, row_of(cell.scheme, cell.budget)))
            if step is not None and step.of_full is not None:
                ratios[model, cell.scheme] = step.of_full
    plot_savings(path, shown, ratios)
