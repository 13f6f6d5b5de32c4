"""``d-full-random``: a fresh uniform draw from all layers' channels every epoch."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class DFullRandom(Scheme):
    """Uniformly among the channels of every layer, again each epoch.

    Source: TraDy (D-Full Random), arXiv 2510.19675, section 4.3.
    """

    name = "d-full-random"

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return list(layers)
