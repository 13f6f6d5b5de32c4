"""What the kernels have to reach on each type of device, held against measured rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from trady_kernels.benchmark.rows import Row


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals.

    Attributes:
        text: what is asked for.
        applies: which rows it is about.
        figure: one row's figure.
        total: makes one figure of them all; ``min`` and ``max`` for the worst row.
        bound: what the total is held against.
        at_least: whether more is better.
        by: what splits the rows into goals of their own.
    """

    text: str
    applies: Callable[[Row], bool]
    figure: Callable[[Row], float]
    total: Callable[[Sequence[float]], float]
    bound: float
    at_least: bool = True
    by: Callable[[Row], str] = lambda row: f"{row.memory_format} {row.dtype}"

    def reached(self, figure: float) -> bool:
        """Whether ``figure``, of all rows, is what is asked for."""
        return figure >= self.bound if self.at_least else figure <= self.bound


@dataclass(frozen=True)
class Verdict:
    """A goal held against the rows that it is about.

    Attributes:
        figure: of the rows.
        limit: the figure that rows of an operator at the roofline of whole cache lines, and one call, would have; None
            without compiled code and, on a CPU, for bfloat16. Where it misses the goal, no kernel on this machine reaches it.
        worst: the worst row in words.
    """

    goal: str
    rows: str
    count: int
    figure: float
    limit: float | None
    bound: float
    reached: bool
    worst: str


def _few(row: Row) -> bool:
    return row.selected in (1, 2, 4, 8, 12)


def _convolution(row: Row) -> bool:
    return row.operator == "conv2d_channel_grad"


def _dense(row: Row) -> bool:
    return _convolution(row) and not _depthwise(row)


def _depthwise(row: Row) -> bool:
    return _convolution(row) and row.family.startswith("depthwise")


def _gradient(row: Row) -> bool:
    return row.operator.endswith("_grad")


def _float32(row: Row, memory_format: str = "contiguous") -> bool:
    return row.dtype == "float32" and row.memory_format == memory_format


def _to_peer(row: Row) -> float:
    return row.ratio("aten")


def _to_floor(row: Row) -> float:
    return math.nan if row.floor is None else row.auto / row.floor


def _share_within_twice(values: Sequence[float]) -> float:
    return sum(value <= 2 for value in values) / len(values)


def _shares(text: str, applies: Callable[[Row], bool], bound: float) -> Goal:
    return Goal(
        text, lambda row: applies(row) and row.roofline is not None, _to_floor, _share_within_twice, bound
    )


_CPU = (
    Goal(
        "dense convolutions, k <= 12, float32: times ATen, geometric mean",
        lambda row: _dense(row) and _few(row) and _float32(row),
        _to_peer,
        geometric_mean,
        3,
    ),
    Goal(
        "dense convolutions, k <= 12, float32: times ATen, worst",
        lambda row: _dense(row) and _few(row) and _float32(row),
        _to_peer,
        min,
        1.2,
    ),
    Goal(
        "depthwise, float32: times ATen, geometric mean",
        lambda row: _depthwise(row) and _float32(row),
        _to_peer,
        geometric_mean,
        8,
    ),
    Goal(
        "depthwise 3x3, k >= 12, float32: times ATen, geometric mean",
        lambda row: _depthwise(row) and "3x3" in row.family and row.selected >= 12 and _float32(row),
        _to_peer,
        geometric_mean,
        3,
    ),
    Goal(
        "depthwise, float32: times ATen, worst",
        lambda row: _depthwise(row) and _float32(row),
        _to_peer,
        min,
        2,
    ),
    Goal(
        "C/16 to C: times ATen, worst",
        lambda row: _gradient(row) and 16 * row.selected >= row.in_channels,
        _to_peer,
        min,
        0.95,
    ),
    _shares("dense within twice the roofline, share of shapes", _dense, 0.9),
    _shares("depthwise within twice the roofline and one call, share of shapes", _depthwise, 0.6),
    Goal(
        "channels_last, k <= 12, float32: times ATen, geometric mean",
        lambda row: _convolution(row) and row.selected <= 12 and _float32(row, "channels_last"),
        _to_peer,
        geometric_mean,
        4,
    ),
)

_LARGE = 64 << 20


def _of_copy(row: Row) -> float:
    """Bandwidth, as a share of a copy's of as many bytes; a GPU reads whole sectors."""
    return math.nan if row.lines is None else row.lines / row.auto


_CUDA = (
    Goal(
        "depthwise and grouped, k <= C/4: times the best of cuDNN and the native kernel, geometric mean",
        lambda row: _depthwise(row) and 4 * row.selected <= row.in_channels,
        _to_peer,
        geometric_mean,
        3,
    ),
    Goal(
        "dense convolutions, k <= 16: times cuDNN, geometric mean",
        lambda row: _dense(row) and row.selected <= 16,
        _to_peer,
        geometric_mean,
        1.5,
    ),
    Goal(
        "dense convolutions, k <= 16: times cuDNN, worst",
        lambda row: _dense(row) and row.selected <= 16,
        _to_peer,
        min,
        0.95,
    ),
    Goal(
        "gather and masks over 64 MB: share of the copy bandwidth, worst",
        lambda row: not _gradient(row) and row.bytes >= _LARGE,
        _of_copy,
        min,
        0.8,
    ),
)

#: By type of device.
GOALS = {"cpu": _CPU, "cuda": _CUDA}

_GROWTH = "time(k) / time(C) - 1.3 k/C, C >= 64, k >= 16, worst"


def _growth(rows: Sequence[Row]) -> Goal:
    """The one goal that holds a row against another."""
    whole = {_layer(row): row.auto for row in rows if row.selected == row.in_channels}
    return Goal(
        _GROWTH,
        lambda row: _gradient(row) and row.in_channels >= 64 and row.selected >= 16 and _layer(row) in whole,
        lambda row: row.auto / whole[_layer(row)] - 1.3 * row.selected / row.in_channels,
        max,
        0.02,
        at_least=False,
    )


def _layer(row: Row) -> tuple[str, ...]:
    return (row.operator, row.label, row.memory_format, row.dtype)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal that some of the rows are about, once for each memory format and dtype among them."""
    at_limit = [_at_limit(row) for row in rows]
    limited = {id(row): ideal for row, ideal in zip(rows, at_limit, strict=True)}
    found = []
    device = rows[0].device if rows else "cpu"
    goals, limits = [*GOALS[device]], [*GOALS[device]]
    if device == "cpu":
        goals.append(_growth(rows))
        limits.append(_growth([row for row in at_limit if row is not None]))
    for goal, limit in zip(goals, limits, strict=True):
        about = [row for row in rows if goal.applies(row)]
        for name in dict.fromkeys(goal.by(row) for row in about):
            of = [row for row in about if goal.by(row) == name]
            figures = [goal.figure(row) for row in of]
            ideals = [limit.figure(ideal) for row in of if (ideal := limited[id(row)]) is not None]
            total = goal.total(figures)
            # Of a share the goal is high and each row's figure is better low.
            worst_is_least = goal.at_least and goal.total is not _share_within_twice
            index = figures.index(min(figures) if worst_is_least else max(figures))
            found.append(
                Verdict(
                    goal.text,
                    name,
                    len(of),
                    total,
                    goal.total(ideals) if len(ideals) == len(of) else None,
                    goal.bound,
                    goal.reached(total),
                    f"{figures[index]:.2f} at {of[index].label}, k = {of[index].selected}",
                )
            )
    return found


def _at_limit(row: Row) -> Row | None:
    """The row as an operator at the roofline would have it; None where there is none that holds, as for bfloat16 on a CPU,
    whose roofline is drawn by float32's multiply-adds."""
    return (
        None
        if row.limit is None or (row.device == "cpu" and row.dtype == "bfloat16")
        else replace(row, microseconds={**row.microseconds, "auto": row.limit})
    )
