"""Studies of what a budget buys and what is left out for it, from the runs of the results table."""

from __future__ import annotations

from pathlib import Path

from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.matrix import Matrix
from trady_kernels.study.plot import plot_budgets, plot_savings
from trady_kernels.study.results import results_matrix
from trady_kernels.study.steps import row_of, times_beside
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings

#: Rows and task where it has to be quick.
_QUICK_SCHEMES, _QUICK_TASKS = ("trady", "frugal@5.2%", "head-only"), ("digits",)


def budgets_plan(size: str, tasks: tuple[str, ...] = (), device: str = "cpu") -> Matrix:
    """The runs of the results table; where it has to be quick, some of them.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; all by default.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    if size == "quick":
        return results_matrix(size, tasks or _QUICK_TASKS, _QUICK_SCHEMES, device)
    return results_matrix(size, tasks, (), device)


def finals_of(cells: Trainings) -> dict[Training, TrainingOutcome]:
    """The runs on test samples.

    Raises:
        ValueError: there is none.
    """
    finals = {cell: cells[cell] for cell in cells if not cell.held_out}
    if not finals:
        raise ValueError(f"cells: {cells.path} has no run on test samples yet, expected some")
    return finals


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
            f"{task} {spread([100 * o.top1 for cell, o in runs.items() if cell.task == task])}"
            for task in tasks
        )
        memory = spread([outcome.training_bytes / 2**20 for outcome in runs.values()])
        rows.append([model, scheme, budget or "-", memory, ", ".join(by_task)])
    return [
        "What a step needs beside the weights, measured, and top-1 (mean and standard deviation; of bytes over tasks and seeds).",
        "",
        *markdown(["network", "scheme", "budget", "training memory (MiB)", "top-1"], rows),
    ]


def plot_budget(path: Path, cells: Trainings) -> None:
    """Draw accuracy against measured bytes, a panel a task."""
    plot_budgets(path, finals_of(cells))


def efficiency_section(cells: Trainings) -> list[str]:
    """What each scheme leaves out, counted, and what that comes to, measured."""
    found, times = _rows(cells), times_beside(cells)
    rows = []
    for model, scheme, budget in sorted(found, key=lambda key: (key[0], key[1], _size(key[2]))):
        first = next(iter(found[model, scheme, budget]))
        runs = [outcome for outcome in found[model, scheme, budget].values() if outcome.curves]
        if not runs:
            continue

        def percent(name: str, runs: list[TrainingOutcome] = runs) -> str:
            return spread([100 * (1 - share) for run in runs for share in run.curves[name]])

        saved = spread([100 * (1 - run.saved_bytes / run.dense_saved_bytes) for run in runs])
        shares = ("weight_share", "activation_share", "gradient_share")
        step = times.get((model, row_of(first.scheme, first.budget)))
        time = "" if step is None or step.of_full is None else f"{100 * (1 - step.of_full):.0f}"
        rows.append([model, scheme, budget or "-", *map(percent, shares), saved, time])
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
    ]


def plot_efficiency(path: Path, cells: Trainings) -> None:
    """Draw what is left out by epoch, of the budget that most schemes have, and what step times have of full fine-tuning's."""
    finals = finals_of(cells)
    budgets = [cell.budget for cell in finals if cell.budget]
    first = max(sorted(set(budgets)), key=budgets.count, default="")
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
