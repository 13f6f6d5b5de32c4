"""A test of whether runs of a group are more alike than runs of different groups, by dividing them otherwise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

#: Arrangements up to which all are looked at; of more, so many by chance.
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
        The test; None with fewer than two groups, with a group of one run, or where a distance is NaN.

    Raises:
        ModuleNotFoundError: scipy is not installed.

    Source: M. J. Anderson, A new method for non-parametric multivariate analysis of variance, Austral Ecology 26 (2001).
    """
    runs = range(len(groups))
    own = [[run for run in runs if groups[run] == group] for group in dict.fromkeys(groups)]
    if len(own) < 2 or min(map(len, own)) < 2 or any(math.isnan(value) for row in squares for value in row):
        return None

    def within(*division: Iterable[int]) -> float:
        members = [list(map(int, group)) for group in division]
        return math.fsum(squares[a][b] / len(group) for group in members for a, b in combinations(group, 2))

    found = within(*own)
    between = (within(runs) - found) / (len(own) - 1)
    statistic = between / (found / (len(runs) - len(own))) if found else math.inf
    # The sum over all pairs is the same, so that a larger F is a smaller sum within.
    test = _scipy_stats().permutation_test(
        own, within, vectorized=False, n_resamples=_MOST, alternative="less", random_state=0
    )
    arrangements = math.factorial(len(runs)) // math.prod(math.factorial(len(group)) for group in own)
    # Of arrangements those that give groups of a size other names are one division.
    same = math.prod(map(math.factorial, Counter(map(len, own)).values()))
    divisions = arrangements // same if arrangements <= _MOST else _MOST + 1
    return GroupTest(statistic, float(test.pvalue), divisions)


def _scipy_stats() -> Any:
    try:
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "permutation tests need scipy; install it with: pip install 'trady-kernels[study]'"
        ) from error
    return scipy.stats
