"""Names beside the lines of a plot, each where it lies on nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]
#: Squares of the panel, two points of print wide, that have something in them: what it costs to lie on each.
Taken = dict[tuple[int, int], float]

_SQUARE = 2.0
#: Points of print from a marker to its label, and in how many directions.
_DISTANCES, _DIRECTIONS = (3, 6, 10, 15, 21, 28, 36, 45, 55, 66), 16
#: From which on a pointer leads there.
_FAR = 6
#: Half of a marker's side, and how near markers are that crowd another one.
_MARKER, _NEAR = 2.0, 30.0
#: Of a panel's border, that no label lies on.
_BORDER = 2.0
#: How far away, in points of print, a label would rather be than lie on a square of a marker or label, or of a line.
_ON_A_LABEL, _ON_A_LINE = 100.0, 3.0


@dataclass(frozen=True)
class _Place:
    """Where a label may be: its middle, squares that it takes, and the way to it from the marker."""

    middle: Point
    squares: list[tuple[int, int]]
    pointer: tuple[Point, Point]
    distance: float

    def cost(self, taken: Taken) -> float:
        """The distance, and more for whatever is hidden."""
        way = self.way() if self.distance > _FAR else []
        return self.distance + sum(taken.get(square, 0.0) for square in itertools.chain(self.squares, way))

    def way(self) -> list[tuple[int, int]]:
        """Squares that the pointer takes, but for the marker's own."""
        return list(_along(*self.pointer))[1:]


def label_lines(axes: Any, lines: Mapping[str, Sequence[tuple[float, float, float]]], size: float) -> None:
    """Write each line's name beside one of its points, with a pointer where it is far; the figure's layout must be final.

    Args:
        axes: that the lines are drawn in.
        lines: points by name: place, value and half of the bar through it.
        size: of the letters, in points of print.
    """
    scale = 72 / axes.figure.dpi
    inside: Point = tuple(axes.bbox.size * scale)

    def in_print(x: float, y: float) -> Point:
        across, up = (axes.transData.transform((x, y)) - axes.bbox.min) * scale
        return float(across), float(up)

    markers = {name: [in_print(x, y) for x, y, _ in points] for name, points in lines.items()}
    taken: Taken = {}
    for name, points in lines.items():
        for start, end in itertools.pairwise(markers[name]):
            taken |= dict.fromkeys(_along(start, end), _ON_A_LINE)
        for x, y, bar in points:
            taken |= dict.fromkeys(_along(in_print(x, y - bar), in_print(x, y + bar)), _ON_A_LINE)
    for point in itertools.chain(*markers.values()):
        taken |= dict.fromkeys(_squares(point, (_MARKER, _MARKER)), _ON_A_LABEL)
    for name in sorted(lines, key=lambda name: -_crowd(markers[name], markers)):
        extent = axes.text(0, 0, name, fontsize=size).get_window_extent()
        axes.texts[-1].remove()
        half = (extent.width * scale / 2, extent.height * scale / 2)
        places = [place for point in markers[name] for place in _places(point, half, inside)]
        if places:  # a panel may be too small
            best = min(places, key=lambda place: place.cost(taken))
            taken |= dict.fromkeys(best.squares, _ON_A_LABEL) | dict.fromkeys(best.way(), _ON_A_LINE)
            _write(axes, name, best, size)


def _squares(middle: Point, half: Point) -> list[tuple[int, int]]:
    """Those that a box is in."""
    across, up = (
        range(math.floor((at - by) / _SQUARE), math.floor((at + by) / _SQUARE) + 1)
        for at, by in zip(middle, half, strict=True)
    )
    return list(itertools.product(across, up))


def _along(start: Point, end: Point) -> Iterable[tuple[int, int]]:
    """Squares on the way from one point to another."""
    count = 1 + int(math.dist(start, end) / _SQUARE)
    for step in range(count + 1):
        x, y = (a + (b - a) * step / count for a, b in zip(start, end, strict=True))
        yield math.floor(x / _SQUARE), math.floor(y / _SQUARE)


def _crowd(points: Sequence[Point], markers: Mapping[str, Sequence[Point]]) -> int:
    """How many markers are near: those with many have the first choice."""
    others = list(itertools.chain(*markers.values()))
    return min(sum(math.dist(point, other) < _NEAR for other in others) for point in points)


def _places(point: Point, half: Point, inside: Point) -> Iterator[_Place]:
    """All inside the panel."""
    for distance, direction in itertools.product(_DISTANCES, range(_DIRECTIONS)):
        angle = 2 * math.pi * direction / _DIRECTIONS
        toward, reach = (math.cos(angle), math.sin(angle)), _MARKER + distance
        x, y = (p + t * (reach + h) for p, t, h in zip(point, toward, half, strict=True))
        room = (_BORDER + half[0], _BORDER + half[1])
        if room[0] <= x <= inside[0] - room[0] and room[1] <= y <= inside[1] - room[1]:
            start = (point[0] + toward[0] * _MARKER, point[1] + toward[1] * _MARKER)
            end = (
                min(max(point[0], x - half[0]), x + half[0]),
                min(max(point[1], y - half[1]), y + half[1]),
            )
            yield _Place((x, y), _squares((x, y), half), (start, end), distance)


def _write(axes: Any, name: str, place: _Place, size: float) -> None:
    within = {"xycoords": "axes points", "textcoords": "axes points", "fontsize": size}
    written = [axes.annotate(name, place.middle, place.middle, **within, ha="center", va="center")]
    if place.distance > _FAR:
        line = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
        written.append(axes.annotate("", *place.pointer, **within, arrowprops=line))
    for part in written:
        part.set_in_layout(False)
