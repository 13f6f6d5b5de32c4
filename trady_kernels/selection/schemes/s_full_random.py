"""``s-full-random``: one uniform draw from all layers' channels."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class SFullRandom(Scheme):
    """As ``d-full-random``, drawn once; close to PaCA (ICLR 2025), which trains random connections of each layer.

    Source: TraDy (S-Full Random), arXiv 2510.19675, section 4.3.
    """

    name = "s-full-random"
    every_epoch = False

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return list(layers)
