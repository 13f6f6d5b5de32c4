"""The plot of ``trady memory``: what a step keeps for backward, by kind, dense above sparse."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.memory import KINDS, MemoryReport

# Okabe and Ito's colours and two greys, told apart with any colour vision; hatches tell them apart without colour.
_STYLES: Mapping[str, tuple[str, str]] = {
    "conv input": ("#0072B2", ""),
    "linear input": ("#56B4E9", "////"),
    "activation": ("#D55E00", ""),
    "norm": ("#E69F00", "\\\\\\\\"),
    "pooling": ("#009E73", ""),
    "dropout": ("#F0E442", "...."),
    "attention": ("#CC79A7", ""),
    "residual": ("#7F7F7F", "xxxx"),
    "other": ("#000000", ""),
}
_MIB = 2**20
_THINNEST = 500  # what is less than this part of both bars cannot be seen, and is not in the legend
_COLUMN = 3.5  # inches: a column of a two-column page, so that the sizes below are those on paper
_SMALL, _TEXT = 7, 8  # points
_TITLE_WIDTH = 58  # characters that fit the column
#: Below this share of the dense bar the sparse one is drawn a second time, on a scale of its own.
_ENLARGED = 0.25


def plot_memory(path: Path, dense: MemoryReport, sparse: MemoryReport, title: str) -> None:
    """Draw two stacked bars by kind on one axis in MiB, the sparse one once more enlarged where it is small.

    Args:
        path: file to make or replace; its suffix is one of ``PLOT_FORMATS``.
        dense, sparse: what the two steps keep.
        title: which network and batch.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: drawing needs matplotlib, which is not here; install it with: pip install matplotlib"
        ) from error
    share = sparse.saved_bytes / max(dense.saved_bytes, 1)
    enlarged = 0 < share < _ENLARGED
    style: dict[Any, Any] = {
        "font.size": _TEXT,
        "hatch.linewidth": 0.5,
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_COLUMN, 2.9 if enlarged else 2.2), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(
            2 if enlarged else 1, squeeze=False, height_ratios=(2, 1) if enlarged else (1,)
        )
        both = rows[0, 0]
        _bars(both, {"dense": dense, f"sparse\n({share:.1%})": sparse})
        figure.suptitle(textwrap.fill(title, _TITLE_WIDTH), fontsize=_TEXT)
        if enlarged:
            _bars(rows[1, 0], {"sparse,\nenlarged": sparse})
        rows[-1, 0].set_xlabel("kept for backward (MiB)")
        kinds = [kind for kind in KINDS if any(_visible(kind, report) for report in (dense, sparse))]
        figure.legend(
            handles=[Patch(label=kind, **look(kind)) for kind in kinds],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=_SMALL,
            handlelength=1.4,
            columnspacing=1.2,
        )
        file_format = path.suffix[1:].lower()
        write_atomically(path, lambda file: figure.savefig(file, format=file_format, dpi=300))


def _visible(kind: str, report: MemoryReport) -> bool:
    return report.by_kind.get(kind, 0) * _THINNEST > report.saved_bytes


def look(kind: str) -> dict[str, Any]:
    """Colour and hatch of a kind in every plot of memory, as matplotlib's patches take them."""
    colour, hatch = _STYLES[kind]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def _bars(axes: Any, reports: Mapping[str, MemoryReport]) -> None:
    longest = max(report.saved_bytes for report in reports.values()) / _MIB
    for row, report in enumerate(reports.values()):
        left = 0.0
        for kind in KINDS:
            width = report.by_kind.get(kind, 0) / _MIB
            if width:
                axes.barh(row, width, left=left, height=0.6, **look(kind))
                left += width
        axes.text(
            left + longest / 60,
            row,
            f"{left:.3g}",
            va="center",
            fontsize=_SMALL,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_yticks(range(len(reports)), reports)
    axes.set_ylim(len(reports) - 0.5, -0.5)
    axes.set_xlim(0, (longest or 1) * 1.14)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
