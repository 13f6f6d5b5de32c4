"""The tail index of samples: how much heavier than a Gaussian's their tails are."""

from __future__ import annotations

import functools
import math

import torch

from trady_kernels.study.statistics import Spread


class TailIndex:
    r"""The index alpha of symmetric alpha-stable samples, from a stream of them.

    The sum Y of K independent samples X is :math:`K^{1/\alpha}` times as large as one of them, so that

    .. math:: 1 / \alpha = (mean \log |Y| - mean \log |X|) / \log K

    alpha is 2 for a Gaussian; below 2 the variance is infinite. Each call's samples are cut into blocks of K, and
    those left over are not used; exact zeros, which have no logarithm, are left out before.

    Args:
        block: K.

    Raises:
        ValueError: ``block`` is below 2.

    Source: Mohammadi, Mohammadpour and Ogata, Metrika 78 (2015); TraDy, arXiv 2510.19675, section 4.1.
    """

    def __init__(self, block: int = 16) -> None:
        if block < 2:
            raise ValueError(f"block: got {block}, expected at least 2 samples in a sum")
        self.block = block
        self._logs_of_samples = self._logs_of_sums = 0.0
        self._samples = self._sums = 0

    def add(self, samples: torch.Tensor) -> None:  # (n,)
        """Take note of samples; those of a block should be independent of each other."""
        samples = samples.detach().flatten()
        samples = samples[samples != 0]
        count = len(samples) // self.block * self.block
        if not count:
            return
        used = samples[:count].double()
        sums = used.view(-1, self.block).sum(1)
        sums = sums[sums != 0]
        self._logs_of_samples += float(used.abs().log().sum())
        self._logs_of_sums += float(sums.abs().log().sum())
        self._samples += count
        self._sums += len(sums)

    def include(self, other: TailIndex) -> None:
        """Take over what another one of the same block has noted.

        Raises:
            ValueError: its block is another.
        """
        if other.block != self.block:
            raise ValueError(f"other: got a block of {other.block}, expected {self.block}")
        self._logs_of_samples += other._logs_of_samples
        self._logs_of_sums += other._logs_of_sums
        self._samples += other._samples
        self._sums += other._sums

    @property
    def samples(self) -> int:
        """How many were used."""
        return self._samples

    @property
    def alpha(self) -> float:
        """The estimate; NaN without a sum of samples, infinite where sums are no larger than their parts."""
        if not self._sums:
            return math.nan
        inverse = self._logs_of_sums / self._sums - self._logs_of_samples / self._samples
        return math.log(self.block) / inverse if inverse > 0 else math.inf


@functools.lru_cache
def on_known_draws(
    alpha: float, block: int, samples: int = 64_000, repeats: int = 10, scale: float = 1e-3
) -> Spread:
    """Estimates from symmetric alpha-stable draws whose index is known: their mean less the index is the bias.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import levy_stable

    found = []
    for seed in range(repeats):
        index = TailIndex(block)
        draws = levy_stable.rvs(alpha, 0.0, scale=scale, size=samples, random_state=seed)
        index.add(torch.from_numpy(draws))
        found.append(index.alpha)
    return Spread.of(found)
