"""Plots of experiments, readable in one column and with any colour vision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.statistics import Spread
from trady_kernels.study.trainings import Training, TrainingOutcome
from trady_kernels.training.plot import COLOURS, MARKERS

_MIB = 2**20
#: Of every epoch: what is left out, in the words of the papers, counted and then measured, from a run and its epoch.
_SAVINGS: Mapping[str, Callable[[TrainingOutcome, int], float]] = {
    "weight sparsity (%)": lambda run, epoch: run.curves["weight_share"][epoch],
    "activation sparsity (%)": lambda run, epoch: run.curves["activation_share"][epoch],
    "weight-gradient FLOPs saved (%)": lambda run, epoch: run.curves["gradient_share"][epoch],
    "measured bytes saved (%)": lambda run, epoch: run.curves["saved_bytes"][epoch] / run.dense_saved_bytes,
}


def plot_budgets(path: Path, finals: Mapping[Training, TrainingOutcome]) -> None:
    """Draw accuracy against measured bytes, saved, of gradients and of the optimiser: a panel a task, a point a scheme and budget, bars of one standard deviation.

    Args:
        path: PNG, SVG or PDF file to make or replace.
        finals: outcomes on test samples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    points: dict[tuple[str, str], dict[str, list[TrainingOutcome]]] = defaultdict(lambda: defaultdict(list))
    for cell, outcome in finals.items():
        points[cell.task, cell.scheme][cell.budget].append(outcome)
    tasks = list(dict.fromkeys(task for task, _ in points))
    schemes = list(dict.fromkeys(scheme for _, scheme in points))
    figure, axes_of = panels(len(tasks))
    for axes, task in zip(axes_of, tasks, strict=True):
        for place, scheme in enumerate(schemes):
            series = sorted(
                (
                    Spread.of([outcome.training_bytes / _MIB for outcome in outcomes]).mean,
                    Spread.of([100 * outcome.top1 for outcome in outcomes]),
                )
                for outcomes in points.get((task, scheme), {}).values()
            )
            if series:
                axes.errorbar(
                    [memory for memory, _ in series],
                    [spread.mean for _, spread in series],
                    yerr=[0.0 if spread.count < 2 else spread.deviation for _, spread in series],
                    capsize=2,
                    label=scheme,
                    **style(place),
                )
        _logarithmic(axes)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("training memory (MiB)")
    axes_of[0].set_ylabel("top-1 accuracy (%)")
    write_figure(path, figure)


def plot_savings(
    path: Path,
    finals: Mapping[str, Mapping[Training, TrainingOutcome]],
    step_times: Mapping[tuple[str, str], float] | None = None,
) -> None:
    """Draw what each scheme leaves out, epoch by epoch, the mean over tasks and seeds (TraDy, appendix D), panels for each network.

    Args:
        path: PNG, SVG or PDF file to make or replace.
        finals: by network, outcomes of one budget.
        step_times: by network and scheme, a step's time over full fine-tuning's, the same in every epoch; drawn where there
            are any.

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
        epochs_of = dict.fromkeys(schemes, 0)
        for words, share in _SAVINGS.items():
            axes = next(empty)
            for place, scheme in enumerate(schemes):
                runs = [o for cell, o in cells.items() if cell.scheme == scheme and o.curves]
                epochs_of[scheme] = min((len(run.curves["cost"]) for run in runs), default=0)
                means = [
                    100 * (1 - Spread.of([share(run, epoch) for run in runs]).mean)
                    for epoch in range(epochs_of[scheme])
                ]
                if means:
                    axes.plot(range(1, 1 + len(means)), means, label=scheme, **style(place))
            axes.set_ylabel(words)
            axes.set_title(network, fontsize=10)
        if network in timed:
            axes = next(empty)
            for place, scheme in enumerate(schemes):
                if (network, scheme) in times and epochs_of[scheme]:
                    saved = [100 * (1 - times[network, scheme])] * epochs_of[scheme]
                    axes.plot(range(1, 1 + len(saved)), saved, label=scheme, **style(place))
            axes.set_ylabel("step time saved (%)")
            axes.set_title(network, fontsize=10)
    for axes in axes_of:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    write_figure(path, figure)


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, four in a row at most.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    rows = -(-count // 4)
    columns = -(-count // rows)
    figure = Figure(figsize=(3.2 * columns + 1.6, 3.3 * rows + 0.3), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def style(place: int) -> dict[str, Any]:
    """Colour and marker of the scheme at that place: filled, then, once the colours have been used, hollow."""
    colour = COLOURS[place % len(COLOURS)]
    rounds = place // len(COLOURS)
    return {
        "color": colour,
        "marker": MARKERS[(place + rounds) % len(MARKERS)],
        "markerfacecolor": "white" if rounds % 2 else colour,
        "markersize": 5,
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
) -> Any:
    """A figure of matrices with numbers in them.

    Args:
        matrices: by title, each with the names of its rows and of its columns.
        words: what the numbers are.
        low, high: ends of the scale of colours.
        digits: of the numbers.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, axes_of = panels(len(matrices))
    figure.set_size_inches(5.2 * len(matrices) + 0.8, 4.8)
    for axes, (title, (matrix, rows, columns)) in zip(axes_of, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=high)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(title, fontsize=10)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                ink = "white" if value < (low + high) / 2 else "black"
                size = 6 if len(columns) > 5 else 9
                axes.text(
                    column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=size, color=ink
                )
    figure.colorbar(image, ax=axes_of, shrink=0.8, label=words)
    return figure


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure, with one legend for all its panels; the same numbers give the same file.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside right upper", fontsize=8)
    # Without the date, and with names in the file that are not drawn, the same cells give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "trady"}):
        write_atomically(
            path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
        )
