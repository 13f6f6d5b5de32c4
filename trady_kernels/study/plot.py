"""Plots of experiments, readable in one column and with any colour vision."""

from __future__ import annotations

import functools
import math
import statistics
import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.labels import label_lines
from trady_kernels.study.results import SCHEMES
from trady_kernels.study.statistics import Quartiles
from trady_kernels.study.trainings import Training, TrainingOutcome
from trady_kernels.training.plot import COLOURS, MARKERS

_MIB = 2**20
#: Inches of a figure, a column of print, and of a panel.
WIDTH, _HEIGHT = 3.5, 1.7
_DOTS_PER_INCH = 300
_PANELS_IN_A_ROW = 2
#: Of letters, in points: the least that can be read in print, so that figures are not to be made smaller.
LETTERS = {"title": 7, "label": 6.5, "ticks": 6, "legend": 6, "cells": 6}
#: Widest mean letter of a legend, and what else an entry takes, in points.
_LETTER, _HANDLE = 3.6, 26
#: Columns of a heat map up to which panels stand side by side, and up to which numbers fit into its cells.
_NARROW, _NUMBERED = 5, 11
#: Letters in a line of a title over the whole column.
_TITLE = 60
#: Formats of every figure.
_FORMATS = ("png", "svg")
#: Every scheme looks the same in all figures.
_PLACES = {
    scheme: place
    for place, scheme in enumerate(
        dict.fromkeys(
            scheme for budgets in SCHEMES.values() for schemes in budgets.values() for scheme in schemes
        )
    )
}
#: Lines that a panel of what is kept has room for, and the rows drawn of more: the papers' methods, ours and the ceiling.
_LINES = 6
SHOWN = (
    *("trady", "medyate", "sparse-update", "full"),
    *("frugal@5.2%", "frugal@100%", "ample@1.8%", "ample@65%"),
)
#: Of every epoch: what is kept, in the words of a panel, counted and then measured, from a run and its epoch.
_KEPT: Mapping[str, Callable[[TrainingOutcome, int], float]] = {
    "weights,\ncounted": lambda run, epoch: run.curves["weight_share"][epoch],
    "activations,\ncounted": lambda run, epoch: run.curves["activation_share"][epoch],
    "FLOPs,\ncounted": lambda run, epoch: run.curves["gradient_share"][epoch],
    "bytes,\nmeasured": lambda run, epoch: run.curves["saved_bytes"][epoch] / run.dense_saved_bytes,
}
_STEP = "step time,\nmeasured"

Finals = Mapping[Training, TrainingOutcome]


def plot_budgets(path: Path, finals: Mapping[str, Finals]) -> None:
    """Draw accuracy against measured bytes, saved, of gradients and of the optimiser: a panel a network, a line a scheme.

    Points are its budgets, its own or the table's: the mean over tasks, of seeds the mean with a bar of one standard deviation.

    Args:
        path: as :func:`write_figure` takes it.
        finals: by network, outcomes on test samples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    figure, axes_of = panels(len(finals), 3.2, columns=1)
    found = [over_tasks(cells) for cells in finals.values()]
    for axes, network, (tasks, series) in zip(axes_of, finals, found, strict=True):
        for scheme, points in series.items():
            memory, means, bars = zip(*points, strict=True)
            look = scheme_style(scheme)
            axes.errorbar(memory, means, yerr=bars, elinewidth=0.6, capsize=1.5, **look)
        axes.margins(x=0.12, y=0.1)
        logarithmic(axes, "x")
        title = textwrap.fill(f"{network}, mean over {', '.join(tasks)}", _TITLE)
        axes.set_title(title, fontsize=LETTERS["title"])
        axes.set_xlabel("training memory (MiB)")
        axes.set_ylabel("top-1 accuracy (%)")
    figure.draw_without_rendering()  # from here on everything is in its place
    for axes, (_, series) in zip(axes_of, found, strict=True):
        label_lines(axes, series, LETTERS["legend"])
    write_figure(path, figure)


#: Of each scheme at its budgets: measured MiB, accuracy in percent and its standard deviation over seeds, 0 of a single one.
Series = dict[str, list[tuple[float, float, float]]]


def over_tasks(finals: Finals) -> tuple[list[str], Series]:
    """Accuracy of each scheme at each budget, of every seed the mean over tasks; a row that has not run on all tasks is left out.

    Args:
        finals: outcomes of one network on test samples.

    Returns:
        The tasks, and what there is of each scheme, in the order of bytes.
    """
    rows: dict[tuple[str, str], dict[str, dict[int, TrainingOutcome]]] = {}
    for cell, outcome in finals.items():
        scheme, _, own = cell.scheme.partition("@")
        row = rows.setdefault((scheme, own or cell.budget), {})
        row.setdefault(cell.task, {})[cell.seed] = outcome
    widest = max(rows.values(), key=len)
    tasks = list(widest)
    series: Series = {}
    for (scheme, _), by_task in rows.items():
        seeds = set.intersection(*(set(by_task.get(task, ())) for task in tasks))
        runs = [by_task[task][seed] for task in tasks for seed in seeds]
        finished = [outcome.training_bytes / _MIB for outcome in runs if not outcome.diverged]
        if finished:
            means = [statistics.fmean(100 * by_task[task][seed].top1 for task in tasks) for seed in seeds]
            bar = statistics.stdev(means) if len(means) > 1 else 0.0
            series.setdefault(scheme, []).append((statistics.fmean(finished), statistics.fmean(means), bar))
    return tasks, {scheme: sorted(points) for scheme, points in series.items()}


def plot_savings(
    path: Path,
    finals: Mapping[str, Finals],
    step_times: Mapping[tuple[str, str], Quartiles] | None = None,
) -> None:
    """Draw what each scheme keeps of full fine-tuning, epoch by epoch, the mean over tasks and seeds, a row of panels a network.

    The papers' sparsity is what is missing to 100% (TraDy, appendix D). A step's time hardly depends on the epoch, and is timed
    apart: a point a scheme, with a bar from quartile to quartile.

    Args:
        path: as :func:`write_figure` takes it.
        finals: by network, outcomes of one budget.
        step_times: by network and scheme, a step's time over full fine-tuning's; drawn where there are any.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    times = step_times or {}
    names = [*_KEPT, *([_STEP] if times else [])]
    figure, axes_of = panels(len(names) * len(finals), 1.7, columns=len(names), sharey="row")
    for row, (network, cells) in enumerate(finals.items()):
        here = axes_of[row * len(names) : (row + 1) * len(names)]
        schemes = shown_of(dict.fromkeys(cell.scheme for cell in cells))
        for axes, share in zip(here, _KEPT.values(), strict=False):
            for scheme in schemes:
                runs = [o for cell, o in cells.items() if cell.scheme == scheme and o.curves]
                epochs = range(min((len(run.curves["cost"]) for run in runs), default=0))
                means = [100 * statistics.fmean(share(run, epoch) for run in runs) for epoch in epochs]
                if means:
                    axes.plot(range(1, 1 + len(means)), means, label=scheme, **scheme_style(scheme))
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=3)
        if times:
            _draw_times(here[-1], {s: times[network, s] for s in schemes if (network, s) in times})
        for axes, name in zip(here, names, strict=True):
            axes.set_title(name)
            logarithmic(axes, "y")
        here[0].set_ylabel(f"{network}\nkept (%)", linespacing=1.4)
    write_figure(path, figure)


def _draw_times(axes: Any, times: Mapping[str, Quartiles]) -> None:
    for place, (scheme, ratio) in enumerate(times.items()):
        axes.errorbar(
            place,
            100 * ratio.median,
            yerr=[[100 * (ratio.median - ratio.low)], [100 * (ratio.high - ratio.median)]],
            **scheme_style(scheme),
        )
    axes.set_xticks([])
    axes.margins(x=0.2)
    axes.set_xlabel("scheme" if times else "not timed")


def shown_of(schemes: Iterable[str]) -> list[str]:
    """The schemes that a panel with a line each shows: all where it has room for them, else those of ``SHOWN``."""
    schemes = list(schemes)
    if len(schemes) <= _LINES:
        return schemes
    return [scheme for scheme in SHOWN if scheme in schemes] or schemes[:_LINES]


def panels(
    count: int,
    height: float = _HEIGHT,
    columns: int = _PANELS_IN_A_ROW,
    ratios: Sequence[float] | None = None,
    **shared: Any,
) -> tuple[Any, list[Any]]:
    """A figure as wide as a column of print, with so many panels row by row.

    Args:
        count: how many.
        height: of a row, in inches.
        columns: in a row.
        ratios: of the rows' heights to that; None where all are alike.
        shared: ``sharex`` and ``sharey``, as matplotlib's ``subplots`` takes them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    columns = min(count, columns)
    heights = list(ratios or [1.0] * -(-count // columns))
    figure = Figure(figsize=(WIDTH, height * math.fsum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights, **shared).flatten()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        _in_print(axes)
    return figure, list(grid[:count])


def _in_print(axes: Any) -> None:
    axes.tick_params(labelsize=LETTERS["ticks"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(LETTERS["label"])


def draw_means(axes: Any, points: Mapping[float, Sequence[float]], **look: Any) -> None:
    """A line through the means of some values at each place, with bars of one sample standard deviation.

    Args:
        axes: where to draw.
        points: values at each place; places without any are left out.
        look: as ``errorbar`` takes it.
    """
    places = [place for place, values in points.items() if values]
    bars = [statistics.stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in places]
    axes.errorbar(places, [statistics.fmean(points[place]) for place in places], yerr=bars, capsize=2, **look)


def scheme_style(scheme: str) -> dict[str, Any]:
    """Colour and marker of a scheme, the same in all figures; of all its budgets those of its first row."""
    known = (place for row, place in _PLACES.items() if scheme in (row, row.partition("@")[0]))
    return style(next(known, zlib.crc32(scheme.encode()) % (3 * len(COLOURS))))


def style(place: int) -> dict[str, Any]:
    """Colour and marker of the series at that place: filled, then, once the colours have been used, hollow."""
    colour = COLOURS[place % len(COLOURS)]
    rounds = place // len(COLOURS)
    return {
        "color": colour,
        "marker": MARKERS[(place + rounds) % len(MARKERS)],
        "markerfacecolor": "white" if rounds % 2 else colour,
        "markersize": 3,
        "linewidth": 0.9,
        "linestyle": ("-", "--", ":")[rounds % 3],
    }


def logarithmic(axes: Any, name: str) -> None:
    """A logarithmic axis, "x" or "y", of what is drawn, with ticks enough to read it by."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def heat_maps(
    matrices: Mapping[str, tuple[list[list[float]], list[str], list[str]]],
    *,
    words: str,
    low: float,
    high: float,
    digits: int = 2,
    axes_words: tuple[str, str] = ("", ""),
) -> Any:
    """A figure of matrices with numbers in them: small ones side by side, large ones below each other.

    Args:
        matrices: by title, each with the names of its rows and of its columns; NaN is left empty.
        words: what the numbers are.
        low, high: ends of the scale of colours.
        digits: of the numbers, which are left out where they do not fit.
        axes_words: what rows and columns are.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    large = max(len(columns) for _, _, columns in matrices.values()) > _NARROW
    if large:
        heights = [1.3 + 0.17 * len(rows) for _, rows, _ in matrices.values()]
        figure, axes_of = panels(len(matrices), columns=1, height=1.0, ratios=heights)
    else:
        figure, axes_of = panels(len(matrices))
    _add_room(figure, 0.5)
    for axes, (title, (matrix, rows, columns)) in zip(axes_of, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high, aspect="auto" if large else "equal")
        axes.set_xticks(range(len(columns)), columns, rotation=90 if large else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylabel(axes_words[0])
        axes.set_xlabel(axes_words[1])
        axes.set_title(title)
        if len(columns) <= _NUMBERED:
            _draw_numbers(axes, matrix, (low + high) / 2, digits)
    inch = 1 / figure.get_size_inches()[1]
    bar = figure.colorbar(
        image, ax=axes_of, location="bottom", aspect=30, fraction=0.1 * inch, pad=0.1 * inch, label=words
    )
    _in_print(bar.ax)
    return figure


def _draw_numbers(axes: Any, matrix: list[list[float]], middle: float, digits: int) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            if not math.isnan(value):
                axes.text(
                    column,
                    row,
                    f"{value:.{digits}f}",
                    ha="center",
                    va="center",
                    fontsize=LETTERS["cells"],
                    color="white" if value < middle else "black",
                )


def _add_room(figure: Any, inches: float) -> None:
    """Below the panels, which stay as large as they are."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + inches)


def figure_files(path: Path) -> list[Path]:
    """The files that :func:`write_figure` makes."""
    stem = path.name.removesuffix(path.suffix) if path.suffix[1:] in _FORMATS else path.name
    return [path.with_name(f"{stem}.{kind}") for kind in _FORMATS]


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure in every format in the sizes of print, with one legend for all its panels; the same numbers give the
    same files.

    Args:
        path: of the files, with or without a suffix of theirs.
        figure: as :func:`panels` makes it.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import rc_context

    handles: dict[str, Any] = {}
    for axes in figure.axes:
        axes.title.set_fontsize(LETTERS["title"])
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        widest = _HANDLE + _LETTER * max(map(len, handles))
        columns = max(int(72 * WIDTH / widest), 1)
        _add_room(figure, 0.15 + 0.125 * -(-len(handles) // columns))
        figure.legend(
            handles=list(handles.values()),
            loc="outside lower center",
            ncols=columns,
            fontsize=LETTERS["legend"],
            columnspacing=1.0,
            handlelength=1.8,
        )
    for file in figure_files(path):
        # Without the date, and with names in the file that are not drawn, the same cells give the same file.
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        save = functools.partial(
            figure.savefig, format=file.suffix[1:], dpi=_DOTS_PER_INCH, metadata=metadata
        )
        with rc_context({"svg.hashsalt": "trady"}):
            write_atomically(file, save)
