"""The estimator of the tail index: a case by hand, and draws whose index is known."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from trady_kernels.study.tail_index import TailIndex


def test_by_hand() -> None:
    """Samples 1, 1, 2, 2, 4 and a zero: sums 2 and 4 of pairs, the last sample left over."""
    index = TailIndex(block=2)
    index.add(torch.tensor([1.0, 0.0, 1.0, 2.0, 2.0, 4.0]))
    # mean log|Y| - mean log|X| = (log 2 + log 4) / 2 - (2 log 1 + 2 log 2) / 4 = log 2, so that alpha = 1.
    assert index.alpha == pytest.approx(1.0) and index.samples == 4


@pytest.mark.parametrize("alpha", (1.2, 1.5, 1.8, 2.0))
def test_draws_of_a_known_index(alpha: float) -> None:
    """Ten times 64,000 draws: the bias is under 0.03, and so is the spread."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    found = []
    for seed in range(10):
        index = TailIndex()
        index.add(torch.from_numpy(stats.levy_stable.rvs(alpha, 0.0, size=64_000, random_state=seed)))
        found.append(index.alpha)
    assert abs(statistics.fmean(found) - alpha) < 0.03 and statistics.stdev(found) < 0.03


def test_a_stream_is_its_whole() -> None:
    draws = torch.randn(1600)
    whole, first, second = TailIndex(), TailIndex(), TailIndex()
    whole.add(draws)
    first.add(draws[:800])
    second.add(draws[800:])
    first.include(second)
    assert first.alpha == pytest.approx(whole.alpha, rel=1e-12) and first.samples == whole.samples == 1600


def test_nothing_and_constants() -> None:
    index = TailIndex()
    index.add(torch.zeros(100))
    index.add(torch.ones(15))
    assert math.isnan(index.alpha) and index.samples == 0
    index.add(torch.ones(16))
    assert index.alpha == pytest.approx(1.0), "sums of K ones are K times as large"
    alternating = TailIndex(2)
    alternating.add(torch.tensor([1.0, -1.0 + 2**-10] * 8))
    assert alternating.alpha == math.inf
    with pytest.raises(ValueError, match="block: got 1, expected at least 2"):
        TailIndex(1)
    with pytest.raises(ValueError, match="other: got a block of 2, expected 16"):
        index.include(alternating)
