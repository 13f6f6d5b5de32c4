"""Studies of how often to draw channels, and of how much the rate, the budget and the frequency matter together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trady_kernels.study.cells import Listed, NothingFinished
from trady_kernels.study.markdown import markdown
from trady_kernels.study.matrix import FACTORS, rounded
from trady_kernels.study.plot import LETTERS, heat_maps, panels, write_figure
from trady_kernels.study.results import (
    FULL,
    RECIPES,
    SMALLEST_BUDGET,
    Request,
    Size,
    choosing_channels,
    middle_rate,
    study_recipes,
)
from trady_kernels.study.statistics import paired_test
from trady_kernels.study.trainings import (
    CHANCE,
    Series,
    Training,
    TrainingOutcome,
    Trainings,
    accuracies,
    at_chance,
    listed,
    rule_words,
    top1_words,
)
from trady_kernels.study.verdicts import Verdict
from trady_kernels.training.plot import COLOURS
from trady_kernels.training.settings import Settings

#: What is drawn where a user does not say.
SCHEME = "trady"
#: Of the grid, whose rates are those that the results table tries.
BUDGETS = ("1%", SMALLEST_BUDGET, "7%")
#: Epochs between draws and steps between draws; a run that ends before has no use for them.
EPOCHS, STEPS, CRITERIA = (10, 5, 2), (16, 4, 1), ("norm 60%", "norm 30%")

_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 64, "test_samples": 100, "epochs": 3, "warmup_epochs": 0.1}),
    # Short epochs, so that there is room for ten of them between two draws.
    "usual": Size(3, {"train_samples": 250, "epochs": 12, "warmup_epochs": 1}),
    "full": Size(3, FULL),
}
_GRID_SIZES = {**_SIZES, "usual": Size(3)}
#: Of the grid: a task of images.
_GRID_TASKS = ("mnist",)


def frequencies(recipe: Settings) -> dict[str, str]:
    """The rule of each frequency by its name, the rarest first.

    Args:
        recipe: whose epochs, and steps where its samples are counted, are room for some of them.
    """
    rules = {"once": f"{recipe.epochs} epochs"}
    rules |= {f"{count} epochs": f"{count} epochs" for count in EPOCHS if count < recipe.epochs}
    rules["epoch"] = "epoch"
    steps = None if recipe.train_samples is None else -(-recipe.train_samples // recipe.batch_size)
    every = [f"{count} steps" for count in STEPS if steps is None or count < steps]
    rules |= {rule_words(rule): rule for rule in every}
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
        Training(task, scheme, SMALLEST_BUDGET, middle_rate(recipe), seed, False, rule)
        for seed in range(_SIZES[request.size].seeds)
        for task, recipe in recipes.items()
        for scheme in choosing_channels(request.schemes) or (SCHEME,)
        for rule in frequencies(recipe).values()
    ]
    return listed(recipes, cells)


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
        *(rule_words(f"{count} steps") for count in STEPS),
    ]
    order += CRITERIA
    return dict(
        sorted(
            ((key, series) for key, series in found.items() if series),
            key=lambda item: (item[0][0], order.index(item[0][1])),
        )
    )


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
        row.append(
            "" if name == "epoch" or not shared else paired_test(accuracies(found), accuracies(epoch)).words
        )
        rows.append(row)
        if name == "once" and shared:
            test = paired_test(accuracies(epoch), accuracies(found))
            sentences += [
                "",
                Verdict.of(
                    "channels drawn anew each epoch beat channels drawn once (TraDy)",
                    scheme,
                    test.verdict,
                    f"{test.words}, {test.wins} of {test.pairs} won",
                ),
            ]
    others = {key: found for key, found in series.items() if key[1] not in ("once", "epoch")}
    for scheme in dict.fromkeys(scheme for scheme, _ in others):
        epoch = series.get((scheme, "epoch"), {})
        apart = [
            f"{name} ({test.words})"
            for (of, name), found in others.items()
            if of == scheme and found.keys() & epoch.keys()
            if (test := paired_test(accuracies(found), accuracies(epoch))).significant
        ]
        sentences += [
            "",
            f"*How often, and by which criterion, is left open (TraDy)*; here, {scheme}, apart from a draw an epoch at 5%: "
            f"{', '.join(apart) or 'none'}.",
        ]
    rate = ", ".join(f"{rate:g}" for rate in dict.fromkeys(cell.learning_rate for cell in cells))
    return [
        f"Top-1 at {SMALLEST_BUDGET} and the rate {rate}, mean and standard deviation over seeds, by when channels are drawn again; beside it "
        "the mean difference from a draw an epoch, with a paired t-test over tasks and seeds. In the picture each run stands beside "
        "that of its seed with a draw an epoch, but for those that diverged: points are of seeds and their means, bars one standard "
        "deviation; losses are geometric means over seeds.",
        "",
        *markdown(["scheme", "drawn again after", *cells.recipes, "against epoch"], rows),
        *sentences,
    ]


def plot_resampling(path: Path, cells: Trainings) -> None:
    """Draw accuracy and training loss beside those of a draw an epoch, seed by seed: two panels a task, a row a frequency."""
    series = _series(cells)
    several = len({cell.scheme for cell in cells}) > 1
    compared = {
        f"{scheme}, {name}" if several else name: (found, series[scheme, _REFERENCE])
        for (scheme, name), found in series.items()
        if name != _REFERENCE and (scheme, _REFERENCE) in series
    }
    tasks = [
        task
        for task in cells.recipes
        if any(key[0] == task for found, epoch in compared.values() for key in found.keys() & epoch.keys())
    ]
    if not tasks:
        raise NothingFinished(f"cells: {cells.path} has no run to set beside one with a draw an epoch yet")
    figure, axes_of = panels(2 * len(tasks))
    losses = {task: [_loss_ratios(*_of_task(pair, task)) for pair in compared.values()] for task in tasks}
    ratios = [ratio for rows in losses.values() for row in rows for ratio in row]
    reach = max([1.01, *(max(ratio, 1 / ratio) for ratio in ratios)])
    for number, task in enumerate(tasks):
        accuracy, loss = axes_of[2 * number : 2 * number + 2]
        _draw_differences(accuracy, {name: _of_task(pair, task) for name, pair in compared.items()})
        image = _draw_ratios(loss, losses[task], reach)
        loss.sharey(accuracy)
        for axes in (accuracy, loss):
            axes.set_title(task)
    bar = figure.colorbar(image, ax=axes_of, location="bottom", shrink=0.6, aspect=30)
    _label_ratios(bar, reach)
    write_figure(path, figure)


def _of_task(pair: tuple[Series, Series], task: str) -> tuple[Series, Series]:
    """Runs of a task that both have, and that did not diverge."""
    found, others = pair
    keys = [
        key
        for key in found
        if key[0] == task and key in others and not (found[key].diverged or others[key].diverged)
    ]
    return {key: found[key] for key in keys}, {key: others[key] for key in keys}


def _loss_ratios(found: Series, others: Series) -> list[float]:
    """Of each epoch, the training loss over that of the others' runs, the geometric mean over seeds."""
    curves = (
        zip(found[key].curves["train_loss"], others[key].curves["train_loss"], strict=True) for key in found
    )
    # Losses have six digits in the file.
    by_seed = [[max(loss, 1e-6) / max(other, 1e-6) for loss, other in pairs] for pairs in curves]
    return [statistics.geometric_mean(ratios) for ratios in zip(*by_seed, strict=True)]


def _draw_differences(axes: Any, compared: Mapping[str, tuple[Series, Series]]) -> None:
    """A row a frequency: the accuracy less that of a draw an epoch, of each seed and the mean with one standard deviation."""
    for row, (found, others) in enumerate(compared.values()):
        differences = [100 * (found[key].top1 - others[key].top1) for key in found]
        if not differences:
            continue
        bar = statistics.stdev(differences) if len(differences) > 1 else 0.0
        axes.plot(
            differences, [row] * len(differences), ".", markersize=3, color=_SEED_COLOUR, label="a seed"
        )
        mean = statistics.fmean(differences)
        axes.errorbar(mean, row, xerr=bar, fmt="o", capsize=2, label="mean", **_MEAN_LOOK)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(compared)), list(compared))
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_ylabel("drawn again after")
    axes.set_xlabel("top-1, difference (points)")
    axes.grid(alpha=0.3)


def _draw_ratios(axes: Any, rows: Sequence[Sequence[float]], reach: float) -> Any:
    """A row a frequency, a column an epoch, a colour for how far the loss is from that of a draw an epoch."""
    from matplotlib.colors import LogNorm

    epochs = max(1, *map(len, rows))
    image = axes.imshow(
        [[*row, *[math.nan] * (epochs - len(row))] for row in rows],
        norm=LogNorm(1 / reach, reach),
        cmap="PuOr_r",
        aspect="auto",
        extent=(0.5, epochs + 0.5, len(rows) - 0.5, -0.5),
    )
    axes.tick_params(labelleft=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    return image


def _label_ratios(bar: Any, reach: float) -> None:
    bar.minorticks_off()
    bar.set_ticks([1 / reach, 1.0, reach], labels=[f"{1 / reach:.2f}", "1", f"{reach:.2f}"])
    bar.ax.tick_params(labelsize=LETTERS["ticks"])
    bar.set_label("training loss over that of a draw an epoch", fontsize=LETTERS["label"])


#: What other frequencies are compared with.
_REFERENCE = "epoch"
_SEED_COLOUR, _MEAN_LOOK = "0.6", {"color": COLOURS[0], "markersize": 3, "linewidth": 1}


def sensitivity_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs of a small grid of rates, budgets and frequencies.

    Raises:
        ValueError: no such size, task or scheme.
    """
    usual = ("digits",) if request.size == "quick" else _GRID_TASKS
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


#: Outcomes by budget and rate.
Grid = dict[tuple[str, float], list[TrainingOutcome]]


def _grids(cells: Trainings) -> dict[tuple[str, str, str], Grid]:
    """Outcomes by task, scheme and frequency in words."""
    grids: dict[tuple[str, str, str], Grid] = {}
    for cell in sorted(cells, key=lambda cell: _rules(cells.recipes[cell.task]).index(cell.resampling)):
        grid = grids.setdefault((cell.task, cell.scheme, _drawn(cell, cells.recipes[cell.task])), {})
        grid.setdefault((cell.budget, cell.learning_rate), []).append(cells[cell])
    return grids


def _drawn(cell: Training, recipe: Settings) -> str:
    once = cell.resampling == frequencies(recipe)["once"]
    return "once" if once else f"every {rule_words(cell.resampling)}"


def sensitivity_section(cells: Trainings) -> list[str]:
    """Accuracy at every point of the grid, and how much each of the three moves it."""
    rates = sorted({cell.learning_rate for cell in cells})
    rows = []
    for key, grid in _grids(cells).items():
        recipe = cells.recipes[key[0]]
        for budget in [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]:
            points = (grid.get((budget, rate), []) for rate in rates)
            rows.append([", ".join(key), budget, *(_point_words(runs, recipe) for runs in points)])
    return [
        "Top-1, mean and standard deviation over seeds, by budget and learning rate. The study has one task of images, "
        f"{', '.join(_GRID_TASKS)}. At chance: the last epoch's training loss is not under {CHANCE:.0%} of that of equal guesses, the "
        "logarithm of the number of classes. In the picture, medians over seeds.",
        "",
        *markdown(["task, scheme, drawn", "budget", *(f"rate {rate:g}" for rate in rates)], rows),
        *_ranges(cells),
    ]


def _point_words(runs: Sequence[TrainingOutcome], recipe: Settings) -> str:
    lost = sum(at_chance(run, recipe) for run in runs)
    return top1_words(runs) + (f" ({lost} at chance)" if lost else "")


def _ranges(cells: Trainings) -> list[str]:
    """Of each setting, the values with the lowest and the highest median over everything else: one run at chance hardly moves it."""
    values: Mapping[str, Callable[[Training], str]] = {
        "learning rate": lambda cell: f"{cell.learning_rate:g}",
        "budget": lambda cell: cell.budget,
        "frequency": lambda cell: _drawn(cell, cells.recipes[cell.task]),
    }
    found = []
    for task, scheme in dict.fromkeys((cell.task, cell.scheme) for cell in cells):
        ranges = []
        for setting, value_of in values.items():
            of_value: dict[str, list[float]] = {}
            for cell in cells:
                if (cell.task, cell.scheme) == (task, scheme):
                    of_value.setdefault(value_of(cell), []).append(100 * cells[cell].top1)
            medians = {value: statistics.median(top1) for value, top1 in of_value.items()}
            worst, best = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
            apart = f"({worst}) to {medians[best]:.1f} ({best})" if worst != best else "throughout"
            ranges.append(f"{setting} {medians[worst]:.1f} {apart}")
        found.append(f"{task}, {scheme}: {', '.join(ranges)}")
    return [
        "",
        "*How sensitive the method is to its settings is left open (TraDy)*; here, of each setting the values of the lowest and the "
        f"highest median top-1, over seeds and the other settings: {'; '.join(found)}.",
    ]


def plot_sensitivity(path: Path, cells: Trainings) -> None:
    """Draw the medians over seeds, a panel a frequency; hatched where a run diverged or ended at chance."""
    pictures, hatched, learned = {}, [], []
    several = len({cell.scheme for cell in cells}) > 1
    for key, grid in _grids(cells).items():
        rates = sorted({rate for _, rate in grid})
        budgets = [budget for budget in BUDGETS if any(b == budget for b, _ in grid)]
        lost = {
            point
            for point, runs in grid.items()
            if any(run.diverged or at_chance(run, cells.recipes[key[0]]) for run in runs)
        }
        medians = {point: statistics.median(100 * run.top1 for run in runs) for point, runs in grid.items()}
        matrix = [[medians.get((budget, rate), math.nan) for rate in rates] for budget in budgets]
        title = ", ".join(key if several else (key[0], key[2]))
        pictures[title] = (matrix, budgets, [f"{rate:g}" for rate in rates])
        hatched.append([(rates.index(rate), budgets.index(budget)) for budget, rate in lost])
        learned += [median for point, median in medians.items() if point not in lost]
    learned = learned or [0.0, 100.0]
    figure = heat_maps(
        pictures,
        words="median top-1 accuracy (%)",
        low=min(learned),
        high=max(learned),
        digits=1,
        axes_words=("budget", "learning rate"),
    )
    for axes, places in zip(figure.axes, hatched, strict=False):
        axes.set_aspect("auto")  # as wide as there is room for
        _hatch(axes, places)
    write_figure(path, figure)


def _hatch(axes: Any, places: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"fill": False, "hatch": "///", "edgecolor": COLOURS[1], "linewidth": 0}
    for column, row in places:
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, label="a run diverged or ended at chance", **look))
