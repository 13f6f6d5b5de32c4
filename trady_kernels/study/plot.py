"""Plots of experiments, readable in one column and with any colour vision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.cells import Cell, Outcome
from trady_kernels.study.statistics import Spread
from trady_kernels.training.plot import COLOURS, MARKERS

_MIB = 2**20


def plot_budgets(path: Path, finals: Mapping[Cell, Outcome]) -> None:
    """Draw accuracy against measured bytes: a panel a task, a point a scheme and budget, bars of one standard deviation.

    Args:
        path: PNG, SVG or PDF file to make or replace.
        finals: outcomes on test samples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    points: dict[tuple[str, str], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for cell, outcome in finals.items():
        points[cell.task, cell.scheme][cell.budget].append(outcome)
    tasks = list(dict.fromkeys(task for task, _ in points))
    schemes = list(dict.fromkeys(scheme for _, scheme in points))
    figure = Figure(figsize=(3.2 * len(tasks) + 1.6, 3.6), layout="constrained")
    for index, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), index + 1)
        for place, scheme in enumerate(schemes):
            by_budget = points.get((task, scheme), {})
            series = sorted(
                (
                    Spread.of([outcome.saved_bytes / _MIB for outcome in outcomes]).mean,
                    Spread.of([100 * outcome.top1 for outcome in outcomes]),
                )
                for outcomes in by_budget.values()
            )
            if not series:
                continue
            axes.errorbar(
                [memory for memory, _ in series],
                [spread.mean for _, spread in series],
                yerr=[0.0 if spread.count < 2 else spread.deviation for _, spread in series],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                markerfacecolor="white" if place >= len(COLOURS) else None,
                linewidth=1,
                capsize=2,
                markersize=5,
                label=scheme,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("saved for backward (MiB)")
        if not index:
            axes.set_ylabel("top-1 accuracy (%)")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles=list(handles.values()), loc="outside right upper", fontsize=8)
    # Without the date, the same cells give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    write_atomically(
        path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
    )
