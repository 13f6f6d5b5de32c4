"""``d-det-rgn``: the channels with the most gradient for what they cost, anew every epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class DDetRgn(Scheme):
    """Highest RGN_c = ||dW_c|| / (C_W + C_A) first, among the channels of every layer.

    An oracle: to know every channel's gradient takes what the budget is there to avoid. Measuring it, with whole
    gradients, is over the budget by design; what trains afterwards is inside it.

    Source: TraDy (D-Det RGN), arXiv 2510.19675, equation 7 and section 4.3.
    """

    name = "d-det-rgn"
    needs_gradients = True

    def __init__(self) -> None:
        self._scores: dict[str, torch.Tensor] = {}

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return list(layers)

    def measure(self, norms: Mapping[str, torch.Tensor], layers: Mapping[str, LayerCost]) -> None:
        self._scores = {name: norms[name] / layers[name].channel.elements for name in layers}

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        scores = torch.cat([self._scores[name] for name in sizes])
        return scores.argsort(descending=True, stable=True)
