"""Rows as text and as JSON."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trady_kernels.benchmark.goals import geometric_mean, verdicts
from trady_kernels.benchmark.roofline import Roofline
from trady_kernels.benchmark.rows import Row
from trady_kernels.benchmark.timing import clock
from trady_kernels.benchmark.tune import Point, losses
from trady_kernels.ops.choice import ANY, Key, Limit, limits_in_force
from trady_kernels.provenance import describe

#: Columns of times, by type of device.
_TIMES = {"cpu": ("auto", "cpp", "aten", "dense"), "cuda": ("auto", "triton", "cuda", "aten", "dense")}
_FAMILIES = ("1x1", "3x3", "5x5", "7x7", "depthwise 3x3", "depthwise 5x5", "linear")
#: Classes of the number of selected channels, each up to this many.
_CLASSES = {"1": 1, "2-4": 4, "5-12": 12, ">12": 1 << 62}


def rows_table(rows: Sequence[Row]) -> str:
    """A line for each row: medians in microseconds, and the ratios that they are about."""
    columns = _TIMES[rows[0].device if rows else "cpu"]
    lines = [
        f"{'layer':<26}{'k':>5}"
        + "".join(f"{name + ' us':>10}" for name in columns)
        + f"{'roofline us':>13}"
        + f"{'aten/auto':>11}{'dense/auto':>12}{'auto/roof':>11}  kernel"
    ]
    for row in rows:
        times = "".join(_number(row.microseconds.get(name), 10, 0) for name in columns)
        lines.append(
            f"{row.label:<26}{row.selected:>5}{times}{_number(row.roofline, 13, 1)}{row.ratio('aten'):>11.2f}"
            f"{row.ratio('dense'):>12.1f}{_number(_to_floor(row), 11, 2)}  {row.kernel}"
        )
    return "\n".join(lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Geometric means by family and class of k; roof is the roofline, for depthwise layers plus one call."""
    lines = [
        f"{'family':<16}{'k':>6}{'rows':>6}{'aten/auto':>11}{'worst':>7}{'dense/auto':>12}{'auto/roof':>11}"
        f"{'within 2':>10}  worst at"
    ]
    for family in sorted({row.family for row in rows}, key=_FAMILIES.index):
        least = 1
        for name, most in _CLASSES.items():
            of = [row for row in rows if row.family == family and least <= row.selected <= most]
            least = most + 1
            if not of:
                continue
            worst = min(of, key=lambda row: row.ratio("aten"))
            floors = [value for row in of if (value := _to_floor(row)) is not None]
            within = sum(value <= 2 for value in floors) / len(floors) if floors else None
            lines.append(
                f"{family:<16}{name:>6}{len(of):>6}{geometric_mean(row.ratio('aten') for row in of):>11.2f}"
                f"{worst.ratio('aten'):>7.2f}{geometric_mean(row.ratio('dense') for row in of):>12.1f}"
                f"{_number(statistics.median(floors) if floors else None, 11, 2)}"
                + (f"{within:>10.0%}" if within is not None else f"{'-':>10}")
                + f"  {worst.label}, k = {worst.selected}"
            )
    return "\n".join(lines)


def goals_table(rows: Sequence[Row]) -> str:
    """Every goal that the rows are about: reached or MISSED, with the figure, what the roofline allows, and the worst shape."""
    lines = [f"{'':<8}{'figure':>8}{'goal':>7}{'limit':>7}{'rows':>6}  goal and worst row"]
    for verdict in verdicts(rows):
        mark = "reached" if verdict.reached else "MISSED"
        lines.append(
            f"{mark:<8}{verdict.figure:>8.2f}{verdict.bound:>7g}{_number(verdict.limit, 7, 2)}{verdict.count:>6}  {verdict.goal} "
            f"({verdict.rows}; {verdict.worst})"
        )
    lines.append(
        "limit: the figure of an operator at the roofline of whole cache lines, with the smallest call that was measured"
    )
    lines.append("The step of a whole network: python benchmarks/training_step.py")
    return "\n".join(lines)


def limits_table(
    limits: Sequence[Limit], measured: Mapping[Key, Sequence[Point]], device: str = "cpu"
) -> str:
    """Each limit, and what the table loses over the faster kernel of each shape; beside it the limits now in force."""
    lines = [
        f"{'operator':<21}{'family':<13}{'format':<15}{'dtype':<9}{'pixels':>9}{'ours up to':>13}{'shapes':>8}"
        f"{'loss':>8}{'worst':>7}{'before':>9}{'worst':>7}"
    ]
    now = {key: [limit for limit in limits_in_force(device) if limit.key == key] for key in measured}
    for limit in limits:
        operator, family, memory_format, dtype = limit.key
        names = (str(memory_format).removeprefix("torch."), str(dtype).removeprefix("torch."))
        pixels = "any" if limit.most_pixels == ANY else f"<= {limit.most_pixels}"
        most = "any" if limit.most_channels == ANY else str(limit.most_channels)
        line = f"{operator:<21}{family:<13}{names[0].removesuffix('_format'):<15}{names[1]:<9}{pixels:>9}{most:>13}"
        if limit.most_pixels == ANY:
            of = measured[limit.key]
            tuned = losses([other for other in limits if other.key == limit.key], of)
            before = losses(now[limit.key], of)
            line += f"{len(of):>8}{tuned[0]:>8.1%}{tuned[1]:>7.0%}{before[0]:>9.1%}{before[1]:>7.0%}"
        lines.append(line)
    return "\n".join(lines)


def _to_floor(row: Row) -> float | None:
    return None if row.floor is None else row.auto / row.floor


def _number(value: float | None, width: int, places: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{places}f}"


def report(rows: Sequence[Row], roofline: Roofline) -> dict[str, object]:
    """Everything of a run as JSON takes it."""
    return {
        **conditions(rows[0].device if rows else "cpu"),
        "roofline": {
            "copy_bytes_per_second": {str(size): rate for size, rate in sorted(roofline.copy_rates.items())},
            "flops_per_second": roofline.peaks,
        },
        "goals": [asdict(verdict) for verdict in verdicts(rows)],
        "rows": [_rounded(asdict(row)) for row in rows],
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Microseconds to four digits: what lies behind them is noise, and a full run has thousands of rows."""
    times = {name: float(f"{value:.4g}") for name, value in row["microseconds"].items()}
    rooflines = {
        name: None if row[name] is None else float(f"{row[name]:.4g}") for name in ("roofline", "lines")
    }
    return {**row, "microseconds": times, **rooflines}


def json_argument(description: str | None) -> Path | None:
    """Parse the command line of a benchmark that takes ``--json FILE`` and nothing else; returns the file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    path: Path | None = parser.parse_args().json
    return path


def conditions(device: str = "cpu") -> dict[str, object]:
    """What a figure needs beside it: command, versions, commit, machine, clock and load."""
    clock_name = clock().__name__ if device == "cpu" else "CUDA events"
    facts = describe(torch.device(device)) | {"clock": clock_name}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    return facts
