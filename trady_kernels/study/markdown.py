"""Tables and figures of the reports, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trady_kernels.study.statistics import Spread


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation; of a single value itself, of none nothing."""
    if not values:
        return ""
    found = Spread.of(values)
    deviation = "" if math.isnan(found.deviation) else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{deviation}"


def counted(count: int, unit: str) -> str:
    """A number of things, as it is read: "1 seed", "3 seeds"."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns align in the source too: the first to the left, the others to the right where they are figures."""
    columns = [[head, *(row[index] for row in rows)] for index, head in enumerate(heads)]
    widths = [max(3, *map(len, column)) for column in columns]

    def figures(column: Sequence[str]) -> bool:
        return all(not cell or cell[0] in "+-0123456789<" for cell in column[1:])

    right = [bool(index) and figures(column) for index, column in enumerate(columns)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(aligned)} |"

    rule = [
        "-" * (width - 1) + ":" if to_right else "-" * width
        for width, to_right in zip(widths, right, strict=True)
    ]
    return [line(heads), line(rule), *map(line, rows)]
