"""``sparse-update``: a fixed share of each layer, found once for a network and given as data."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.layer_fractions import LayerFractions
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class SparseUpdate(Scheme):
    """The first r*C input channels of each layer, r as a file says; nothing is drawn.

    Fractions with the contributions that a search measured are chosen anew for another budget; of others, what they
    cost has to be inside. Source: Lin et al., On-Device Training Under
    256KB Memory, arXiv 2206.15472, section 3.2.

    Args:
        fractions: of the network's layers, or the file that holds them.

    Raises:
        ValueError: no fractions, or a file that does not hold any.
        OSError: the file cannot be read.

    Attributes:
        biases: how many of the last layers train their bias too.
    """

    name = "sparse-update"
    every_epoch = False
    given = True

    def __init__(self, fractions: LayerFractions | str | os.PathLike[str] | None = None) -> None:
        if fractions is None:
            raise ValueError(
                "scheme: 'sparse-update' is given as data, expected SparseUpdate(file) with the layer fractions in "
                "place of its name, or SparseUpdate(LayerFractions.shipped(network))"
            )
        self.fractions = (
            fractions if isinstance(fractions, LayerFractions) else LayerFractions.load(fractions)
        )
        self.biases = self.fractions.bias_layers

    @classmethod
    def for_network(cls, network: str, fractions: str | os.PathLike[str] | None = None) -> SparseUpdate:
        return cls(LayerFractions.shipped(network) if fractions is None else fractions)

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        fractions = self.fractions
        if budget is None:
            fractions.cost(layers)  # refuses another network's
        else:
            fractions = fractions.within(budget, layers)
        self._counts = {name: fractions.channels_of(layer) for name, layer in layers.items()}
        return [name for name, count in self._counts.items() if count]

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        starts, start = [torch.empty(0, dtype=torch.int64)], 0
        for name, size in sizes.items():
            starts.append(start + torch.arange(self._counts[name]))
            start += size
        return torch.cat(starts)
