"""Means and paired tests over the cells of a results table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Of the values of a series: how far two equal differences between them may be apart.
_ROUNDING = 1e-12


def significant(value: float, digits: int) -> float:
    """The number with so many significant digits: nobody needs all of them, of thousands of channels."""
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some runs.

    Attributes:
        mean: of them.
        deviation: NaN of a single one.
        count: how many.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Quartiles:
    """The middle of some values and of each half of them.

    Attributes:
        low, median, high: a quarter, a half and three quarters of the values are no larger; between two values in proportion.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def words(self, digits: int) -> str:
        """The median and, in brackets, the other two."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired t-test: whether the mean of differences is zero.

    Attributes:
        difference: mean of first minus second.
        statistic: Student's t, with ``pairs - 1`` degrees of freedom; NaN where there is no test: with fewer than two pairs,
            or where all differences are equal, whose spread says nothing of what chance does.
        p: probability of a t at least as far from zero if there were no difference; NaN where there is no test.
        pairs: how many.
        wins: pairs in which the first is larger.
        deviation: sample standard deviation of the differences; NaN with fewer than two pairs.
    """

    difference: float
    statistic: float
    p: float
    pairs: int
    wins: int
    deviation: float

    @property
    def significant(self) -> bool:
        """At the level of 5%."""
        return self.p < 0.05

    @property
    def words(self) -> str:
        """Difference and p."""
        return f"{self.difference:+.2f}" + ("" if math.isnan(self.p) else f" ({p_words(self.p)})")

    @property
    def verdict(self) -> str:
        """Of the claim that the first series is the larger one."""
        return verdict(self.p, self.difference)

    @property
    def interval(self) -> str:
        """95% confidence interval of the mean difference, by Student's t; nothing where there is no test."""
        if math.isnan(self.statistic):
            return ""
        half = float(_student().ppf(0.975, self.pairs - 1)) * self.deviation / math.sqrt(self.pairs)
        return f"{self.difference - half:+.2f} to {self.difference + half:+.2f}"


def verdict(p: float, effect: float) -> str:
    """Of the claim that something is above zero."""
    if not p < 0.05:
        return "not decided at the level of 5%"
    return "holds" if effect > 0 else "the opposite was found"


def held(count: int, total: int) -> str:
    """Verdict of a claim that was found in so many of all cases, of which there is at least one."""
    if count == total:
        return "holds"
    return "holds in part" if count else "does not hold"


def p_words(p: float) -> str:
    """A probability, as it is printed."""
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def paired_test(first: Mapping[Any, float], second: Mapping[Any, float]) -> PairedTest:
    """Compare two series of runs, pair by pair, over the keys that both have.

    Raises:
        ValueError: they have no key in common.
        ModuleNotFoundError: scipy is not installed.
    """
    keys = [key for key in first if key in second]
    if not keys:
        raise ValueError(f"first, second: got {len(first)} and {len(second)} runs, expected a key in common")
    differences = [first[key] - second[key] for key in keys]
    wins = sum(difference > 0 for difference in differences)
    spread = Spread.of(differences)
    # Equal differences of rounded numbers differ in their last digits.
    rounding = _ROUNDING * max(abs(series[key]) for series in (first, second) for key in keys)
    if len(keys) < 2 or spread.deviation <= rounding:
        return PairedTest(spread.mean, math.nan, math.nan, len(keys), wins, spread.deviation)
    statistic = spread.mean / (spread.deviation / math.sqrt(len(keys)))
    p = 2 * float(_student().sf(abs(statistic), len(keys) - 1))
    return PairedTest(spread.mean, statistic, p, len(keys), wins, spread.deviation)


def _student() -> Any:
    """Student's t distribution.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    try:
        from scipy.stats import t as student
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "paired tests need scipy; install it with: pip install 'trady-kernels[study]'"
        ) from error
    return student
