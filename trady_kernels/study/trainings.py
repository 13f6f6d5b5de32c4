"""Training runs as cells of a study: what names one, what is kept of it, and how it is run."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trady_kernels.data import CLASSES, DataSet
from trady_kernels.study.cells import CellFile, Listed
from trady_kernels.study.markdown import spread
from trady_kernels.training.loop import Diverged, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.results import SchemeResult
from trady_kernels.training.run import load_task
from trady_kernels.training.settings import Settings

#: Share of the samples to train on that is held out for choosing learning rates.
HELD_OUT_SHARE = 0.2
#: Of every epoch, what is kept.
_CURVES = ("train_loss", "cost", "weight_share", "activation_share", "gradient_share", "saved_bytes")


def rule_words(rule: str) -> str:
    """When channels are drawn again, as it is read."""
    return "1 step" if rule == "1 steps" else rule


@dataclass(frozen=True)
class Training:
    """One training run of an experiment.

    Attributes:
        task: name of its recipe.
        scheme: how channels are chosen.
        budget: as ``ChannelSampler`` takes it; "" for the schemes without one.
        learning_rate: peak.
        seed: of the run.
        held_out: whether samples held out from those to train on take the place of the test samples: a trial that
            chooses settings.
        resampling: when channels are drawn again, as ``ChannelSampler`` takes it.
        pool: layers that take part, as ``ChannelSampler`` takes it; "" for the scheme's own choice.
    """

    task: str
    scheme: str
    budget: str
    learning_rate: float
    seed: int
    held_out: bool
    resampling: str = "epoch"
    pool: str = ""

    def settings(self, recipe: Settings) -> Settings:
        """Settings of the run: the task's ``recipe`` with what is this cell's own."""
        return dataclasses.replace(
            recipe,
            schemes=(self.scheme,),
            budget=self.budget or recipe.budget,
            learning_rate=self.learning_rate,
            seed=self.seed,
            resampling=self.resampling,
            pool=self.pool or None,
            validation_share=HELD_OUT_SHARE if self.held_out else 0.0,
        )

    def words(self, outcome: TrainingOutcome) -> str:
        """The run and its outcome in a line."""
        on = "held-out" if self.held_out else "test"
        result = "diverged" if outcome.diverged else f"{on} {outcome.top1:.1%}"
        budget = f" at {self.budget}" if self.budget else ""
        drawn = "" if self.resampling == "epoch" else f", drawn every {rule_words(self.resampling)}"
        pool = f", {self.pool}" if self.pool else ""
        return f"{self.task}, {self.scheme}{budget}{pool}, rate {self.learning_rate:g}{drawn}, seed {self.seed}: {result}"


@dataclass(frozen=True)
class TrainingOutcome:
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
    def of(cls, result: SchemeResult) -> TrainingOutcome:
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


#: Runs of one kind, by task and seed.
Series = dict[tuple[str, int], TrainingOutcome]


def accuracies(series: Series) -> dict[tuple[str, int], float]:
    """In percent."""
    return {key: 100 * outcome.top1 for key, outcome in series.items()}


#: A run whose last epoch's training loss is not under that share of the loss of equal guesses has learned nothing.
CHANCE = 0.99


def at_chance(outcome: TrainingOutcome, recipe: Settings) -> bool:
    """Whether a run that did not diverge ended at ``CHANCE``; not known of data sets that go by no name."""
    losses = outcome.curves.get("train_loss")
    if not losses or recipe.data not in CLASSES:
        return False
    return losses[-1] >= CHANCE * math.log(len(CLASSES[recipe.data]))


def top1_words(outcomes: Sequence[TrainingOutcome]) -> str:
    """Mean and standard deviation of the accuracies in percent, and how many runs diverged, which count as 0."""
    diverged = sum(outcome.diverged for outcome in outcomes)
    return spread([100 * o.top1 for o in outcomes]) + (f" ({diverged} diverged)" if diverged else "")


def train(cell: Training, recipe: Settings) -> TrainingOutcome:
    """Run one training; one that diverges has an outcome too.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    settings = cell.settings(recipe)
    torch.set_num_threads(settings.threads)
    data = load_samples(cell.task, recipe, cell.held_out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_scheme(cell.scheme, settings, data, Path(folder, "checkpoint.pt"), Observer())
        except Diverged as error:
            return TrainingOutcome(top1=0.0, diverged=True, notes=[str(error)])
    return TrainingOutcome.of(result)


def load_samples(task: str, recipe: Settings, held_out: bool) -> DataSet:
    """A task's samples, which depend on it and on whether some are held out alone; kept for the next run."""
    return _load(Training(task, "trady", "", 1.0, 0, held_out).settings(recipe))


_load = functools.lru_cache(maxsize=4)(load_task)


Trainings = CellFile[Training, TrainingOutcome]


#: Classes of the cells and their outcomes.
KINDS = (Training, TrainingOutcome)


def listed(recipes: Mapping[str, Settings], cells: Iterable[Training]) -> Listed[Training, TrainingOutcome]:
    """The plan of a study whose trainings are known from the start.

    Args:
        recipes: settings of each task.
        cells: the trainings, in the order of importance; the same one counts once.
    """
    return Listed(recipes, tuple(dict.fromkeys(cells)), KINDS, train, Training.words)
