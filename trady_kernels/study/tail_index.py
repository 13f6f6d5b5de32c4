"""The tail index of samples: how much heavier than a Gaussian's their tails are."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

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
    return _estimates(block, (scale * _stable_draws(alpha, samples, seed) for seed in range(repeats)))


@functools.lru_cache
def _stable_draws(alpha: float, samples: int, seed: int) -> torch.Tensor:
    from scipy.stats import levy_stable

    return torch.from_numpy(levy_stable.rvs(alpha, 0.0, size=samples, random_state=seed))


@functools.lru_cache
def on_mixed_draws(deviation: float, block: int, samples: int = 64_000, repeats: int = 10) -> Spread:
    """Estimates from Gaussians each of whose scale is drawn too, lognormal with that deviation of its logarithm.

    They have all moments, so that their sums tend to a Gaussian and the estimate rises to 2 with ``block``.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import norm

    drawn = (torch.from_numpy(norm.rvs(size=(2, samples), random_state=seed)) for seed in range(repeats))
    return _estimates(block, (draws * (deviation * logarithms).exp() for draws, logarithms in drawn))


def _estimates(block: int, repeats: Iterable[torch.Tensor]) -> Spread:
    found = []
    for draws in repeats:
        index = TailIndex(block)
        index.add(draws)
        found.append(index.alpha)
    return Spread.of(found)
