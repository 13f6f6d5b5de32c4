"""The estimator of the tail index: a case by hand, and draws whose index is known."""

from __future__ import annotations

import math

import pytest
import torch

from trady_kernels.study.gradients import BLOCKS
from trady_kernels.study.tail_index import TailIndex, on_known_draws, on_mixed_draws
from trady_kernels.study.tails import KNOWN, MIXED


def test_by_hand() -> None:
    """Samples 1, 1, 2, 2, 4 and a zero: sums 2 and 4 of pairs, the last sample left over."""
    index = TailIndex(block=2)
    index.add(torch.tensor([1.0, 0.0, 1.0, 2.0, 2.0, 4.0]))
    # mean log|Y| - mean log|X| = (log 2 + log 4) / 2 - (2 log 1 + 2 log 2) / 4 = log 2, so that alpha = 1.
    assert index.alpha == pytest.approx(1.0) and index.samples == 4


@pytest.mark.parametrize("alpha", KNOWN)
def test_draws_of_a_known_index(alpha: float) -> None:
    """Ten times 64,000 draws, of any scale: the bias is under 0.03, and so is the spread, of few long sums under 0.1."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    for block, most in zip(BLOCKS, (0.03, 0.1), strict=True):
        found = on_known_draws(alpha, block)
        assert abs(found.mean - alpha) < most and 0 < found.deviation < most and found.count == 10
        assert on_known_draws(alpha, block, scale=4.0).mean == pytest.approx(found.mean, rel=1e-6)


def test_a_stream_is_its_whole() -> None:
    draws = torch.randn(1600)
    whole, parts = TailIndex(), TailIndex()
    whole.add(draws)
    parts.add(draws[:800])
    parts.add(draws[800:])
    assert parts.alpha == pytest.approx(whole.alpha, rel=1e-12) and parts.samples == whole.samples == 1600


def test_a_mixture_of_gaussians_has_no_index_of_its_own() -> None:
    """The estimate is below 2, and the lower the more the scales differ; longer sums come closer to a Gaussian."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    found = [on_mixed_draws(MIXED, block) for block in (16, 256, 4096)]
    assert [spread.mean for spread in found] == pytest.approx([0.945, 1.154, 1.3], abs=0.06)
    assert found[0].mean + 3 * found[0].deviation < found[1].mean
    one_scale, gaussian = on_mixed_draws(0.0, 16), on_known_draws(2.0, 16)
    assert one_scale.mean == pytest.approx(2.0, abs=3 * gaussian.deviation)


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
