"""Studies of how often to draw channels, and of how much the rate, the budget and the frequency matter together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from trady_kernels.study.cells import Listed
from trady_kernels.study.markdown import markdown
from trady_kernels.study.matrix import FACTORS, rounded
from trady_kernels.study.plot import draw_means, heat_maps, panels, style, write_figure
from trady_kernels.study.results import (
    FULL,
    RECIPES,
    Request,
    Size,
    choosing_channels,
    middle_rate,
    study_recipes,
)
from trady_kernels.study.statistics import paired_test
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, listed, top1_words
from trady_kernels.training.settings import Settings

#: What is drawn where a user does not say, and how much of the full cost it may take: the papers' smallest budget.
SCHEME, BUDGET = "trady", "2.2%"
#: Of the grid, whose rates are those that the results table tries.
BUDGETS = ("1%", "2.2%", "7%")
#: Epochs between draws and steps between draws; a run that ends before has no use for them.
EPOCHS, STEPS, CRITERIA = (10, 5, 2), (16, 4, 1), ("norm 60%", "norm 30%")

_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 64, "test_samples": 100, "epochs": 3, "warmup_epochs": 0.1}),
    # Short epochs, so that there is room for ten of them between two draws.
    "usual": Size(3, {"train_samples": 250, "epochs": 12, "warmup_epochs": 1}),
    "full": Size(3, FULL),
}
_GRID_SIZES = {**_SIZES, "usual": Size(3)}


def frequencies(recipe: Settings) -> dict[str, str]:
    """The rule of each frequency by its name, the rarest first.

    Args:
        recipe: whose epochs, and steps where its samples are counted, are room for some of them.
    """
    rules = {"once": f"{recipe.epochs} epochs"}
    rules |= {f"{count} epochs": f"{count} epochs" for count in EPOCHS if count < recipe.epochs}
    rules["epoch"] = "epoch"
    steps = None if recipe.train_samples is None else -(-recipe.train_samples // recipe.batch_size)
    rules |= {f"{count} steps": f"{count} steps" for count in STEPS if steps is None or count < steps}
    return rules | {rule: rule for rule in CRITERIA}


def _often(recipe: Settings) -> str:
    """Four draws an epoch, as far as its steps are known."""
    samples = 200 * recipe.batch_size if recipe.train_samples is None else recipe.train_samples
    return f"{max(samples // recipe.batch_size // 4, 1)} steps"


def resampling_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs of the study of frequencies, at the rate that is the middle one of the results table.

    Raises:
        ValueError: no such size, task or scheme.
    """
    recipes = study_recipes(request, ("digits",) if request.size == "quick" else RECIPES, _SIZES)
    cells = [
        Training(task, scheme, BUDGET, middle_rate(recipe), seed, False, rule)
        for seed in range(_SIZES[request.size].seeds)
        for task, recipe in recipes.items()
        for scheme in choosing_channels(request.schemes) or (SCHEME,)
        for rule in frequencies(recipe).values()
    ]
    return listed(recipes, cells)


Series = dict[tuple[str, int], TrainingOutcome]  # by task and seed


def _series(cells: Trainings) -> dict[tuple[str, str], Series]:
    """Outcomes by scheme and frequency."""
    found: dict[tuple[str, str], Series] = {}
    for scheme in dict.fromkeys(cell.scheme for cell in cells):
        for task, recipe in cells.recipes.items():
            for name, rule in frequencies(recipe).items():
                series = found.setdefault((scheme, name), {})
                for cell in cells:
                    if (cell.task, cell.scheme, cell.resampling) == (task, scheme, rule):
                        series[task, cell.seed] = cells[cell]
    order = [
        "once",
        *(f"{count} epochs" for count in EPOCHS),
        "epoch",
        *(f"{count} steps" for count in STEPS),
    ]
    order += CRITERIA
    return dict(
        sorted(
            ((key, series) for key, series in found.items() if series),
            key=lambda item: (item[0][0], order.index(item[0][1])),
        )
    )


def _top1(series: Series) -> dict[tuple[str, int], float]:
    return {key: 100 * outcome.top1 for key, outcome in series.items()}


def resampling_section(cells: Trainings) -> list[str]:
    """Accuracy by frequency, each compared with a draw an epoch."""
    series = _series(cells)
    rows, sentences = [], []
    for (scheme, name), found in series.items():
        row = [
            scheme,
            name,
            *(
                top1_words([o for (task, _), o in found.items() if task == wanted])
                for wanted in cells.recipes
            ),
        ]
        epoch = series.get((scheme, "epoch"), {})
        shared = found.keys() & epoch.keys()
        row.append("" if name == "epoch" or not shared else paired_test(_top1(found), _top1(epoch)).words)
        rows.append(row)
        if name == "once" and shared:
            test = paired_test(_top1(epoch), _top1(found))
            sentences += [
                "",
                f"*Channels drawn anew each epoch beat channels drawn once (TraDy)*, {scheme}: {test.verdict}, {test.words}, "
                f"{test.wins} of {test.pairs} won.",
            ]
    others = {key: found for key, found in series.items() if key[1] not in ("once", "epoch")}
    for scheme in dict.fromkeys(scheme for scheme, _ in others):
        epoch = series.get((scheme, "epoch"), {})
        apart = [
            f"{name} ({test.words})"
            for (of, name), found in others.items()
            if of == scheme and found.keys() & epoch.keys()
            if (test := paired_test(_top1(found), _top1(epoch))).significant
        ]
        sentences += [
            "",
            f"*How often, and by which criterion, is left open (TraDy)*; here, {scheme}, apart from a draw an epoch at 5%: "
            f"{', '.join(apart) or 'none'}.",
        ]
    rate = ", ".join(f"{rate:g}" for rate in dict.fromkeys(cell.learning_rate for cell in cells))
    return [
        f"Top-1 at {BUDGET} and the rate {rate}, mean and standard deviation over seeds, by when channels are drawn again; beside it "
        "the mean difference from a draw an epoch, with a paired t-test over tasks and seeds.",
        "",
        *markdown(["scheme", "drawn again after", *cells.recipes, "against epoch"], rows),
        *sentences,
    ]


def plot_resampling(path: Path, cells: Trainings) -> None:
    """Draw the training loss by epoch, a line a frequency, a panel a task, and accuracies with their spread below."""
    tasks = [task for task in cells.recipes if any(cell.task == task for cell in cells)]
    figure, axes_of = panels(2 * len(tasks))
    several = len({cell.scheme for cell in cells}) > 1
    names = {key: f"{key[0]}, {key[1]}" if several else key[1] for key in _series(cells)}
    for number, task in enumerate(tasks):
        losses, accuracies = axes_of[2 * number : 2 * number + 2]
        for place, (key, found) in enumerate(_series(cells).items()):
            runs = [outcome for (of, _), outcome in found.items() if of == task]
            means = [
                statistics.fmean(values)
                for values in zip(*(o.curves["train_loss"] for o in runs if o.curves), strict=True)
            ]
            look = style(place) | {"marker": ""}
            losses.plot(range(1, 1 + len(means)), means, label=names[key], **look)
            draw_means(accuracies, {place: [100 * outcome.top1 for outcome in runs]}, **style(place))
        losses.set_xlabel("epoch")
        losses.xaxis.get_major_locator().set_params(integer=True)
        losses.set_yscale("log")
        losses.set_ylabel("training loss")
        accuracies.set_xticks(range(len(names)), list(names.values()), rotation=90)
        accuracies.set_xlabel("drawn again after")
        accuracies.set_ylabel("top-1 accuracy (%)")
        for axes in (losses, accuracies):
            axes.set_title(task)
            axes.grid(alpha=0.3)
    write_figure(path, figure)


def sensitivity_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs of a small grid of rates, budgets and frequencies.

    Raises:
        ValueError: no such size, task or scheme.
    """
    usual = ("digits",) if request.size == "quick" else ("mnist",)
    recipes = study_recipes(request, usual, _GRID_SIZES)
    cells = [
        Training(task, scheme, budget, rounded(middle_rate(recipe) * factor), seed, False, rule)
        for seed in range(_GRID_SIZES[request.size].seeds)
        for task, recipe in recipes.items()
        for scheme in choosing_channels(request.schemes) or (SCHEME,)
        for rule in _rules(recipe)
        for budget in BUDGETS
        for factor in FACTORS
    ]
    return listed(recipes, cells)


def _rules(recipe: Settings) -> tuple[str, ...]:
    """Of the grid, the rarest first."""
    return frequencies(recipe)["once"], "epoch", _often(recipe)


def _grids(cells: Trainings) -> dict[str, dict[tuple[str, float], list[TrainingOutcome]]]:
    """Outcomes by task, scheme and frequency, then by budget and rate."""
    grids: dict[str, dict[tuple[str, float], list[TrainingOutcome]]] = {}
    for cell in sorted(cells, key=lambda cell: _rules(cells.recipes[cell.task]).index(cell.resampling)):
        once = cell.resampling == frequencies(cells.recipes[cell.task])["once"]
        drawn = "once" if once else f"every {cell.resampling}"
        grid = grids.setdefault(f"{cell.task}, {cell.scheme}, {drawn}", {})
        grid.setdefault((cell.budget, cell.learning_rate), []).append(cells[cell])
    return grids


def sensitivity_section(cells: Trainings) -> list[str]:
    """Accuracy at every point of the grid, and how much each of the three moves it."""
    rates = sorted({cell.learning_rate for cell in cells})
    rows = []
    for words, grid in _grids(cells).items():
        for budget in [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]:
            rows.append([words, budget, *(top1_words(grid.get((budget, rate), [])) for rate in rates)])
    return [
        "Top-1, mean and standard deviation over seeds, by budget and learning rate.",
        "",
        *markdown(["task, scheme, drawn", "budget", *(f"rate {rate:g}" for rate in rates)], rows),
        *_ranges(cells),
    ]


def _ranges(cells: Trainings) -> list[str]:
    """Of each setting, how far apart the means of its values are over everything else."""
    found = []
    for words, name in (
        ("learning rate", "learning_rate"),
        ("budget", "budget"),
        ("frequency", "resampling"),
    ):
        ranges = []
        for task in cells.recipes:
            of_value: dict[object, list[float]] = {}
            for cell in cells:
                if cell.task == task:
                    of_value.setdefault(getattr(cell, name), []).append(100 * cells[cell].top1)
            means = [statistics.fmean(values) for values in of_value.values()]
            if means:
                ranges.append(f"{max(means) - min(means):.1f} on {task}")
        found.append(f"the {words} {', '.join(ranges)}")
    return [
        "",
        "*How sensitive the method is to its settings is left open (TraDy)*; here, in points between the best and the worst mean: "
        f"{'; '.join(found)}.",
    ]


def plot_sensitivity(path: Path, cells: Trainings) -> None:
    """Draw the grid, a panel a frequency."""
    pictures = {}
    for words, grid in _grids(cells).items():
        rates = sorted({rate for _, rate in grid})
        budgets = [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]
        matrix = [
            [
                statistics.fmean(100 * outcome.top1 for outcome in grid[budget, rate])
                if (budget, rate) in grid
                else math.nan
                for rate in rates
            ]
            for budget in budgets
        ]
        pictures[words] = (matrix, budgets, [f"{rate:g}" for rate in rates])
    values = [v for matrix, _, _ in pictures.values() for row in matrix for v in row if not math.isnan(v)]
    write_figure(
        path,
        heat_maps(
            pictures,
            words="top-1 accuracy (%)",
            low=min(values),
            high=max(values),
            digits=1,
            axes_words=("budget", "learning rate"),
        ),
    )
