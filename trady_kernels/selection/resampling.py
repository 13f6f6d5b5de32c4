"""When channels are drawn again: every so many epochs or steps, or once their gradients have shrunk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Steps over which a gradient norm is averaged: one batch says little.
WINDOW = 5
_PATTERN = re.compile(r"(?P<epochs>\d+) epochs?|(?P<steps>\d+) steps?|norm (?P<share>\d+(\.\d+)?)%")


@dataclass(frozen=True)
class Resampling:
    """A rule for when to draw.

    Attributes:
        kind: ``epoch``, every ``amount`` times that the training loop says so; ``steps``, every ``amount`` steps; ``norm``,
            once the norm of the selected channels' gradient is under ``amount`` times that of the first steps after the
            draw, each the mean of five steps.
        amount: epochs, steps, or the share as a fraction.
    """

    kind: Literal["epoch", "steps", "norm"] = "epoch"
    amount: float = 1

    @classmethod
    def parse(cls, rule: str) -> Resampling:
        """The rule that a user means: ``"epoch"``, ``"2 epochs"``, ``"50 steps"`` or ``"norm 60%"``.

        Raises:
            ValueError: it reads as none of these, or the number is not above 0 (a share not below 100%).
        """
        if rule == "epoch":
            return cls()
        match = _PATTERN.fullmatch(rule) if isinstance(rule, str) else None
        if match is not None and match["epochs"] and int(match["epochs"]) > 0:
            return cls("epoch", int(match["epochs"]))
        if match is not None and match["steps"] and int(match["steps"]) > 0:
            return cls("steps", int(match["steps"]))
        if match is not None and match["share"] and 0 < float(match["share"]) < 100:
            return cls("norm", float(match["share"]) / 100)
        raise ValueError(f'resampling: got {rule!r}, expected "epoch", "2 epochs", "50 steps" or "norm 60%"')

    def __str__(self) -> str:
        if self.kind == "steps":
            return f"{self.amount:g} steps"
        if self.kind == "epoch":
            return "epoch" if self.amount == 1 else f"{self.amount:g} epochs"
        return f"norm {100 * self.amount:g}%"


@dataclass
class SinceDraw:
    """What a rule looks at: the epochs and steps since the last draw.

    Attributes:
        epochs, steps: how many; steps whose norm was noted and not finite do not count.
        first, last: norms of the selected channels' gradient, of the first and the latest steps, up to five each.
    """

    epochs: int = 0
    steps: int = 0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def count(self) -> None:
        """Another step is done."""
        self.steps += 1

    def note(self, norm: float) -> None:
        """Another step is done, at which the gradient had that norm; one that is not finite says nothing."""
        if not math.isfinite(norm):
            return
        self.count()
        if len(self.first) < WINDOW:
            self.first.append(norm)
        self.last = [*self.last, norm][-WINDOW:]

    def is_due(self, rule: Resampling) -> bool:
        """Whether the rule asks for a draw now."""
        if rule.kind == "epoch":
            return self.epochs >= rule.amount
        if rule.kind == "steps":
            return self.steps >= rule.amount
        if self.steps < 2 * WINDOW:
            return False
        return math.fsum(self.last) < rule.amount * math.fsum(self.first)

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "first": list(self.first),
            "last": list(self.last),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.epochs = int(state_dict.get("epochs", 0))  # version 2 had none at first
        self.steps = int(state_dict["steps"])
        self.first, self.last = (list(map(float, state_dict[key])) for key in ("first", "last"))
