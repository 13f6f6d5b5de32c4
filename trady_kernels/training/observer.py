"""Who is told how a training goes: progress displays, studies."""

from __future__ import annotations

from torch import nn

from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.results import EpochFigures, SchemeResult


class Observer:
    """Is told how a training goes; does nothing with it."""

    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        """Training of ``scheme`` starts, or goes on after the epochs that ``result`` has."""

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        """An epoch's channels are chosen, and about to train.

        Args:
            regime: whose ``model`` has them.
            batches: gives a few training batches.
        """

    def on_gradients(self, model: nn.Module) -> None:
        """A step's gradients are complete, and about to move the weights."""

    def on_step(self, loss: float, accuracy: float) -> None:
        """A step is done; means over the epoch so far."""

    def on_epoch(self, figures: EpochFigures) -> None:
        """An epoch is done and its checkpoint is on the disk."""
