"""``bias-only``: no channel, but every bias: what trains without a stored activation."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class BiasOnly(Scheme):
    """Nothing but the biases of layers and frozen norms trains, and the head.

    Source: TinyTL (bias only), arXiv 2007.11622, section 3.2; with last layers alone, Sparse Update, arXiv 2206.15472.
    """

    name = "bias-only"
    budgeted = False
    every_epoch = False
    biases = True

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return []
