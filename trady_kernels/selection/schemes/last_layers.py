"""``last-layers``: the last layers whole, what one tries first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.schemes.scheme import Scheme


class LastLayers(Scheme):
    """All channels of the last layer, then of the one before it, and so on up to the budget.

    The baseline of fine-tuning the last blocks of a network, at the same counted cost as the other schemes. Of the first
    layer that does not fit whole, as many channels as do; what is left after it goes to layers further up.
    """

    name = "last-layers"
    every_epoch = False

    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        return list(layers)

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        channels = torch.arange(sum(sizes.values())).split(list(sizes.values()))
        return torch.cat(channels[::-1])
