"""``s-topk-random``: one uniform draw from the top layers' channels."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.pool import ShareOfScore
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class STopKRandom(Scheme):
    """As ``trady``, drawn once.

    Source: TraDy (S-TopK Random), arXiv 2510.19675, section 4.3.
    """

    name = "s-topk-random"
    every_epoch = False
    ranked = True

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return ShareOfScore().layers(layers, ranking, budget)
