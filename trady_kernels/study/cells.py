"""Cells of an experiment: one training run each, in one file that an interrupted study goes on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_json
from trady_kernels.training.results import SchemeResult
from trady_kernels.training.settings import Settings

_FORMAT = "trady-study-cells"
_VERSION = 2
#: Share of the samples to train on that is held out for choosing learning rates.
HELD_OUT_SHARE = 0.2
#: Of every epoch, what is kept.
_CURVES = ("train_loss", "cost", "weight_share", "activation_share", "gradient_share", "saved_bytes")


@dataclass(frozen=True)
class Cell:
    """One training run of an experiment.

    Attributes:
        task: name of its recipe.
        scheme: how channels are chosen.
        budget: as ``ChannelSampler`` takes it; "" for the schemes without one.
        learning_rate: peak.
        seed: of the run.
        held_out: whether samples held out from those to train on take the place of the test samples: a trial that
            chooses settings.
    """

    task: str
    scheme: str
    budget: str
    learning_rate: float
    seed: int
    held_out: bool

    def settings(self, recipe: Settings) -> Settings:
        """Settings of the run: the task's ``recipe`` with what is this cell's own."""
        return dataclasses.replace(
            recipe,
            schemes=(self.scheme,),
            budget=self.budget or recipe.budget,
            learning_rate=self.learning_rate,
            seed=self.seed,
            validation_share=HELD_OUT_SHARE if self.held_out else 0.0,
        )


@dataclass(frozen=True)
class Outcome:
    """What a cell's run yielded.

    Attributes:
        top1: accuracy after the last epoch; 0 where the training diverged.
        diverged: whether the loss became infinite or NaN.
        saved_bytes, dense_saved_bytes: kept for backward in a step, measured: the dearest epoch's, and full fine-tuning's.
        gradient_bytes, optimizer_bytes: of gradients, and of the optimiser's state, the dearest epoch's.
        cost, full_cost: elements of one sample: the dearest epoch's, and of all channels.
        gradient_share: multiply-accumulates of weight gradients, the dearest epoch's, over all of them.
        step_ms: median of a training step, on a machine that may have been busy.
        seconds: of the run.
        curves: of every epoch: train_loss, cost, weight_share, activation_share, gradient_share, saved_bytes.
        notes: what a reader must know.
        provenance: index of what it was made with in the file's list.
    """

    top1: float
    diverged: bool = False
    saved_bytes: int = 0
    dense_saved_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    cost: int = 0
    full_cost: int = 0
    gradient_share: float = 0.0
    step_ms: float = 0.0
    seconds: float = 0.0
    curves: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    provenance: int = 0

    @property
    def training_bytes(self) -> int:
        """What a training step needs beside the weights: saved for backward, gradients, optimiser state."""
        return self.saved_bytes + self.gradient_bytes + self.optimizer_bytes

    @classmethod
    def of(cls, result: SchemeResult) -> Outcome:
        """The outcome of a finished run."""
        return cls(
            top1=result.top1,
            saved_bytes=result.saved_bytes,
            dense_saved_bytes=result.dense_saved_bytes,
            gradient_bytes=result.gradient_bytes,
            optimizer_bytes=result.optimizer_bytes,
            cost=result.cost,
            full_cost=result.full_cost,
            gradient_share=result.gradient_share,
            step_ms=round(result.step_ms, 2),
            seconds=round(sum(epoch.seconds for epoch in result.epochs), 2),
            curves={name: [round(getattr(e, name), 6) for e in result.epochs] for name in _CURVES},
            notes=list(result.notes),
        )


class CellFile:
    """The outcomes of an experiment's cells, on the disk after each one.

    Args:
        path: JSON file; made by the first :meth:`add`.
        recipes: settings of each task, which those in the file must equal.

    Raises:
        ValueError: the file is damaged, of another version, or has a task of other settings.
    """

    def __init__(self, path: Path, recipes: Mapping[str, Settings]) -> None:
        self.path = path
        self.recipes = {name: _without_own(recipe) for name, recipe in recipes.items()}
        self.provenance: list[dict[str, Any]] = []
        self._outcomes: dict[Cell, Outcome] = {}
        if path.exists():
            self._read(_content(path))

    @classmethod
    def load(cls, path: Path) -> CellFile:
        """The file with whatever tasks it has.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another version.
        """
        if not path.exists():
            raise FileNotFoundError(f"cells: {path} does not exist, expected a file that a study wrote")
        recipes = _content(path)["recipes"]
        return cls(path, {name: Settings.from_json(recipe) for name, recipe in recipes.items()})

    def _read(self, content: dict[str, Any]) -> None:
        for name, recipe in content["recipes"].items():
            theirs = Settings.from_json(recipe)
            if (differing := self.recipes.setdefault(name, theirs).difference(theirs)) is not None:
                raise ValueError(
                    f"cells: {self.path} has {name} with {differing} {getattr(theirs, differing)!r}, expected "
                    f"{getattr(self.recipes[name], differing)!r}; give another file, or the settings that it was started with"
                )
        self.provenance = content["provenance"]
        self._outcomes = {Cell(**row["cell"]): Outcome(**row["outcome"]) for row in content["cells"]}

    def _sorted(self) -> list[Cell]:
        return sorted(self._outcomes, key=dataclasses.astuple)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._outcomes

    def __getitem__(self, cell: Cell) -> Outcome:
        return self._outcomes[cell]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._sorted())

    def __len__(self) -> int:
        return len(self._outcomes)

    def begin(self, provenance: dict[str, Any]) -> None:
        """Cells from now on are made with this."""
        self.provenance.append(provenance)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep an outcome; the file is the old one or the new one, whenever the process dies."""
        self._outcomes[cell] = outcome
        rows = [
            {"cell": dataclasses.asdict(cell), "outcome": dataclasses.asdict(self._outcomes[cell])}
            for cell in self._sorted()
        ]
        write_json(
            self.path,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "recipes": {name: recipe.to_json() for name, recipe in self.recipes.items()},
                "provenance": self.provenance,
                "cells": rows,
            },
        )


def _without_own(recipe: Settings) -> Settings:
    """A recipe with what each cell has of its own at fixed values."""
    return dataclasses.replace(recipe, schemes=("trady",), learning_rate=None, seed=0, validation_share=0.0)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
        if (content["format"], content["version"]) == (_FORMAT, _VERSION):
            return content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cells: {path} is damaged ({error}); give another file") from error
    raise ValueError(f"cells: {path} was not written by this version of trady study; give another file")
