"""The plot of ``trady bench``: time against the number of selected channels, one small panel a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.benchmark.rows import Row

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without colour.
_AUTO, _ATEN, _DENSE = "#0072B2", "#D55E00", "#7F7F7F"
_MOST_COLUMNS = 9
_PANEL = (1.75, 1.5)  # inches
_SMALL, _TEXT = 6, 8  # points


def plot_rows(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw each layer's times over k on logarithmic axes, with the dense call and the roofline.

    Args:
        path: file to make or replace; its suffix is one of ``PLOT_FORMATS``.
        rows: of one operator, memory format and dtype.
        title: which, and how it was run.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.family):
        layers.setdefault(row.label, []).append(row)
    # As near to a square as whole rows of panels allow, without a last row of a few.
    columns = min(_MOST_COLUMNS, max(1, math.ceil(math.sqrt(len(layers)))))
    lines = math.ceil(len(layers) / columns)
    columns = math.ceil(len(layers) / lines)
    size = (max(columns * _PANEL[0], 5.0), lines * _PANEL[1] + 0.75)
    style: dict[Any, Any] = {"font.size": _SMALL, "svg.fonttype": "none", "pdf.fonttype": 42}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for panel, (label, of) in zip(panels, layers.items(), strict=False):
            _panel(panel, label, sorted(of, key=lambda row: row.selected))
        for panel in panels[len(layers) :]:
            panel.set_axis_off()
        figure.suptitle(f"{title}: time against selected channels", fontsize=_TEXT)
        figure.legend(
            handles=_legend(rows),
            loc="outside lower center",
            ncols=6 if columns > 4 else 3,
            frameon=False,
            fontsize=_SMALL + 1,
        )
        file_format = path.suffix[1:].lower()
        write_atomically(path, lambda file: figure.savefig(file, format=file_format, dpi=200))


def _panel(axes: Any, label: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

    k = [row.selected for row in rows]
    times = [row.auto for row in rows]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(rows[0].microseconds["dense"] / 1e6, color=_DENSE, linewidth=0.8, linestyle=":")
    floors = [row.floor for row in rows if row.floor is not None]
    if len(floors) == len(rows):
        lowest = min(min(floors), min(times)) / 2e6
        axes.fill_between(k, lowest, [value / 1e6 for value in floors], color="#DDDDDD", linewidth=0)
        roofs = [row.roofline or 0.0 for row in rows]
        axes.plot(k, [value / 1e6 for value in roofs], color="black", linewidth=0.8)
    axes.plot(
        k,
        [row.microseconds["aten"] / 1e6 for row in rows],
        color=_ATEN,
        linewidth=0.9,
        marker="s",
        markersize=2.4,
    )
    axes.plot(k, [value / 1e6 for value in times], color=_AUTO, linewidth=1.1)
    for compiled in (True, False):
        of = [row for row in rows if (row.kernel != "aten") is compiled]
        axes.plot(
            [row.selected for row in of],
            [row.auto / 1e6 for row in of],
            color=_AUTO,
            linestyle="none",
            marker="o",
            markersize=3.2,
            markerfacecolor=_AUTO if compiled else "white",
            markeredgewidth=0.8,
        )
    axes.set_title(label, fontsize=_SMALL + 0.5, pad=2)
    axes.xaxis.set_major_locator(FixedLocator([4**power for power in range(7)]))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
    axes.yaxis.set_major_formatter(EngFormatter(unit="s", sep=" "))
    axes.yaxis.set_minor_locator(NullLocator())
    values = [*times, *floors, *(row.microseconds[name] for row in rows for name in ("aten", "dense"))]
    axes.set_ylim(min(values) / 1.4e6, max(values) * 1.4 / 1e6)
    axes.tick_params(length=2, pad=1.5)
    axes.grid(alpha=0.25, linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    call = any("call" in row.microseconds for row in rows)
    handles: list[Any] = [
        Line2D([], [], color=_AUTO, linewidth=1.1, marker="o", markersize=3.2, label="trady"),
        Line2D(
            [],
            [],
            color=_AUTO,
            linewidth=1.1,
            marker="o",
            markersize=3.2,
            markerfacecolor="white",
            label="trady (chose ATen)",
        ),
        Line2D([], [], color=_ATEN, linewidth=0.9, marker="s", markersize=2.4, label="ATen, compact input"),
        Line2D([], [], color=_DENSE, linewidth=0.8, linestyle=":", label="ATen, all channels"),
        Line2D([], [], color="black", linewidth=0.8, label="roofline"),
    ]
    if call:
        handles.append(Patch(color="#DDDDDD", label="below the roofline and one call"))
    return handles
