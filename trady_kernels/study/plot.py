"""Plots of experiments, readable in one column and with any colour vision."""

from __future__ import annotations

import statistics
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.results import SCHEMES
from trady_kernels.study.statistics import Spread
from trady_kernels.study.trainings import Training, TrainingOutcome
from trady_kernels.training.plot import COLOURS, MARKERS

_MIB = 2**20
#: Inches of a figure, about a column of print, and of a panel.
_WIDTH, _HEIGHT = 4.6, 2.1
_PANELS_IN_A_ROW = 2
#: Of letters, in points.
LETTERS = {
    "title": 7,
    "label": 6,
    "ticks": 5.5,
    "legend": 5.5,
    "many ticks": 4,
    "cells": 6,
    "many cells": 3.5,
}
#: Every scheme looks the same in all figures.
_PLACES = {
    scheme: place
    for place, scheme in enumerate(
        dict.fromkeys(
            scheme for budgets in SCHEMES.values() for schemes in budgets.values() for scheme in schemes
        )
    )
}
#: Of every epoch: what is left out, in the words of the papers, counted and then measured, from a run and its epoch.
_SAVINGS: Mapping[str, Callable[[TrainingOutcome, int], float]] = {
    "weight sparsity (%)": lambda run, epoch: run.curves["weight_share"][epoch],
    "activation sparsity (%)": lambda run, epoch: run.curves["activation_share"][epoch],
    "weight-gradient FLOPs saved (%)": lambda run, epoch: run.curves["gradient_share"][epoch],
    "measured bytes saved (%)": lambda run, epoch: run.curves["saved_bytes"][epoch] / run.dense_saved_bytes,
}


def plot_budgets(path: Path, finals: Mapping[Training, TrainingOutcome]) -> None:
    """Draw accuracy against measured bytes, saved, of gradients and of the optimiser: a panel a task, a line a scheme.

    Points are its budgets, its own or the table's, bars one standard deviation.

    Args:
        path: PNG, SVG or PDF file to make or replace.
        finals: outcomes on test samples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    points: dict[tuple[str, str], dict[str, list[TrainingOutcome]]] = defaultdict(lambda: defaultdict(list))
    for cell, outcome in finals.items():
        scheme, _, own = cell.scheme.partition("@")
        points[cell.task, scheme][own or cell.budget].append(outcome)
    tasks = list(dict.fromkeys(task for task, _ in points))
    schemes = list(dict.fromkeys(scheme for _, scheme in points))
    figure, axes_of = panels(len(tasks))
    for axes, task in zip(axes_of, tasks, strict=True):
        for scheme in schemes:
            series = sorted(
                (
                    Spread.of([o.training_bytes / _MIB for o in outcomes if not o.diverged]).mean,
                    Spread.of([100 * outcome.top1 for outcome in outcomes]),
                )
                for outcomes in points.get((task, scheme), {}).values()
                if any(not outcome.diverged for outcome in outcomes)
            )
            if series:
                axes.errorbar(
                    [memory for memory, _ in series],
                    [spread.mean for _, spread in series],
                    yerr=[0.0 if spread.count < 2 else spread.deviation for _, spread in series],
                    capsize=2,
                    label=scheme,
                    **scheme_style(scheme),
                )
        _logarithmic(axes)
        axes.set_title(task)
        axes.set_xlabel("training memory (MiB)")
        axes.set_ylabel("top-1 accuracy (%)")
    write_figure(path, figure)


def plot_savings(
    path: Path,
    finals: Mapping[str, Mapping[Training, TrainingOutcome]],
    step_times: Mapping[tuple[str, str], float] | None = None,
) -> None:
    """Draw what each scheme leaves out, epoch by epoch, the mean over tasks and seeds (TraDy, appendix D), panels for each network.

    A step's time hardly depends on the epoch, and is timed apart: a bar a scheme.

    Args:
        path: PNG, SVG or PDF file to make or replace.
        finals: by network, outcomes of one budget.
        step_times: by network and scheme, a step's time over full fine-tuning's; drawn where there are any.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    schemes = list(dict.fromkeys(cell.scheme for cells in finals.values() for cell in cells))
    times = step_times or {}
    timed = [network for network in finals if any(of == network for of, _ in times)]
    figure, axes_of = panels(len(_SAVINGS) * len(finals) + len(timed))
    empty = iter(axes_of)
    for network, cells in finals.items():
        for words, share in _SAVINGS.items():
            axes = next(empty)
            for scheme in schemes:
                runs = [o for cell, o in cells.items() if cell.scheme == scheme and o.curves]
                epochs = range(min((len(run.curves["cost"]) for run in runs), default=0))
                means = [100 * (1 - Spread.of([share(run, epoch) for run in runs]).mean) for epoch in epochs]
                if means:
                    axes.plot(range(1, 1 + len(means)), means, label=scheme, **scheme_style(scheme))
            axes.set_ylabel(words)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(network)
            axes.grid(alpha=0.3)
        if network in timed:
            axes = next(empty)
            shown = [scheme for scheme in schemes if (network, scheme) in times]
            saved = [100 * (1 - times[network, scheme]) for scheme in shown]
            axes.barh(shown, saved, color=[scheme_style(scheme)["color"] for scheme in shown])
            axes.tick_params(axis="y", labelsize=LETTERS["many ticks"])
            axes.set_xlabel("step time saved (%)")
            axes.set_title(network)
            axes.grid(alpha=0.3, axis="x")
    write_figure(path, figure)


def panels(count: int, height: float = _HEIGHT) -> tuple[Any, list[Any]]:
    """A figure as wide as a column of print with so many panels, two in a row.

    Args:
        count: how many.
        height: of each, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    columns = min(count, _PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, height * rows), layout="constrained")
    axes_of = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axes in axes_of:
        _in_print(axes)
    return figure, axes_of


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
        "markersize": 4,
        "linewidth": 1,
        "linestyle": ("-", "--", ":")[rounds % 3],
    }


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
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
    """A figure of matrices with numbers in them.

    Args:
        matrices: by title, each with the names of its rows and of its columns; NaN is left empty.
        words: what the numbers are.
        low, high: ends of the scale of colours.
        digits: of the numbers.
        axes_words: what rows and columns are.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    large = max(len(columns) for _, _, columns in matrices.values()) > 5
    figure, axes_of = panels(len(matrices), 2.7 if large else _HEIGHT)
    for axes, (title, (matrix, rows, columns)) in zip(axes_of, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high)
        axes.tick_params(labelsize=LETTERS["many ticks" if large else "ticks"])
        axes.set_xticks(range(len(columns)), columns, rotation=90 if large else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylabel(axes_words[0])
        axes.set_xlabel(axes_words[1])
        axes.set_title(title)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if value != value:
                    continue
                ink = "white" if value < (low + high) / 2 else "black"
                size = LETTERS["many cells" if large else "cells"]
                axes.text(
                    column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=size, color=ink
                )
    bar = figure.colorbar(image, ax=axes_of, shrink=0.8, label=words)
    _in_print(bar.ax)
    return figure


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure in the sizes of print, with one legend for all its panels; the same numbers give the same file.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    handles: dict[str, Any] = {}
    for axes in figure.axes:
        axes.title.set_fontsize(LETTERS["title"])
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles=list(handles.values()), loc="outside lower center", ncols=3, fontsize=LETTERS["legend"]
        )
    # Without the date, and with names in the file that are not drawn, the same cells give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "trady"}):
        write_atomically(
            path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=220, metadata=metadata)
        )
