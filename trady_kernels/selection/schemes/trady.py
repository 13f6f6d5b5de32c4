"""``trady``: a fresh uniform draw from the top layers' channels every epoch."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.pool import ShareOfScore
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class Trady(Scheme):
    """Uniformly among the channels of the pool, again each epoch.

    Source: TraDy (D-TopK Random), arXiv 2510.19675, section 4.2.
    """

    name = "trady"
    ranked = True

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return ShareOfScore().layers(layers, ranking, budget)
