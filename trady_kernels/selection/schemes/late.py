"""``late``: as ``trady``, among the last layers, so that the backward pass ends early and keeps fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

from trady_kernels.cost import Budget, LayerCost, total
from trady_kernels.selection.pool import ShareOfScore
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme

#: Most of all layers' input elements that lie behind the lowest layer that may train.
MOST_BEHIND = 1 / 3


class Late(Scheme):
    """Uniformly among the channels of the top layers that are among the last ones, again each epoch.

    Down to the lowest layer that trains, activations keep their bits whatever the budget. Of a small budget's measured
    bytes these are most, and most of them belong to the first layers, where maps are large and the ranking is low. The
    last layers behind which a third of all input elements lie keep a third of the bits: what is saved buys channels, by
    a larger budget.
    """

    name = "late"
    ranked = True

    def reach(self, layers: Mapping[str, LayerCost]) -> list[str]:
        elements = {name: layer.full.activation_elements for name, layer in layers.items()}
        most = MOST_BEHIND * total(c.full for c in layers.values()).activation_elements
        behind, names = 0, list[str]()
        for name in reversed(list(layers)):
            behind += elements[name]
            if names and behind > most:
                break
            names.append(name)
        return names[::-1]

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        within = set(self.reach(layers))
        return [name for name in ShareOfScore().layers(layers, ranking, budget) if name in within]
