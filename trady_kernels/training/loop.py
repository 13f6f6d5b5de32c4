"""The fine-tuning loop: one scheme, from the pretrained network to the last epoch's checkpoint."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.atomic_write import save_checkpoint
from trady_kernels.batch import Example, call, tensors_in
from trady_kernels.data import DataSet, Samples
from trady_kernels.memory import measure_memory
from trady_kernels.models.loading import LoadedModel, Sizes, classifier_name, load_model, read_checkpoint
from trady_kernels.selection import NotFinite
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime, Start, prepare_dense
from trady_kernels.training.regimes import prepare_regime
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.settings import Settings, plain

#: Samples evaluated at a time: no gradient is kept, so more than in a training step fit.
_EVALUATION_BATCH = 250
#: Of the weights; that of images is their front's.
_MEMORY_FORMAT = torch.channels_last
#: Batches that schemes measure on which draw by gradients or outputs: the first of the first epoch, always the same, so
#: that a resumed run measures as the whole one does.
MEASURED_BATCHES = 4


class Diverged(RuntimeError):
    """A loss or a gradient is no longer a finite number."""


@dataclass(frozen=True)
class _Input:
    """Turns samples of a prepared data set into batches for one network."""

    loaded: LoadedModel
    device: torch.device

    def __call__(self, samples: Samples, indices: torch.Tensor) -> tuple[Example, torch.Tensor]:
        part = samples.subset(indices)
        return self.loaded.front.input(part, self.device), part.labels.to(self.device)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then a half cosine to 0 (TraDy, section 4: cosine with warm-up).

    Args:
        step: counted from 0.
        total_steps: of the whole run.
        warmup_steps: of them, in which the factor rises.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)))


@dataclass(frozen=True)
class Prepared:
    """Everything that a scheme's training starts from.

    Attributes:
        regime: the network, ready for the scheme, its first channels chosen.
        data: what to train and test on, ready for the network.
        to_input: makes batches of it.
        batches: gives a few training batches.
        result: the scheme's row of the results table, still without an epoch.
        at_once: samples that go forward and backward at a time.
        momentum: of SGD.
    """

    regime: Regime
    data: DataSet
    to_input: _Input
    batches: Batches
    result: SchemeResult
    at_once: int
    momentum: float

    def optimizer(self, learning_rate: float) -> torch.optim.SGD:
        """A fresh one for what trains."""
        return torch.optim.SGD(self.regime.parameters(), lr=learning_rate, momentum=self.momentum)

    def gradients(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give what trains the gradient of a batch of training samples.

        Returns:
            Mean loss, and how many samples were classified rightly.
        """
        mean_loss = hits = torch.zeros((), device=self.to_input.device)
        for part in indices.split(self.at_once):
            input, labels = self.to_input(self.data.train, part)
            output = call(self.regime.model, input)
            loss = F.cross_entropy(output, labels) * (len(part) / len(indices))
            loss.backward()
            mean_loss = mean_loss + loss.detach()
            hits = hits + (output.detach().argmax(1) == labels).sum()
        return mean_loss, hits


def prepare(
    scheme: str, settings: Settings, data: DataSet, saved: Mapping[str, Any] | None = None
) -> Prepared:
    """Load the settings' network and make it ready for a scheme.

    Args:
        scheme, settings, data: as for :func:`train_scheme`.
        saved: a checkpoint to go on from: its weights are what the ingredients had prepared.

    Raises:
        ValueError: no such scheme or ingredient, or a bad budget or ranking.
        ModuleNotFoundError: a library that the scheme needs is not installed.
    """
    spec = Spec.parse(scheme)
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    loaded = load_model(
        settings.model,
        len(data.classes),
        weights=settings.weights,
        seed=settings.seed,
        sizes=sizes_of(settings),
    )
    data = loaded.prepare(data)
    to_input = _Input(loaded, device)
    first_images = _epoch_order(data, settings, epoch=1)
    example = to_input(data.train, first_images[: settings.batch_size])
    model: nn.Module = loaded.model.to(device, memory_format=_MEMORY_FORMAT)  # type: ignore[call-overload]
    _disable_dropout(model)
    dense_saved_bytes = measure_memory(prepare_dense(model), example, F.cross_entropy).saved_bytes
    if saved is not None:
        model.load_state_dict(saved["model"])
    else:
        for ingredient in spec.ingredients:
            if ingredient.prepare is not None:
                ingredient.prepare(model, _whole_batches(data, settings, to_input))

    def batches(number: int = 0) -> Iterator[tuple[Example, torch.Tensor]]:
        count = MEASURED_BATCHES * settings.batch_size
        for part in first_images.roll(-number * count)[:count].split(settings.batch_size):
            yield to_input(data.train, part)

    head = classifier_name(model, len(data.classes))
    regime = prepare_regime(Start(spec, model, example[0], head, settings, batches))
    result = SchemeResult(
        scheme,
        loaded.weights,
        settings.learning_rate_of(scheme),
        regime.full_cost,
        dense_saved_bytes,
        regime.notes,
    )
    at_once = spec.at_once or settings.batch_size
    return Prepared(regime, data, to_input, batches, result, at_once, spec.momentum)


def train_scheme(
    scheme: str,
    settings: Settings,
    data: DataSet,
    checkpoint: Path,
    observer: Observer,
    *,
    resume: bool = False,
) -> SchemeResult:
    """Fine-tune the settings' network with one scheme and write a checkpoint after every epoch.

    The recipe is TraDy's (section 4, scaled to fewer epochs): SGD without weight decay, and without momentum
    but for the ingredient, a cosine learning rate with warm-up, no dropout, the classifier always trained; norm statistics are frozen.

    Args:
        scheme: name of the channel selection scheme, or a baseline, and of ingredients, such as "trady+bias".
        settings: of the run.
        data: what to train and test on; made ready for the network where that was not done yet.
        checkpoint: file that holds the last epoch. Its entry ``"model"`` is a state dict of the plain network.
        observer: is told how it goes.
        resume: go on from ``checkpoint`` where it exists, to the same numbers as without the interruption.

    Returns:
        The scheme's row of the results table.

    Raises:
        Diverged: the loss became infinite or NaN.
        ValueError: no such scheme or ingredient, or the checkpoint is of another run, or damaged.
        OSError: the checkpoint could not be written; the one before is whole.
    """
    saved = own_checkpoint(checkpoint, settings) if resume and checkpoint.exists() else None
    if saved is not None and saved["epoch"] == settings.epochs:
        result = SchemeResult.from_json(saved["result"])
        observer.on_scheme(scheme, result, _steps(data, settings))
        return result
    device = torch.device(settings.device)
    training = prepare(scheme, settings, data, saved)
    regime, data, result = training.regime, training.data, training.result
    optimizer = training.optimizer(result.learning_rate)
    steps = _steps(data, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(
            step, steps * settings.epochs, round(steps * settings.warmup_epochs)
        ),
    )
    if saved is not None:
        result = SchemeResult.from_json(saved["result"])
        regime.load_state_dict(saved["regime"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        _set_random_state(saved["random"], device)

    observer.on_scheme(scheme, result, steps)
    for epoch in range(len(result.epochs) + 1, settings.epochs + 1):
        figures = _train_epoch(epoch, training, optimizer, scheduler, settings, observer)
        result.epochs.append(figures)
        save_checkpoint(
            checkpoint,
            {
                "model": _on_cpu(regime.weights()),
                "epoch": epoch,
                "scheme": scheme,
                "settings": settings.to_json(),
                "classes": list(data.classes),
                "result": result.to_json(),
                "regime": regime.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": _random_state(device),
            },
        )
        observer.on_epoch(figures)
    return result


def own_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """What a run's checkpoint holds.

    Args:
        path: of the checkpoint.
        settings: of the run; the checkpoint's figures are only its own where they were made with the same.

    Raises:
        ValueError: it was written with other settings or by another version, or is damaged.
    """
    content = read_checkpoint(path)
    try:
        written_with = Settings.from_json(content["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"resume: {path} was not written by this version of trady finetune") from error
    if (name := settings.difference(written_with)) is not None:
        raise ValueError(
            f"resume: {path} is of another run: its {name} is {plain(getattr(written_with, name))}, "
            f"expected {plain(getattr(settings, name))}"
        )
    return content


def _train_epoch(
    epoch: int,
    training: Prepared,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    settings: Settings,
    observer: Observer,
) -> EpochFigures:
    started = time.perf_counter()
    regime, data = training.regime, training.data
    if epoch > 1:
        with _drawing(training, f"before epoch {epoch}"):
            regime.resample(optimizer)
    observer.on_selection(regime, training.batches)
    regime.train_mode()
    order = _epoch_order(data, settings, epoch)
    first_batch = training.to_input(data.train, order[: min(training.at_once, settings.batch_size)])
    saved_bytes = measure_memory(regime.model, first_batch, F.cross_entropy).saved_bytes

    losses, correct, seen, step_seconds, gradient_bytes = [], 0, 0, [], 0
    selections = []
    for indices in order.split(settings.batch_size):
        selections.append(regime.selection_cost())
        step_started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        mean_loss, hits = training.gradients(indices)
        observer.on_gradients(regime.model)
        gradient_bytes = max(
            gradient_bytes, sum(p.grad.nbytes for p in regime.parameters() if p.grad is not None)
        )
        optimizer.step()
        scheduler.step()
        with _drawing(training, f"in epoch {epoch}"):
            regime.step(optimizer)
        losses.append(mean_loss.item())  # on a GPU this also waits for the step to end
        step_seconds.append(time.perf_counter() - step_started)
        if not math.isfinite(losses[-1]):
            raise _diverged(training, f"the loss became {losses[-1]} in epoch {epoch}")
        correct += int(hits)
        seen += len(indices)
        observer.on_step(statistics.fmean(losses), correct / seen)

    test_loss = top1 = None
    if not settings.test_once or epoch == settings.epochs:
        test_loss, top1 = evaluate(regime.model, data.test, training.to_input)
        if math.isnan(test_loss):
            raise _diverged(training, f"the test loss became nan in epoch {epoch}")
    selection = max(selections, key=lambda cost: cost.elements)
    return EpochFigures(
        epoch=epoch,
        train_loss=statistics.fmean(losses),
        train_accuracy=correct / seen,
        test_loss=test_loss,
        top1=top1,
        cost=selection.elements,
        weight_share=selection.weight_share,
        activation_share=selection.activation_share,
        gradient_share=selection.gradient_share,
        saved_bytes=saved_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=_bytes_of_state(optimizer),
        step_ms=1e3 * statistics.median(step_seconds),
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _drawing(training: Prepared, when: str) -> Iterator[None]:
    """Inside, channels may be drawn by gradients that are measured then: what the last step did is in no loss yet."""
    try:
        yield
    except NotFinite as error:
        raise _diverged(training, f"the weights were without a finite gradient {when}") from error


def _diverged(training: Prepared, what: str) -> Diverged:
    return Diverged(
        f"learning_rate: with {training.result.learning_rate:g} {what}, expected a finite number; give a lower one"
    )


def _bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in tensors_in(state))


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, to_input: Any) -> tuple[float, float]:
    """Mean cross entropy and top-1 accuracy of ``model``, in evaluation mode, over ``samples``."""
    model.eval()
    loss, correct = 0.0, 0
    for indices in torch.arange(len(samples)).split(_EVALUATION_BATCH):
        input, labels = to_input(samples, indices)
        output = call(model, input)
        loss += F.cross_entropy(output, labels, reduction="sum").item()
        correct += int((output.argmax(1) == labels).sum())
    return loss / len(samples), correct / len(samples)


def sizes_of(settings: Settings) -> Sizes:
    """Sizes of the network's input, as the settings have them."""
    return Sizes(settings.image_size, settings.max_length)


def _steps(data: DataSet, settings: Settings) -> int:
    return math.ceil(len(data.train) / settings.batch_size)


def _epoch_order(data: DataSet, settings: Settings, epoch: int) -> torch.Tensor:
    """Order of the training samples, a function of seed and epoch alone, so that a resumed run has it too."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(len(data.train), generator=generator)


def _whole_batches(data: DataSet, settings: Settings, to_input: _Input) -> Iterator[Example]:
    """One pass over the training samples, in an order of its own, without a smaller batch at its end."""
    batches = _epoch_order(data, settings, epoch=0).split(settings.batch_size)
    for indices in batches:
        if len(indices) == len(batches[0]):
            yield to_input(data.train, indices)[0]


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() for key, value in state.items()}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
