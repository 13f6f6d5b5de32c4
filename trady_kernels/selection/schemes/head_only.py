"""``head-only``: no channel at all, the floor that every scheme has to beat."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class HeadOnly(Scheme):
    """Nothing but the head trains."""

    name = "head-only"
    budgeted = False
    every_epoch = False

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return []
