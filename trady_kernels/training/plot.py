"""The plot of a run: accuracy against the memory that training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trady_kernels.atomic_write import write_atomically
from trady_kernels.training.results import SchemeResult

# Okabe and Ito's colours, told apart with any colour vision; the markers tell the schemes apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_MIB = 2**20


def plot_accuracy(path: Path, results: Sequence[SchemeResult], title: str) -> None:
    """Draw top-1 accuracy against bytes saved for backward, one labelled point a scheme.

    Args:
        path: PNG file to make or replace.
        results: finished schemes.
        title: what was trained on what.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, result in enumerate(results):
        memory, accuracy = result.saved_bytes / _MIB, 100 * result.top1
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(memory, accuracy, s=70, color=colour, marker=MARKERS[index % len(MARKERS)], zorder=3)
        axes.annotate(
            f"{result.scheme}\n{accuracy:.1f}%, {memory:.3g} MiB",
            (memory, accuracy),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.25, y=0.25)
    axes.grid(alpha=0.3)
    axes.set_xlabel("saved for backward in a training step, measured (MiB, log scale)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.set_title(title, fontsize=11)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
