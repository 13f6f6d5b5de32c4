"""A search for layer fractions: what each layer adds when it trains alone, and the best of it inside a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.batch import Example, call
from trady_kernels.convert import sparse_layers, sparsify, trainable_parameters
from trady_kernels.cost import Budget, LayerCost, measure_layers, total
from trady_kernels.data import DataSet, Samples
from trady_kernels.data.samples import stratified_subset
from trady_kernels.models.loading import LoadedModel, Sizes, classifier_name, load_model
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.selection.layer_fractions import FRACTIONS, LayerFractions, choose_fractions

_EVALUATION_BATCH = 256
_MEMORY_FORMAT = torch.channels_last


@dataclass(frozen=True)
class Candidate:
    """The first channels of one layer, that fit the budget alone.

    Attributes:
        layer: its name.
        fraction: of its channels.
        channels: how many that are.
    """

    layer: str
    fraction: float
    channels: int


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        fractions: the layers' fractions, inside the budget.
        contributions: ``{layer name: {fraction: gain}}``: how much lower the validation loss was than that of the
            head alone.
        elements: that the fractions cost.
    """

    fractions: LayerFractions
    contributions: dict[str, dict[float, float]]
    elements: int


def candidates_of(layers: dict[str, LayerCost], budget: Budget) -> list[Candidate]:
    """Every layer with every fraction of it that trains a channel and fits the budget alone."""
    limit = budget.limit(total(layer.full for layer in layers.values()))
    found = []
    for name, layer in layers.items():
        counts = {math.floor(fraction * layer.channels): fraction for fraction in reversed(FRACTIONS)}
        for count, fraction in sorted(counts.items()):
            if count and budget.of(layer.channel * count) <= limit:
                found.append(Candidate(name, fraction, count))
    return found


def search_fractions(
    model: str,
    data: DataSet,
    *,
    budget: int | str,
    steps: int,
    head_steps: int,
    batch_size: int,
    validation_samples: int,
    learning_rate: float,
    seed: int,
    device: str,
    sizes: Sizes | None = None,
    on_count: Callable[[int], None],
    on_candidate: Callable[[], None],
) -> Found:
    """Measure what each layer contributes alone and choose fractions greedily by contribution per cost.

    The head trains first. From there each candidate, the first r*C channels of one layer, trains with the head for
    the same few steps on the same samples. Its contribution is how much lower the loss on validation samples is than
    that of the head alone after these steps. The loss, and not the accuracy: on some hundred samples the accuracy
    moves in steps as large as what most layers add.

    Args:
        model: as :func:`trady_kernels.models.loading.load_model` takes it.
        data: what to train on; the validation samples are its test samples.
        budget: as ``ChannelSampler`` takes it, with a batch of ``batch_size``.
        steps: of plain SGD, for each candidate.
        head_steps: of the head alone, before.
        batch_size: samples in a step.
        validation_samples: of ``data.test``, as many of each class as it has a share of; all where it has fewer.
        learning_rate: of the first of these steps, falling to zero along a line, for the head too.
        seed: of the classifier's first values and the order of the samples.
        device: where to run.
        sizes: of the network's input.
        on_count: is told how many candidates there are.
        on_candidate: called after each one.

    Raises:
        ValueError: an argument is out of range, the head alone diverged, or no channel fits the budget.

    Source: after Lin et al., arXiv 2206.15472, section 3.2, which searches by evolution over contributions in
    accuracy.
    """
    for name, number in (
        ("steps", steps), ("head_steps", head_steps), ("batch_size", batch_size),
        ("validation_samples", validation_samples),
    ):  # fmt: skip
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: got {learning_rate}, expected a finite number above 0")
    classes = len(data.test.labels.unique())
    if validation_samples < classes:
        raise ValueError(
            f"validation_samples: got {validation_samples}, expected at least {classes}, one of each class"
        )
    parsed = Budget.parse(budget)
    loaded = load_model(model, len(data.classes), seed=seed, sizes=sizes)
    data = loaded.prepare(data)
    trial = _Trial(loaded, data, batch_size, seed, device)
    candidates = candidates_of(trial.costs, parsed)
    if not candidates:
        raise ValueError(f"budget: got {parsed}, expected one that some layer's first channels fit")
    on_count(len(candidates) + 1)
    trial.train(None, trial.samples(0, head_steps), learning_rate)
    batches = trial.samples(head_steps, steps)
    count = min(validation_samples, len(data.test))
    some = stratified_subset(data.test.labels, count, torch.Generator().manual_seed(seed))
    validation = data.test.subset(some)
    floor = trial.loss_after(None, batches, validation, learning_rate)
    if not math.isfinite(floor):
        raise ValueError(
            f"learning_rate: with {learning_rate:g} the head's loss became {floor}, expected a finite number; give a lower one"
        )
    on_candidate()
    contributions: dict[str, dict[float, float]] = {}
    for candidate in candidates:
        loss = trial.loss_after(candidate, batches, validation, learning_rate)
        gain = floor - loss if math.isfinite(loss) else 0.0
        contributions.setdefault(candidate.layer, {})[candidate.fraction] = gain
        on_candidate()
    chosen = choose_fractions(contributions, trial.costs, parsed)
    fractions = LayerFractions(model, budget, chosen, contributions=contributions)
    return Found(fractions, contributions, fractions.cost(trial.costs).elements)


class _Trial:
    """A network that every candidate finds as the head's training left it."""

    def __init__(self, loaded: LoadedModel, data: DataSet, batch_size: int, seed: int, device: str) -> None:
        self._loaded, self._data, self._batch_size, self._device = loaded, data, batch_size, device
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._model: nn.Module = loaded.model.to(device, memory_format=_MEMORY_FORMAT)  # type: ignore[call-overload]
        example, _ = self._batch(data.train, self.samples(0, 1)[0])
        head = classifier_name(self._model, len(data.classes)) or "auto"
        sparsify(self._model, example, head=head)
        # Norms are frozen: what is left of the training mode is dropout, which only makes candidates differ by chance.
        self._model.eval()
        self._layers = sparse_layers(self._model)
        self._head = [
            parameter
            for parameter in trainable_parameters(self._model)
            if not any(parameter is layer.channel_weight for layer in self._layers.values())
        ]
        measured = measure_layers(self._model, example)
        self.costs = {name: measured[name] for name in self._layers if name in measured}

    def samples(self, skipped: int, steps: int) -> list[torch.Tensor]:
        """Indices of the training samples of some steps, counted from the first ones of the run."""
        first, last = skipped * self._batch_size, (skipped + steps) * self._batch_size
        while len(self._order) < last:
            more = torch.randperm(len(self._data.train), generator=self._generator)
            self._order = torch.cat([self._order, more])
        return list(self._order[first:last].split(self._batch_size))

    def loss_after(
        self,
        candidate: Candidate | None,
        batches: list[torch.Tensor],
        validation: Samples,
        learning_rate: float,
    ) -> float:
        """The validation loss after training a candidate, which leaves no trace."""
        layer = None if candidate is None else self._layers[candidate.layer]
        moved: list[torch.Tensor] = [*self._head, *([] if layer is None else [layer.weight])]
        kept = [tensor.detach().clone() for tensor in moved]
        if layer is not None and candidate is not None:
            layer.select(torch.arange(candidate.channels))
        self.train(layer, batches, learning_rate)
        loss = self._loss(validation)
        with torch.no_grad():
            for tensor, value in zip(moved, kept, strict=True):
                tensor.copy_(value)
        if layer is not None:
            layer.select(0)
        return loss

    def train(self, layer: SparseChannels | None, batches: list[torch.Tensor], learning_rate: float) -> None:
        """Some steps of SGD on the head, and on the selected channels of a layer, at a rate that falls to zero.

        At a constant rate the loss after the last step says more about that step's samples than about the layer.
        """
        rows = [] if layer is None else [layer.channel_weight]
        optimizer = torch.optim.SGD([*self._head, *rows], learning_rate)
        for step, indices in enumerate(batches):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(batches))
            batch, labels = self._batch(self._data.train, indices)
            loss = F.cross_entropy(call(self._model, batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _loss(self, validation: Samples) -> float:
        loss = 0.0
        for indices in torch.arange(len(validation)).split(_EVALUATION_BATCH):
            batch, labels = self._batch(validation, indices)
            loss += F.cross_entropy(call(self._model, batch), labels, reduction="sum").item()
        return loss / len(validation)

    def _batch(self, samples: Samples, indices: torch.Tensor) -> tuple[Example, torch.Tensor]:
        part = samples.subset(indices)
        return self._loaded.front.input(part, self._device), part.labels.to(self._device)
