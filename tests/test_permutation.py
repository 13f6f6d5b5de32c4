"""The permutation test of groups of runs, against one-way analysis of variance and scipy's permutations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trady_kernels.study import permutation
from trady_kernels.study.permutation import group_test


def squares_of(values: list[float]) -> list[list[float]]:
    return [[(a - b) ** 2 for b in values] for a in values]


@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 2, 2, 2]])
def test_one_quantity_is_scipys_analysis_of_variance(groups: list[int]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    values = np.random.default_rng(4).normal(size=len(groups)) + 0.8 * np.array(groups)
    samples = [values[np.array(groups) == group] for group in sorted(set(groups))]
    found = group_test(squares_of(values.tolist()), groups)
    assert found is not None and found.statistic == pytest.approx(stats.f_oneway(*samples).statistic)
    expected = stats.permutation_test(
        samples, lambda *parts: stats.f_oneway(*parts).statistic, n_resamples=np.inf, alternative="greater"
    )
    assert found.p == pytest.approx(expected.pvalue)


def test_of_too_many_divisions_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    values = np.random.default_rng(1).normal(size=9) + np.array([0.0, 0, 0, 1, 1, 1, 2, 2, 2])
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    every = group_test(squares_of(values.tolist()), groups)
    monkeypatch.setattr(permutation, "_MOST", 270)
    some = group_test(squares_of(values.tolist()), groups)
    assert every is not None and some is not None and (every.divisions, some.divisions) == (280, 271)
    assert some.statistic == every.statistic and some.p == pytest.approx(every.p, abs=0.05)
    apart = group_test(squares_of([0, 0.1, 0.2, 5, 5.1, 5.2, 9, 9.1, 9.2]), groups)
    assert apart is not None and apart.p >= 1 / 271, "the groups themselves are among them"


def test_groups_far_apart_and_none() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    apart = group_test(squares_of([0, 0, 0, 3, 3, 3, 7, 7, 7]), [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert apart is not None and apart.statistic == math.inf and apart.p == pytest.approx(1 / 280)
    two = group_test(squares_of([0, 1, 10, 11]), [0, 0, 1, 1])
    assert two is not None and two.p == pytest.approx(1 / 3) and two.divisions == 3
    for values, groups in (([1.0, 2.0], [0, 0]), ([1.0, 2.0], [0, 1]), ([1.0, 2.0, math.nan], [0, 0, 1])):
        assert group_test(squares_of(values), groups) is None
