"""What a selection scheme decides: which layers take part, in which order their channels are tried, and when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from trady_kernels.cost import LayerCost

if TYPE_CHECKING:
    from trady_kernels.selection.ranking import LayerRanking

#: Share of a ranking's cumulative score that the layers of a top-K pool hold [TraDy, section 4.1].
POOL_SHARE = 0.97


class Scheme(ABC):
    """A rule that orders channels; the sampler takes them in that order while the budget lasts.

    Attributes:
        name: how users call it.
        budgeted: whether a budget bounds the selection.
        every_epoch: whether ``resample()`` draws again; otherwise the first draw stays.
        ranked: whether the pool depends on a ranking of the layers.
    """

    name: ClassVar[str]
    budgeted: ClassVar[bool] = True
    every_epoch: ClassVar[bool] = True
    ranked: ClassVar[bool] = False

    @abstractmethod
    def pool(self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None) -> list[str]:
        """Names of the layers whose channels take part, in the order of ``layers``."""

    def order(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Permutation of the pool's ``count`` channels, layer after layer: the order of trying them."""
        return torch.randperm(count, generator=generator)


def ranked_pool(layers: Mapping[str, LayerCost], ranking: LayerRanking | None) -> list[str]:
    """The layers that hold 97% of the ranking's cumulative score; every layer without a ranking.

    Source: TraDy, arXiv 2510.19675, section 4.1.
    """
    if ranking is None:
        return list(layers)
    top = set(ranking.top(POOL_SHARE, among=layers))
    return [name for name in layers if name in top]
