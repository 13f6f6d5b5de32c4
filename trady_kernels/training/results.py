"""What a run yields: figures of every epoch and one row of the results table for each scheme."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpochFigures:
    """One epoch of one scheme.

    Args:
        epoch: counted from 1.
        train_loss: mean cross entropy over the epoch's steps.
        train_accuracy: share of the training samples classified right, while the weights moved.
        test_loss: mean cross entropy over the test samples, after the epoch; None where they were not looked at.
        top1: share of the test samples classified right, after the epoch; None where they were not looked at.
        cost: elements of one sample that the epoch's channels took of the budget; of several draws the dearest.
        weight_share, activation_share: elements of weight gradients, and of stored inputs, over those of all channels;
            of that draw.
        gradient_share: multiply-accumulates of the computed weight gradients over those of all of them, the
            classifier's apart; of that draw.
        saved_bytes: bytes that a training step kept for its backward pass, measured on the first batch.
        gradient_bytes: bytes of the gradients of a step, the epoch's dearest.
        optimizer_bytes: bytes of the optimiser's state after the epoch.
        step_ms: median milliseconds of a training step, batch preparation included.
        seconds: wall-clock time of the epoch, evaluation included.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    top1: float | None
    cost: int
    weight_share: float
    activation_share: float
    gradient_share: float
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    step_ms: float
    seconds: float


@dataclass
class SchemeResult:
    """One row of the results table.

    Args:
        scheme: name of the channel selection scheme, and of its ingredients.
        weights: where the network's first weights came from.
        learning_rate: peak of the cosine schedule.
        full_cost: elements of one sample that all channels of all layers take.
        dense_saved_bytes: bytes that a step of full fine-tuning of the same network kept for its backward pass.
        notes: what a reader of the row must know.
        epochs: figures of the epochs so far.
    """

    scheme: str
    weights: str
    learning_rate: float
    full_cost: int
    dense_saved_bytes: int
    notes: list[str] = field(default_factory=list)
    epochs: list[EpochFigures] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Top-1 accuracy after the last epoch (never the best one: that would choose on the test set).

        Raises:
            ValueError: the test images were not looked at after it.
        """
        if (top1 := self.epochs[-1].top1) is None:
            raise ValueError(f"top1: got {len(self.epochs)} epochs, expected a run to its end")
        return top1

    @property
    def cost(self) -> int:
        """The dearest epoch's elements of one sample."""
        return max(epoch.cost for epoch in self.epochs)

    @property
    def gradient_share(self) -> float:
        """The dearest epoch's share of the multiply-accumulates of all weight gradients."""
        return max(epoch.gradient_share for epoch in self.epochs)

    @property
    def saved_bytes(self) -> int:
        """The dearest epoch's bytes kept for backward."""
        return max(epoch.saved_bytes for epoch in self.epochs)

    @property
    def gradient_bytes(self) -> int:
        """The dearest epoch's bytes of gradients."""
        return max(epoch.gradient_bytes for epoch in self.epochs)

    @property
    def optimizer_bytes(self) -> int:
        """The dearest epoch's bytes of the optimiser's state."""
        return max(epoch.optimizer_bytes for epoch in self.epochs)

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the median over the epochs of their medians."""
        ordered = sorted(epoch.step_ms for epoch in self.epochs)
        return ordered[len(ordered) // 2]

    def to_json(self) -> dict[str, Any]:
        """The row's figures, and those of every epoch, as plain values."""
        content = dataclasses.asdict(self)
        if self.epochs:
            summary = (
                "cost",
                "gradient_share",
                "saved_bytes",
                "gradient_bytes",
                "optimizer_bytes",
                "step_ms",
            )
            content |= {name: getattr(self, name) for name in summary}
            content["top1"] = self.epochs[-1].top1
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SchemeResult:
        """The result that :meth:`to_json` gave."""
        known = {name.name: content[name.name] for name in dataclasses.fields(cls)}
        return cls(**{**known, "epochs": [EpochFigures(**figures) for figures in content["epochs"]]})
