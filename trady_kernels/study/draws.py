"""Studies of how often to draw channels, and of how much the rate, the budget and the frequency matter together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from trady_kernels.study.cells import Listed
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.matrix import FACTORS, rounded
from trady_kernels.study.plot import heat_maps, panels, style, write_figure
from trady_kernels.study.results import FULL, RATES, RECIPES, Size, study_recipes
from trady_kernels.study.statistics import paired_test
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, listed
from trady_kernels.training.settings import Settings

#: What is drawn, and how much of the full cost it may take: the papers' smallest budget.
SCHEME, ONCE, BUDGET = "trady", "s-topk-random", "2.2%"
#: Of the grid, whose rates are those that the results table tries.
BUDGETS = ("1%", "2.2%", "7%")

_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 64, "test_samples": 100, "epochs": 2, "warmup_epochs": 0.1}),
    "usual": Size(3),
    "full": Size(3, FULL),
}


def _recipes(size: str, tasks: tuple[str, ...], usual: tuple[str, ...], device: str) -> dict[str, Settings]:
    return study_recipes(size, tasks, ("digits",) if size == "quick" else usual, _SIZES, device)


def _steps_per_epoch(recipe: Settings) -> int | None:
    return None if recipe.train_samples is None else -(-recipe.train_samples // recipe.batch_size)


def frequencies(recipe: Settings) -> dict[str, tuple[str, str]]:
    """Scheme and rule of each frequency by its name, the rarest first.

    Args:
        recipe: whose epochs have a known number of steps; of all samples there are no epochs but whole ones.
    """
    rules: dict[str, tuple[str, str]] = {"once": (ONCE, "epoch")}
    steps = _steps_per_epoch(recipe)
    for epochs in (10, 5, 2):
        if steps is not None and epochs < recipe.epochs:
            rules[f"{epochs} epochs"] = (SCHEME, f"{epochs * steps} steps")
    rules["epoch"] = (SCHEME, "epoch")
    for count in (16, 4, 1):
        if steps is None or count < steps:
            rules[f"{count} steps"] = (SCHEME, f"{count} steps")
    return rules | {rule: (SCHEME, rule) for rule in ("norm 60%", "norm 30%")}


def _often(recipe: Settings) -> str:
    """Four draws an epoch, as far as its steps are known."""
    steps = _steps_per_epoch(recipe)
    return f"{50 if steps is None else max(steps // 4, 1)} steps"


def resampling_plan(
    size: str, tasks: tuple[str, ...] = (), device: str = "cpu"
) -> Listed[Training, TrainingOutcome]:
    """The runs of the study of frequencies, at the rate that is the middle one of the results table.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; all by default, one where it has to be quick.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    recipes = _recipes(size, tasks, tuple(RECIPES), device)
    cells = [
        Training(task, scheme, BUDGET, RATES[recipe.model][""], seed, False, rule)
        for seed in range(_SIZES[size].seeds)
        for task, recipe in recipes.items()
        for scheme, rule in frequencies(recipe).values()
    ]
    return listed(recipes, cells)


def _series(cells: Trainings) -> dict[str, dict[tuple[str, int], TrainingOutcome]]:
    """Outcomes by frequency, then by task and seed."""
    found: dict[str, dict[tuple[str, int], TrainingOutcome]] = {}
    for task, recipe in cells.recipes.items():
        names = {pair: name for name, pair in frequencies(recipe).items()}
        for name in names.values():
            found.setdefault(name, {})
        for cell in cells:
            if cell.task == task and (name := names.get((cell.scheme, cell.resampling), "")):
                found[name][task, cell.seed] = cells[cell]
    return {name: outcomes for name, outcomes in found.items() if outcomes}


def resampling_section(cells: Trainings) -> list[str]:
    """Accuracy by frequency, each compared with a draw an epoch."""
    series = _series(cells)
    accuracies = {
        name: {key: 100 * outcome.top1 for key, outcome in found.items()} for name, found in series.items()
    }
    rows = []
    for name, found in accuracies.items():
        row = [
            name,
            *(spread([v for (task, _), v in found.items() if task == wanted]) for wanted in cells.recipes),
        ]
        shared = found.keys() & accuracies.get("epoch", {}).keys()
        if name == "epoch" or not shared:
            row.append("")
        else:
            test = paired_test(found, accuracies["epoch"])
            row.append(f"{test.difference:+.2f}" + ("" if math.isnan(test.p) else f" (p {test.p:.3f})"))
        rows.append(row)
    rate = ", ".join(f"{cell.learning_rate:g}" for cell in {c.learning_rate: c for c in cells}.values())
    return [
        f"Top-1 of `{SCHEME}` at {BUDGET} and the rate {rate}, mean and standard deviation over seeds, by when channels are drawn "
        "again; beside it the mean difference from a draw an epoch, with a paired t-test.",
        "",
        *markdown(["drawn again after", *cells.recipes, "against epoch"], rows),
    ]


def plot_resampling(path: Path, cells: Trainings) -> None:
    """Draw the training loss by epoch, a line a frequency, a panel a task."""
    figure, axes_of = panels(len(cells.recipes))
    series = _series(cells)
    for axes, task in zip(axes_of, cells.recipes, strict=True):
        for place, (name, found) in enumerate(series.items()):
            runs = [o.curves["train_loss"] for (of, _), o in found.items() if of == task and o.curves]
            if runs:
                means = [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
                axes.plot(range(1, 1 + len(means)), means, label=name, **style(place))
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    axes_of[0].set_ylabel("training loss")
    write_figure(path, figure)


def sensitivity_plan(
    size: str, tasks: tuple[str, ...] = (), device: str = "cpu"
) -> Listed[Training, TrainingOutcome]:
    """The runs of a small grid of rates, budgets and frequencies.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; one image task by default.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    recipes = _recipes(size, tasks, ("mnist",), device)
    cells = [
        Training(task, scheme, budget, rounded(RATES[recipe.model][""] * factor), seed, False, rule)
        for seed in range(_SIZES[size].seeds)
        for task, recipe in recipes.items()
        for scheme, rule in ((ONCE, "epoch"), (SCHEME, "epoch"), (SCHEME, _often(recipe)))
        for budget in BUDGETS
        for factor in FACTORS
    ]
    return listed(recipes, cells)


def _grids(cells: Trainings) -> dict[str, dict[tuple[str, float], list[float]]]:
    """Accuracies by task and frequency, then by budget and rate."""
    grids: dict[str, dict[tuple[str, float], list[float]]] = {}
    for cell in cells:
        drawn = "once" if cell.scheme == ONCE else cell.resampling
        grid = grids.setdefault(f"{cell.task}, drawn {drawn if drawn == 'once' else 'every ' + drawn}", {})
        grid.setdefault((cell.budget, cell.learning_rate), []).append(100 * cells[cell].top1)
    return grids


def sensitivity_section(cells: Trainings) -> list[str]:
    """Accuracy at every point of the grid."""
    rates = sorted({cell.learning_rate for cell in cells})
    rows = []
    for words, grid in _grids(cells).items():
        for budget in [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]:
            rows.append([words, budget, *(spread(grid.get((budget, rate), [])) for rate in rates)])
    return [
        "Top-1, mean and standard deviation over seeds, by budget and learning rate.",
        "",
        *markdown(["task and draws", "budget", *(f"rate {rate:g}" for rate in rates)], rows),
    ]


def plot_sensitivity(path: Path, cells: Trainings) -> None:
    """Draw the grid, a panel a frequency."""
    pictures = {}
    for words, grid in _grids(cells).items():
        rates = sorted({rate for _, rate in grid})
        budgets = [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]
        matrix = [
            [
                statistics.fmean(grid[budget, rate]) if (budget, rate) in grid else float("nan")
                for rate in rates
            ]
            for budget in budgets
        ]
        pictures[words] = (matrix, budgets, [f"{rate:g}" for rate in rates])
    values = [v for matrix, _, _ in pictures.values() for row in matrix for v in row if not math.isnan(v)]
    options = {"words": "top-1 accuracy (%)", "low": min(values), "high": max(values), "digits": 1}
    write_figure(path, heat_maps(pictures, **options))  # type: ignore[arg-type]
