"""``full``: every channel of every layer, the ceiling."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class Full(Scheme):
    """All channels, whatever they cost."""

    name = "full"
    budgeted = False
    every_epoch = False

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return list(layers)
