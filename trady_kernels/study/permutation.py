"""A test of whether runs of a group are more alike than runs of different groups, by dividing them otherwise."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

Division = tuple[tuple[int, ...], ...]

#: Divisions up to which all are looked at; of more, so many.
_MOST = 10_000


@dataclass(frozen=True)
class GroupTest:
    """A permutation test of groups of runs by the squared distances between the runs.

    Attributes:
        statistic: F: how much larger distances are between groups than within; infinite where there are none within.
        p: share of the divisions into groups of these sizes, this one among them, with an F at least as large.
        divisions: how many were looked at; p is no less than one over it.
    """

    statistic: float
    p: float
    divisions: int


def group_test(squares: Sequence[Sequence[float]], groups: Sequence[int]) -> GroupTest | None:
    """Test whether runs of a group are closer to each other than to those of other groups.

    Args:
        squares: squared distance of every two runs.
        groups: each run's group.

    Returns:
        The test; None with fewer than two groups, with no group of two runs, or where a distance is NaN.

    Source: M. J. Anderson, A new method for non-parametric multivariate analysis of variance, Austral Ecology 26 (2001).
    """
    runs = range(len(groups))
    own = tuple(tuple(run for run in runs if groups[run] == group) for group in dict.fromkeys(groups))
    if len(own) < 2 or len(own) == len(runs) or any(math.isnan(value) for row in squares for value in row):
        return None

    def within(division: Division) -> float:
        return math.fsum(squares[a][b] / len(group) for group in division for a, b in combinations(group, 2))

    found = within(own)
    # The sum over all pairs is the same, so that a larger F is a smaller sum within; in another order it may round.
    as_close = [within(division) <= found * (1 + 1e-12) for division in _looked_at(own)]
    between = (within((tuple(runs),)) - found) / (len(own) - 1)
    statistic = between / (found / (len(runs) - len(own))) if found else math.inf
    return GroupTest(statistic, sum(as_close) / len(as_close), len(as_close))


def _looked_at(own: Division) -> Iterator[Division]:
    """All divisions into groups of these sizes; of too many these groups and some by chance."""
    sizes = [len(group) for group in own]
    members = tuple(range(sum(sizes)))
    same = math.prod(map(math.factorial, (*sizes, *Counter(sizes).values())))
    if math.factorial(len(members)) // same <= _MOST:
        yield from divisions(members, tuple(sizes))
        return
    yield own
    generator = random.Random(0)
    for _ in range(_MOST - 1):
        order = iter(generator.sample(members, len(members)))
        yield tuple(tuple(islice(order, size)) for size in sizes)


def divisions(members: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Division]:
    """Every way to divide members into groups of these sizes, each once."""
    if not members:
        yield ()
        return
    first, *rest = members
    for size in dict.fromkeys(sizes):
        left = list(sizes)
        left.remove(size)
        for others in combinations(rest, size - 1):
            remaining = tuple(member for member in rest if member not in others)
            for division in divisions(remaining, tuple(left)):
                yield ((first, *others), *division)
