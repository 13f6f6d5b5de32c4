"""``medyate``: a draw that follows the gradient norms seen so far, from a pool as large as the budget allows for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.pool import ShareOfCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class Medyate(Scheme):
    """Each epoch, channels with a probability proportional to the norm of their gradient when they last trained.

    The first draw is uniform. Channels that never trained have the largest norm seen, so that they get their turn.
    The pool are the first layers of the ranking (the paper's is by LaRa) that together cost five times the budget.

    Source: MeDyate, arXiv 2510.20979, section 4.
    """

    name = "medyate"
    ranked = True
    observes = True
    metric = "lara"

    def __init__(self) -> None:
        #: By layer, of all its channels; NaN where none was seen.
        self._norms: dict[str, torch.Tensor] = {}

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return ShareOfCost().layers(layers, ranking, budget)

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        unseen = torch.tensor(torch.nan, dtype=torch.float64)
        norms = torch.cat(
            [
                self._norms[name] if name in self._norms else unseen.expand(size)
                for name, size in sizes.items()
            ]
        )
        largest = norms.nan_to_num(0.0).max()
        weights = norms.where(~norms.isnan(), largest)
        if not largest > 0:
            return super().order(sizes, generator)
        # The first of an exponential clock each, of these rates, is drawn in proportion to them, and so is the next one
        # among the rest (Efraimidis and Spirakis, 2006). Clocks of rate 0 never ring: a random order among them.
        times = torch.empty_like(weights).exponential_(generator=generator) / weights
        shuffled = torch.randperm(len(weights), generator=generator)
        return shuffled[times[shuffled].argsort(stable=True)]

    def observe(self, layer: str, count: int, channels: torch.Tensor, norms: torch.Tensor) -> None:
        if layer not in self._norms:
            self._norms[layer] = torch.full((count,), torch.nan, dtype=torch.float64)
        self._norms[layer][channels] = norms.double()

    def state_dict(self) -> dict[str, Any]:
        return {name: norms.clone() for name, norms in self._norms.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        # On the CPU, where the draws are, whatever device the checkpoint was loaded on.
        self._norms = {
            name: torch.as_tensor(norms).double().cpu().clone() for name, norms in state_dict.items()
        }
