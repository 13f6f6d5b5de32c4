"""What a selection scheme decides: which layers take part, in which order their channels are tried, and when."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trady_kernels.cost import Budget, LayerCost

if TYPE_CHECKING:
    from trady_kernels.selection.ranking import LayerRanking


class Scheme(ABC):
    """A rule that orders channels; the sampler takes them in that order while the budget lasts.

    Attributes:
        name: how users call it.
        budgeted: whether a budget bounds the selection.
        every_epoch: whether ``resample()`` draws again; otherwise the first draw stays.
        ranked: whether the pool depends on a ranking of the layers.
        observes: whether the order depends on the gradients of the channels that trained: the sampler then measures
            their norms and hands them to :meth:`observe`.
        needs_gradients: whether the order depends on the gradients of all channels: the sampler then has to be given
            a function that measures them, calls it before each draw and hands the norms to :meth:`measure`.
        given: whether the selection is data that the user has: the budget only checks it.
        metric: that of the ranking which the scheme's source takes.
        biases: those that train too, which takes a network from ``sparsify(model, biases=...)``: all, none, or those of
            that many last layers.
    """

    name: ClassVar[str]
    budgeted: ClassVar[bool] = True
    every_epoch: ClassVar[bool] = True
    ranked: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    given: ClassVar[bool] = False
    metric: ClassVar[str] = "rgn"
    biases: bool | int = False

    @property
    def takes_pool(self) -> bool:
        """Whether other layers than the scheme's own choice make sense."""
        return self.budgeted and not self.given

    @classmethod
    def for_network(cls, network: str, fractions: str | os.PathLike[str] | None = None) -> Scheme:
        """The scheme for a network by name.

        Args:
            network: as ``trady finetune --model`` takes it.
            fractions: file of layer fractions, for a scheme that is given as data; None takes what ships for the
                network.

        Raises:
            OSError, ValueError: the file cannot be read or holds something else, or nothing ships.
        """
        return cls()

    @abstractmethod
    def pool(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        """Names of the layers whose channels take part, in the order of ``layers``; at least one if ``takes_pool``.

        Args:
            layers: every sparse layer.
            ranking: of them, or None.
            budget: of the selection; None for a scheme without one.
        """

    def reach(self, layers: Mapping[str, LayerCost]) -> list[str]:
        """Names of the layers that the backward pass may come to, in the order of ``layers``.

        Args:
            layers: every layer, in the order of calls.
        """
        return list(layers)

    def order(self, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        """Permutation of the pool's channels, layer after layer as in ``sizes``: the order of trying them.

        Channels that it leaves out are not tried.
        """
        return torch.randperm(sum(sizes.values()), generator=generator)

    def observe(  # noqa: B027 - most schemes have nothing to note
        self, layer: str, count: int, channels: torch.Tensor, norms: torch.Tensor
    ) -> None:
        """Take note of gradients since the last draw, before the next one.

        Args:
            layer: its name.
            count: how many channels it has.
            channels: ``(k,)``, those that trained.
            norms: ``(k,)``, the mean norm of each one's gradient over the steps.
        """

    def measure(  # noqa: B027
        self, norms: Mapping[str, torch.Tensor], layers: Mapping[str, LayerCost]
    ) -> None:
        """Take note of every channel's gradient, right before a draw.

        Args:
            norms: ``{layer name: (C,)}`` of every sparse layer, as ``channel_norms`` returns them.
            layers: what one channel of each costs.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the next orders depend on, beside the generator."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what :meth:`state_dict` gave."""
