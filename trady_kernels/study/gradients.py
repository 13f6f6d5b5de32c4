"""Whole gradients of full fine-tuning, looked at step by step: what the studies of tails, ranks and channels rest on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from trady_kernels.models.loading import classifier_name
from trady_kernels.selection.channel_norms import by_channel, layers_of
from trady_kernels.study.cells import CellFile, Listed, NothingFinished
from trady_kernels.study.results import RECIPES, Request, Size, study_recipes
from trady_kernels.study.statistics import significant
from trady_kernels.study.tail_index import TailIndex
from trady_kernels.study.trainings import load_samples
from trady_kernels.training.loop import Diverged, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.settings import Settings

#: Samples in a sum of the tail index; the first one's is what the tables show, the others tell how much it matters.
BLOCKS = (16, 256)
#: Bins of the logarithm of a gradient element's magnitude: two an octave, from 2^-40 to 2^10.
OCTAVES, BINS_PER_OCTAVE = (-40, 10), 2


@dataclass(frozen=True)
class Look:
    """One run of full fine-tuning.

    Attributes:
        task: name of its recipe.
        seed: of the run.
    """

    task: str
    seed: int

    def words(self, outcome: Gradients) -> str:
        """The run and its outcome in a line."""
        result = "diverged" if outcome.diverged else f"test {outcome.top1:.1%}"
        return f"{self.task}, seed {self.seed}: {result}"


@dataclass(frozen=True)
class Gradients:
    """What the gradients of a run were like. Layers are those that channels can be selected in.

    Attributes:
        top1: accuracy after the last epoch.
        alphas: by the number of samples in a sum, of every epoch: tail index of the elements of all gradients.
        layer_alphas: by layer, of every epoch, the same for its weight alone, with the first of ``BLOCKS``; None where
            there is no finite one.
        steps: those after which norms were noted: powers of two, and the last one of every epoch.
        layer_norms: by layer, after each of them: the norms of its gradients so far, added up.
        channel_norms: by layer, of every input channel: the norms of its gradients, added up over the run.
        histograms: by layer, how many elements of its gradients are in each bin of ``OCTAVES``; zeros are in none.
        elements: by layer, how many there were, zeros too.
        deviations: by layer, root of their mean square.
        diverged: whether the loss became infinite or NaN; everything else is empty then.
        provenance: index of what it was made with in the file's list.
    """

    top1: float
    alphas: Mapping[str, list[float | None]] = field(default_factory=dict)
    layer_alphas: Mapping[str, list[float | None]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    layer_norms: Mapping[str, list[float]] = field(default_factory=dict)
    channel_norms: Mapping[str, list[float]] = field(default_factory=dict)
    histograms: Mapping[str, list[int]] = field(default_factory=dict)
    elements: Mapping[str, int] = field(default_factory=dict)
    deviations: Mapping[str, float] = field(default_factory=dict)
    diverged: bool = False
    provenance: int = 0


Looks = CellFile[Look, Gradients]


def finished(looks: Looks) -> dict[Look, Gradients]:
    """The runs that did not diverge.

    Raises:
        NothingFinished: there is none.
    """
    found = {cell: looks[cell] for cell in looks if not looks[cell].diverged}
    if not found:
        raise NothingFinished(f"cells: {looks.path} has no finished run, expected some")
    return found


def by_task(looks: Looks) -> dict[str, list[Gradients]]:
    """The finished runs of each task that has any, in the order of the file's recipes, and then of seeds.

    Raises:
        NothingFinished: no task has.
    """
    found = finished(looks)
    runs = {task: [run for cell, run in found.items() if cell.task == task] for task in looks.recipes}
    return {task: of_task for task, of_task in runs.items() if of_task}


_SIZES: Mapping[str, Size] = {
    "quick": Size(2, {"train_samples": 128, "test_samples": 100, "epochs": 2}),
    "usual": Size(3, {"epochs": 3}),
    "full": Size(3, {"train_samples": None, "test_samples": None, "epochs": 10, "warmup_epochs": 1}),
}


def gradient_plan(request: Request) -> Listed[Look, Gradients]:
    """The runs of full fine-tuning that the studies of gradients look at.

    Raises:
        ValueError: no such size or task.
    """
    usual = ("fashion-mnist", "digits") if request.size == "quick" else RECIPES
    recipes = study_recipes(request, usual, _SIZES)
    return plan_of(recipes, _SIZES[request.size].seeds)


def plan_of(recipes: Mapping[str, Settings], seeds: int) -> Listed[Look, Gradients]:
    """Runs on every task, the first seed of all tasks first."""
    cells = (Look(task, seed) for seed in range(seeds) for task in recipes)
    return Listed(recipes, tuple(cells), (Look, Gradients), look, Look.words)


def look(cell: Look, recipe: Settings) -> Gradients:
    """Fine-tune the whole network and look at every step's gradients; a run that diverges has an outcome too.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    settings = replace(recipe, schemes=("full",), seed=cell.seed)
    torch.set_num_threads(settings.threads)
    data = load_samples(cell.task, recipe, held_out=False)
    looking = _Looking(len(data.classes), cell.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_scheme("full", settings, data, Path(folder, "checkpoint.pt"), looking)
        except Diverged:
            return Gradients(0.0, diverged=True)
    return looking.found(result.top1)


class _Looking(Observer):
    """Reduces every step's gradients to a few numbers; no two steps' are held at once."""

    def __init__(self, classes: int, seed: int) -> None:
        self._classes = classes
        self._generator = torch.Generator().manual_seed(seed)
        self._orders: dict[str, torch.Tensor] = {}
        self._step = self._steps_per_epoch = 0
        self._noted: list[int] = []
        self._epoch_alphas: dict[str, TailIndex] = {}
        self._epoch_all = [TailIndex(block) for block in BLOCKS]
        self._alphas: dict[str, list[float | None]] = {str(block): [] for block in BLOCKS}
        self._layer_alphas: dict[str, list[float | None]] = {}
        self._sums: dict[str, torch.Tensor] = {}  # of channels
        self._layer_sums: dict[str, float] = {}
        self._layer_norms: dict[str, list[float]] = {}
        self._bins: dict[str, torch.Tensor] = {}
        self._squares: dict[str, float] = {}
        self._elements: dict[str, int] = {}

    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch

    def on_gradients(self, model: nn.Module) -> None:
        self._step += 1
        head = classifier_name(model, self._classes)
        layers = {name: layer for name, layer in layers_of(model).items() if name != head}
        weights = {id(layer.weight): name for name, layer in layers.items()}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().cpu()
            # Neighbours in memory depend on each other; in an order of chance they hardly do.
            samples = gradient.flatten()[self._order(name, gradient.numel())]
            for index in self._epoch_all:
                index.add(samples)
            if (layer := weights.get(id(parameter))) is not None:
                self._note(layer, layers[layer], gradient, samples)
        if self._step & (self._step - 1) == 0 or self._step % self._steps_per_epoch == 0:
            self._noted.append(self._step)
            for name, norm in self._layer_sums.items():
                self._layer_norms.setdefault(name, []).append(norm)

    def _order(self, name: str, count: int) -> torch.Tensor:
        if name not in self._orders:
            self._orders[name] = torch.randperm(count, generator=self._generator)
        return self._orders[name]

    def _note(self, name: str, layer: nn.Module, gradient: torch.Tensor, samples: torch.Tensor) -> None:
        self._epoch_alphas.setdefault(name, TailIndex(BLOCKS[0])).add(samples)
        norms = torch.linalg.vector_norm(by_channel(gradient, layer).double(), dim=1)
        self._sums[name] = self._sums.get(name, torch.zeros_like(norms)) + norms
        self._layer_sums[name] = self._layer_sums.get(name, 0.0) + float(torch.linalg.vector_norm(norms))
        self._squares[name] = self._squares.get(name, 0.0) + float(norms.square().sum())
        self._elements[name] = self._elements.get(name, 0) + samples.numel()
        low, high = OCTAVES
        places = (samples[samples != 0].abs().log2().clamp(low, high - 2**-10) - low) * BINS_PER_OCTAVE
        counts = torch.bincount(places.long(), minlength=(high - low) * BINS_PER_OCTAVE)
        self._bins[name] = self._bins.get(name, torch.zeros_like(counts)) + counts

    def on_epoch(self, figures: EpochFigures) -> None:
        for index in self._epoch_all:
            self._alphas[str(index.block)].append(_finite(index.alpha))
        for name, index in self._epoch_alphas.items():
            self._layer_alphas.setdefault(name, []).append(_finite(index.alpha))
        self._epoch_all = [TailIndex(block) for block in BLOCKS]
        self._epoch_alphas = {}

    def found(self, top1: float) -> Gradients:
        """Everything, as plain values."""
        return Gradients(
            top1,
            self._alphas,
            self._layer_alphas,
            self._noted,
            {name: [significant(norm, 5) for norm in norms] for name, norms in self._layer_norms.items()},
            {name: [significant(norm, 3) for norm in norms.tolist()] for name, norms in self._sums.items()},
            {name: counts.tolist() for name, counts in self._bins.items()},
            self._elements,
            {
                name: significant(math.sqrt(total / self._elements[name]), 5)
                for name, total in self._squares.items()
            },
        )


def _finite(alpha: float) -> float | None:
    return significant(alpha, 5) if math.isfinite(alpha) else None
