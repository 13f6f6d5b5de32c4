"""Studies of what a budget buys and what is left out for it, from the runs of the results table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from trady_kernels.study.cells import NothingFinished
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.matrix import Matrix
from trady_kernels.study.plot import plot_budgets, plot_savings
from trady_kernels.study.results import SMALLEST_BUDGET, Request, results_matrix
from trady_kernels.study.statistics import Quartiles, held, paired_test
from trady_kernels.study.steps import StepTime, row_of, times_beside
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, top1_words
from trady_kernels.study.verdicts import Verdict
from trady_kernels.training.ingredients import tuned_as

#: What TraDy reports that it leaves out at its smallest budget, percent of what is counted: what it is, and the least.
_PUBLISHED = {
    "weight_share": ("weights", 93.0),
    "activation_share": ("activations", 97.5),
    "gradient_share": ("gradient FLOPs", 97.0),
}
#: Who says of a scheme that a larger budget buys accuracy.
_SOURCES = {"trady": " (TraDy)", "medyate": " (MeDyate)"}
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


def chosen_rates(finals: Iterable[Training]) -> list[tuple[str, str, float]]:
    """Every scheme and budget with the learning rate of its runs on test samples."""
    return sorted({(cell.scheme, cell.budget, cell.learning_rate) for cell in finals})


def tried_rates(tasks: Sequence[str], cells: Trainings) -> dict[tuple[str, str], set[float]]:
    """The learning rates that were tried of every scheme, whatever its own budget, at every budget of the table."""
    tried: dict[tuple[str, str], set[float]] = defaultdict(set)
    for cell in cells:
        if cell.held_out and cell.task in tasks:
            tried[_tried_as(cell.scheme), cell.budget].add(cell.learning_rate)
    return tried


def rate_ends(
    tasks: Sequence[str], cells: Trainings, finals: Iterable[Training]
) -> dict[tuple[str, str], str]:
    """Of every scheme and budget that ran, what is to be known of its learning rate, or "".

    Whether it is the lowest or the highest of those tried, or that none was tried at this budget.
    """
    tried, found = tried_rates(tasks, cells), {}
    tuned = {scheme for scheme, _ in tried}
    for scheme, budget, rate in chosen_rates(finals):
        as_scheme = _tried_as(scheme)
        rates = tried.get((as_scheme, budget), set())
        if rate in rates:
            found[scheme, budget] = {min(rates): "lowest", max(rates): "highest"}.get(rate, "")
        else:
            found[scheme, budget] = "of another budget" if as_scheme in tuned else ""
    return found


def _tried_as(scheme: str) -> str:
    """Schemes that differ in budgets of their own have the same rates to choose from."""
    return tuned_as(scheme).partition("@")[0]


def budgets_of(finals: Iterable[Training]) -> list[str]:
    """Budgets of runs, the one with the most schemes first."""
    schemes: dict[str, set[str]] = {}
    for cell in finals:
        if cell.budget:
            schemes.setdefault(cell.budget, set()).add(cell.scheme)
    names = sorted(schemes)
    first = max(names, key=lambda budget: len(schemes[budget]), default="")
    return sorted(names, key=lambda budget: budget != first)


def first_budget(finals: Iterable[Training]) -> str:
    """The budget with the most schemes; "" without one."""
    return next(iter(budgets_of(finals)), "")


Runs = Mapping[Training, TrainingOutcome]


def by_network(cells: Trainings, finals: Runs) -> dict[str, dict[Training, TrainingOutcome]]:
    """Runs of each network."""
    networks: dict[str, dict[Training, TrainingOutcome]] = {}
    for cell, outcome in finals.items():
        networks.setdefault(cells.recipes[cell.task].model, {})[cell] = outcome
    return networks


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
        *_budget_verdicts(cells, found),
    ]


def _budget_verdicts(cells: Trainings, found: Mapping[tuple[str, str, str], Runs]) -> Iterator[str]:
    """Whether more memory buys accuracy, of every scheme with two budgets that have at least two pairs of runs."""
    for model, scheme in dict.fromkeys((model, scheme) for model, scheme, _ in found):
        accuracies = {
            budget: {(cell.task, cell.seed): 100 * outcome.top1 for cell, outcome in runs.items()}
            for (of, name, budget), runs in found.items()
            if (of, name) == (model, scheme) and budget
        }
        compared = [
            (least, most)
            for least, most in combinations(sorted(accuracies, key=_size), 2)
            if len(accuracies[least].keys() & accuracies[most].keys()) > 1
        ]
        if compared:
            least, most = max(compared, key=lambda pair: _size(pair[1]) - _size(pair[0]))
            test = paired_test(accuracies[most], accuracies[least])
            ends = _ends_in_words(cells, {**found[model, scheme, most], **found[model, scheme, least]})
            yield ""
            yield Verdict.of(
                f"a larger budget buys accuracy{_SOURCES.get(scheme, '')}",
                f"{model}, {scheme}, {most} against {least}",
                test.verdict,
                f"{test.words}, {test.wins} of {test.pairs} won{ends}",
            )


def _ends_in_words(cells: Trainings, runs: Runs) -> str:
    """What is to be known of the learning rates of runs, where one is the lowest or the highest of those tried."""
    tasks = list(dict.fromkeys(cell.task for cell in runs))
    named = [f"{row_of(*row)} {end}" for row, end in rate_ends(tasks, cells, runs).items() if end]
    return f" (rates at an end of those tried, or of another budget: {', '.join(named)})" if named else ""


def plot_budget(path: Path, cells: Trainings) -> None:
    """Draw accuracy against measured bytes, a panel a network."""
    plot_budgets(path, by_network(cells, finals_of(cells)))


def efficiency_section(cells: Trainings) -> list[str]:
    """What each scheme leaves out, counted, and what that comes to, measured."""
    found, times = _rows(cells), times_beside(cells)
    rows: list[list[str]] = []
    sentences: list[str] = []
    for model, scheme, budget in sorted(found, key=lambda key: (key[0], key[1], _size(key[2]))):
        first = next(iter(found[model, scheme, budget]))
        runs = [outcome for outcome in found[model, scheme, budget].values() if outcome.curves]
        if not runs:
            continue

        left = {name: _left_out(runs, name) for name in _PUBLISHED}
        saved = [
            100 * (1 - kept / run.dense_saved_bytes) for run in runs for kept in run.curves["saved_bytes"]
        ]
        time = _time_saved(times.get((model, row_of(first.scheme, first.budget))))
        rows.append([model, scheme, budget or "-", *map(spread, left.values()), spread(saved), time])
        if (scheme, budget) == ("trady", SMALLEST_BUDGET):
            sentences += ["", _left_out_verdict(model, left, saved)]
    heads = [
        *("network", "scheme", "budget", "weights (%)", "activations (%)", "gradient FLOPs (%)"),
        *("saved bytes (%)", "step time (%)"),
    ]
    return [
        "Left out of what full fine-tuning takes: counted for weight gradients, stored inputs and their multiply-accumulates, "
        "measured for the bytes that a step saves for its backward pass (mean and standard deviation over tasks, seeds and "
        "epochs) and for the time of a step, of `trady study steps` (median and quartiles). The picture has what is kept, of "
        "some rows.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _left_out(runs: Sequence[TrainingOutcome], name: str) -> list[float]:
    """Percent of a share, of every run and epoch."""
    return [100 * (1 - share) for run in runs for share in run.curves[name]]


def _time_saved(step: StepTime | None) -> str:
    if step is None or step.of_full is None:
        return ""
    saved = (100 * (1 - ratio) for ratio in (step.of_full.high, step.of_full.median, step.of_full.low))
    return Quartiles(*saved).words(0)


def _left_out_verdict(model: str, left: Mapping[str, Sequence[float]], saved: Sequence[float]) -> Verdict:
    """Of TraDy's figures, which are counted, beside what is measured."""
    means = {name: statistics.fmean(shares) for name, shares in left.items()}
    parts = [
        f"{words} {means[name]:.1f}% (at least {least:g}%)" for name, (words, least) in _PUBLISHED.items()
    ]
    return Verdict.of(
        f"at {SMALLEST_BUDGET}, the papers' smallest budget, nearly everything is left out, as it is counted (TraDy)",
        model,
        held(sum(means[name] >= least for name, (_, least) in _PUBLISHED.items()), len(_PUBLISHED)),
        f"of {', '.join(parts)}; measured, {statistics.fmean(saved):.1f}% of the bytes that a step saves",
    )


def plot_efficiency(path: Path, cells: Trainings) -> None:
    """Draw what is kept by epoch, of the budget that most schemes have, and what step times have of full fine-tuning's."""
    finals = finals_of(cells)
    first = first_budget(finals)
    shown = {cell: outcome for cell, outcome in finals.items() if cell.budget in ("", first)}
    times = times_beside(cells)
    ratios: dict[tuple[str, str], Quartiles] = {}
    for cell in shown:
        model = cells.recipes[cell.task].model
        step = times.get((model, row_of(cell.scheme, cell.budget)))
        if step is not None and step.of_full is not None:
            ratios[model, cell.scheme] = step.of_full
    plot_savings(path, by_network(cells, shown), ratios)
