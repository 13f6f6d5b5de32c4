"""``docs/results.md``: what the cells of a results table say, in tables, tests and sentences that nobody wrote by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.budgets import budgets_of, chosen_rates, finals_of, first_budget, rate_ends
from trady_kernels.study.cells import CellFile, made_with
from trady_kernels.study.comparisons import (
    REFERENCES,
    against,
    claims_table,
    of_task,
    presets_everywhere,
    presets_left_out,
    presets_rows,
    presets_section,
    tasks_of,
)
from trady_kernels.study.markdown import markdown
from trady_kernels.study.matrix import MOST_MOVES, final_rates
from trady_kernels.study.plot import figure_files, plot_budgets, plot_savings
from trady_kernels.study.recipes import recipe_table
from trady_kernels.study.results import rows_of
from trady_kernels.study.statistics import Spread
from trady_kernels.study.steps import STEPS, StepTime, Timings, row_of, step_times, timings_beside
from trady_kernels.study.trainings import (
    Series,
    Training,
    TrainingOutcome,
    Trainings,
    accuracies,
    top1_words,
)
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.settings import Settings

#: Of the names of plots of what is left out.
_SAVINGS = "-savings"
#: What a training step needs beside the weights.
_BYTES = ("saved_bytes", "gradient_bytes", "optimizer_bytes")
#: What is to be known of the figures of a scheme or an ingredient, beside the notes of its runs.
_OF_FIGURES = {
    "checkpoint": "the block that the backward pass computes again is not among the saved bytes",
    "sparse-update": "the search is for fractions alone: no bias trains, as those of the last layers do in the paper",
    "velocity": "the FLOPs are those of its neurons, though all gradients are computed and the others' dropped; all outputs for "
    "some samples, which it keeps from one epoch to the next, are not among the bytes",
}
#: Points of accuracy below the median of a row's seeds on a task, from which on a run is named.
_FAR_BELOW = 10


def write_report(cells: Trainings, folder: Path, name: str = "results") -> list[Path]:
    """Write the document and its plots.

    Args:
        cells: what to report.
        folder: where to write ``NAME.md``, ``NAME-MODEL.png``, ``NAME-MODEL-savings.png`` and both as SVG.
        name: of the files.

    Returns:
        The files.

    Raises:
        ValueError: there is no finished run on test samples.
        ModuleNotFoundError: scipy or matplotlib is not installed.
    """
    document = folder / f"{name}.md"
    text = report(cells, name)
    write_atomically(document, lambda file: file.write(text.encode()))
    plots = []
    for model in _networks(cells):
        here = {c: o for c, o in finals_of(cells).items() if cells.recipes[c.task].model == model}
        shown = {c: o for c, o in here.items() if c.budget in ("", first_budget(here))}
        stem = _plot_stem(name, model)
        plot_budgets(folder / stem, {model: here})
        plot_savings(folder / f"{stem}{_SAVINGS}", {model: shown})
        plots += [*figure_files(folder / stem), *figure_files(folder / f"{stem}{_SAVINGS}")]
    return [document, *plots]


def report(cells: Trainings, name: str = "results") -> str:
    """The whole document, a function of the file, of the step times beside it and of the rows that a table has.

    Raises:
        ValueError: the file has no finished run on test samples, or a row's runs differ in the learning rate.
        ModuleNotFoundError: scipy is not installed.
    """
    final_rates(cells)
    finals, timings = finals_of(cells), timings_beside(cells)
    times = {} if timings is None else step_times(timings)
    parts = ["# Results", "", *_making(cells, timings), ""]
    networks = _networks(cells)
    for model, tasks in networks.items():
        here = {cell: outcome for cell, outcome in finals.items() if cell.task in tasks}
        parts += _model(model, tasks, cells, here, times, _plot_stem(name, model))
    if len(networks) > 1:
        ours = [presets_rows(at, networks, _by_scheme(finals, at)) for at in budgets_of(finals)]
        parts += presets_everywhere(networks, [row for rows in ours for row in rows])
    return "\n".join(parts).rstrip() + "\n"


def _networks(cells: Trainings) -> dict[str, list[str]]:
    """Tasks of the networks that have a finished run on test samples."""
    models = dict.fromkeys(cells.recipes[cell.task].model for cell in finals_of(cells))
    return {
        model: [task for task, recipe in cells.recipes.items() if recipe.model == model] for model in models
    }


def _plot_stem(name: str, model: str) -> str:
    return f"{name}-{model.replace(':', '-')}"


def _threads(cells: CellFile[Any, Any]) -> str:
    """Of a run: those in a provenance are of the process that began it."""
    return f"{', '.join(map(str, sorted({recipe.threads for recipe in cells.recipes.values()})))} thread(s)"


def _making(cells: Trainings, timings: Timings | None) -> list[str]:
    timed = "." if timings is None else f", with {_threads(timings)}: {made_with(timings)[-1]}"
    return [
        *made_with(cells),
        f"A run has {_threads(cells)}; all runs together took {_hours(cells)}.",
        f"{_seeds(cells)} seeds; a row with fewer runs says how many of them it has. A scheme's learning rate, "
        "one for all tasks of a network at each budget, is the best of three by the mean accuracy on samples held out from "
        "those to train on, with seed 0; where that is the lowest or the highest of them, the three move on by one, "
        f"up to {MOST_MOVES} times. The test samples were evaluated by the final runs alone, and the last "
        "epoch counts. Figures are means over seeds with the sample standard deviation; a run that diverged "
        "counts as an accuracy of 0 and is left out of bytes and shares. Bytes are measured: what a training "
        "step saves for its backward pass (of full: of what full fine-tuning saves), the gradients that it "
        "leaves and the optimiser's state. Tests are two-sided paired t-tests over the pairs of task and seed, as in the papers. "
        "The pairs of a task share its samples, so that they say how sure a difference is on these tasks; of other tasks the "
        "test over the tasks' means says more, and three of them say little. No p is corrected for how many there are. The presets "
        "were put together, and their budgets chosen, with earlier results on the same tasks at hand. "
        "Steps were timed apart, all rows of a network turn by turn "
        f"(`trady study steps`, {STEPS}; median and quartiles){timed}",
    ]


def _hours(cells: Trainings) -> str:
    """Of computing: several ran side by side."""
    return f"{sum(cells[cell].seconds for cell in cells) / 3600:.1f} hours, several of them side by side"


def _seeds(cells: Trainings) -> int:
    return len({cell.seed for cell in cells if not cell.held_out})


def _model(
    model: str,
    tasks: list[str],
    cells: Trainings,
    finals: dict[Training, TrainingOutcome],
    times: Mapping[tuple[str, str], StepTime],
    plot: str,
) -> list[str]:
    lines = [
        f"## {model}",
        "",
        *recipe_table({task: cells.recipes[task] for task in tasks}),
        "",
        f"![Accuracy against measured bytes]({plot}.png)",
        "",
        *_not_run(cells.recipes[tasks[0]], finals),
    ]
    budgets = budgets_of(finals)
    free = _by_scheme(finals, "")
    ours: list[list[str]] = []
    left_out: list[str] = []
    for budget in budgets:
        bound = _by_scheme(finals, budget)
        steps = {
            scheme: times.get((model, row_of(scheme, budget if scheme in bound else "")))
            for scheme in (*bound, *free)
        }
        lines += [
            f"### Budget {budget}",
            "",
            *_table(tasks, {**bound, **free}, bound, steps, _seeds(cells)),
            "",
        ]
        if budget == budgets[0]:
            ends = rate_ends(tasks, cells, finals)
            here = {scheme: end for (scheme, at), end in ends.items() if at in (budget, "")}
            claims = claims_table({**bound, **free}, here)
            lines += [*claims, *([""] if claims else [])]
        lines += _notes({**bound, **free} if budget == budgets[0] else bound)
        if "head-only" in free:
            lines += _below_the_head(bound, free["head-only"])
        ours += presets_rows(budget, {model: tasks}, bound)
        left_out += presets_left_out(budget, bound)
    savings = f"![What is kept by epoch]({plot}{_SAVINGS}.png)"
    lines += presets_section(tasks, _seeds(cells), ours, left_out)
    return [
        *lines,
        "### What is left out, epoch by epoch",
        "",
        savings,
        "",
        *_rates(tasks, cells, finals),
        "",
    ]


def _not_run(recipe: Settings, finals: dict[Training, TrainingOutcome]) -> list[str]:
    """Rows of the results table that a network has no run of."""
    done = {row_of(cell.scheme, cell.budget) for cell in finals}
    rows = (
        row_of(scheme, budget if Spec.parse(scheme).budgeted else "")
        for budget, schemes in rows_of(recipe).items()
        for scheme in schemes
    )
    missing = [row for row in dict.fromkeys(rows) if row not in done]
    return [f"Not run yet: {', '.join(missing)}.", ""] if missing else []


def _by_scheme(finals: dict[Training, TrainingOutcome], budget: str) -> dict[str, Series]:
    """The rows at a budget; "" for those without one."""
    grouped: dict[str, Series] = defaultdict(dict)
    for cell, outcome in finals.items():
        if cell.budget == budget:
            grouped[cell.scheme][cell.task, cell.seed] = outcome
    return dict(grouped)


def _table(
    tasks: list[str],
    schemes: dict[str, Series],
    bound: dict[str, Series],
    steps: Mapping[str, StepTime | None],
    seeds: int,
) -> list[str]:
    runs = len(tasks) * seeds
    references = [name for name in REFERENCES if name in bound]
    heads = [
        "scheme",
        *tasks,
        "mean",
        *(f"against {name}" for name in references),
        "bytes (MiB)",
        "saved + gradients + optimizer",
        "of full",
        "weight-gradient FLOPs",
        "ms a step",
        "of full's",
    ]

    def mean(series: Series) -> float:
        by_task = (accuracies(of_task(series, task)).values() for task in tasks_of(series))
        return Spread.of([Spread.of(list(values)).mean for values in by_task]).mean

    rows = []
    for name, series in sorted(schemes.items(), key=lambda item: -mean(item[1])):
        complete = set(tasks_of(series)) == set(tasks)
        rows.append(
            [
                name if len(series) == runs else f"{name} ({len(series)} of {runs} runs)",
                *(top1_words(list(of_task(series, task).values())) for task in tasks),
                f"{mean(series):.1f}" if complete else "",
                *("" if name == other else _beside(series, bound[other], runs) for other in references),
                *_measured(series),
                "not timed" if (step := steps[name]) is None else step.milliseconds.words(0),
                "" if step is None or step.of_full is None else step.of_full.words(2),
            ]
        )
    return markdown(heads, rows)


def _beside(series: Series, other: Series, runs: int) -> str:
    """The paired test of two rows in words, with the number of pairs where some of the runs are missing."""
    test = against(series, other)
    if test is None:
        return ""
    return test.words if test.pairs == runs else f"{test.words}, {test.pairs} of {runs} pairs"


def _notes(schemes: dict[str, Series]) -> list[str]:
    """What a reader must know of the rows: each note once, with the schemes that have it."""
    having: dict[str, dict[str, None]] = defaultdict(dict)
    for name, series in schemes.items():
        of_runs = [note for o in series.values() if not o.diverged for note in o.notes]
        spec = Spec.parse(name)
        parts = [spec.scheme, *(part.name for part in spec.ingredients)]
        for note in (*of_runs, *(_OF_FIGURES[part] for part in parts if part in _OF_FIGURES)):
            having[note][name] = None
    lines = [f"* {', '.join(names)}: {note}" for note, names in having.items()]
    lines += [line for name, series in schemes.items() for line in _far_below(name, series)]
    return ["Of these rows:", "", *lines, ""] if lines else []


def _far_below(name: str, series: Series) -> list[str]:
    """Runs that other seeds leave far behind: a mean of such a row says little."""
    found = []
    for task in tasks_of(series):
        top1 = accuracies(of_task(series, task))
        median = statistics.median(top1.values())
        found += [
            f"{task} with seed {seed} ends at {top1[task, seed]:.1f}, with a training loss of {outcome.curves['train_loss'][-1]:.2f}"
            for (_, seed), outcome in of_task(series, task).items()
            if top1[task, seed] < median - _FAR_BELOW and not outcome.diverged
        ]
    return [f"* {name}: {', '.join(found)}, far below its other seeds"] if found else []


def _below_the_head(schemes: dict[str, Series], head: Series) -> list[str]:
    """Rows that learned less than their last layer alone does: their learning rate, or their steps, were no good."""
    lowest = {task: min(accuracies(of_task(head, task)).values()) for task in tasks_of(head)}
    lines = []
    for name, series in schemes.items():
        below = [key for key, top1 in accuracies(series).items() if top1 < lowest.get(key[0], 0.0)]
        if 3 * len(below) < len(series):
            continue
        curves = [series[key].curves.get("train_loss", ()) for key in below]
        losses = sorted(curve[-1] for curve in curves if curve)
        ends = f", with training losses of {losses[0]:.2f} to {losses[-1]:.2f}" if losses else ""
        lines.append(
            f"* {name}: {len(below)} of {len(series)} runs end below all of head-only on their task{ends}"
        )
    return [*lines, ""] if lines else []


def _measured(series: Series) -> list[str]:
    """Bytes and shares of the runs that did not diverge; of none nothing."""
    finished = [outcome for outcome in series.values() if not outcome.diverged]
    if not finished:
        return [""] * 4
    parts = [Spread.of([getattr(outcome, part) / 2**20 for outcome in finished]).mean for part in _BYTES]
    return [
        f"{sum(parts):.1f}",
        " + ".join(f"{part:.1f}" for part in parts),
        f"{Spread.of([o.saved_bytes / o.dense_saved_bytes for o in finished]).mean:.1%}",
        f"{Spread.of([o.gradient_share for o in finished]).mean:.1%}",
    ]


def _rates(tasks: list[str], cells: Trainings, finals: dict[Training, TrainingOutcome]) -> list[str]:
    ends = rate_ends(tasks, cells, finals)
    rows = [
        [row_of(scheme, budget), f"{rate:g}", ends[scheme, budget]]
        for scheme, budget, rate in chosen_rates(finals)
    ]
    at_an_end = sum(end in ("lowest", "highest") for end in ends.values())
    return [
        "### Learning rates chosen",
        "",
        f"{at_an_end} of {len(rows)} are the lowest or the highest of those tried: a still better one may lie outside."
        if at_an_end
        else "None is the lowest or the highest of those tried.",
        "",
        *markdown(["scheme", "rate", "of those tried"], rows),
    ]
