"""What fits in a total of memory: batch sizes, and the most channels that can train at each, all of it measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from trady_kernels.batch import Example, loss_of, tensors_in, without_trace
from trady_kernels.convert import trainable_parameters
from trady_kernels.cost import Budget
from trady_kernels.memory import peak_memory, saved_by_module
from trady_kernels.selection import SCHEMES, ChannelSampler, LayerRanking, NothingSelected, Scheme

#: Optimisers by the name that a user gives, at a learning rate that leaves the weights alone.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.0),
    "sgd-momentum": lambda parameters: SGD(parameters, lr=0.0, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.0),
    "adamw": lambda parameters: AdamW(parameters, lr=0.0),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.0),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.0),
}

#: Budgets of every channel of the pool, and of none.
EVERYTHING, NOTHING = Budget("share", 1.0), Budget("bytes", 1)
_DRAWS = 3  # an answer is measured with this many draws of channels: they differ in what they keep
_TRIES = 5  # measurements that look for a batch size's budget
_CLOSE = 0.98  # of the total: near enough


_Measure = Callable[..., "TrainingStep"]  # of a batch size, a budget, and how many draws


@dataclass(frozen=True)
class TrainingStep:
    """A measured step of training: forward, backward and the optimiser's.

    Attributes:
        batch_size: samples in it.
        budget: what the sampler was given.
        selected_bytes: counted bytes of the selection, at most the budget.
        share: elements of the selection over those of all channels of all sparse layers.
        channels: how many are selected.
        model_bytes: parameters and buffers.
        batch_bytes: input and labels.
        optimizer_bytes: the optimiser's state.
        gradient_bytes: gradients when the optimiser steps.
        saved_bytes: kept between forward and backward.
        peak_bytes: the allocator's high-water mark above weights, batch and optimiser state; contains what is
            saved, the gradients, and what is there for a moment only.
    """

    batch_size: int
    budget: Budget
    selected_bytes: int
    share: float
    channels: int
    model_bytes: int
    batch_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    saved_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        """All tensors alive at the step's worst moment."""
        return self.model_bytes + self.batch_bytes + self.optimizer_bytes + self.peak_bytes

    @property
    def budget_text(self) -> str | None:
        """What ``--budget`` and ``ChannelSampler`` take for it; None where nothing is selected."""
        if self.budget == NOTHING:
            return None
        return "100%" if self.budget == EVERYTHING else f"{int(self.budget.amount) // 1024}KiB"

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return asdict(self) | {"budget": self.budget_text, "total_bytes": self.total_bytes}


#: Why no budget can be looked for with a scheme, by the attribute that says so.
_UNFIT: tuple[tuple[Callable[[type[Scheme]], bool], str], ...] = (
    (lambda scheme: not scheme.budgeted, "has no budget"),
    (lambda scheme: scheme.needs_gradients, "draws by the gradients of a data set"),
    (lambda scheme: scheme.given, "is the same selection for every budget"),
)


def _unfit(scheme: type[Scheme]) -> str | None:
    return next((why for holds, why in _UNFIT if holds(scheme)), None)


@dataclass(frozen=True)
class StepMeter:
    """Measures steps of one network, on random weights that no step moves.

    Args:
        model: one that ``sparsify`` has converted, in the mode that training uses.
        make_batch: ``(input, labels)`` of a batch size.
        loss_fn: of the output and the labels.
        optimizer: one of ``OPTIMIZERS``.
        scheme, ranking, pool, seed: of the ``ChannelSampler``.

    Raises:
        ValueError: no such optimiser, or what :func:`check_scheme` raises.
    """

    model: nn.Module
    make_batch: Callable[[int], tuple[Example, torch.Tensor]]
    loss_fn: Callable[..., torch.Tensor]
    optimizer: str = "sgd"
    scheme: str = "trady"
    ranking: LayerRanking | None = None
    pool: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: got {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
        check_scheme(self.scheme)

    def measure(self, batch_size: int, budget: Budget, draws: int = 1) -> TrainingStep:
        """Measure a step; of several draws of channels the one that takes most."""
        batch = self.make_batch(batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingSelected)  # NOTHING is meant to
            sampler = ChannelSampler(
                self.model,
                batch[0],
                budget=budget,
                scheme=self.scheme,
                ranking=self.ranking,
                pool=self.pool,
                seed=self.seed,
            )
        steps = []
        for draw in range(draws):
            if draw:
                sampler.resample()
            steps.append(self._step(batch, sampler))
        return max(steps, key=lambda step: step.total_bytes)

    def _step(self, batch: tuple[Example, torch.Tensor], sampler: ChannelSampler) -> TrainingStep:
        assert sampler.budget is not None
        parameters = trainable_parameters(self.model)
        optimizer = OPTIMIZERS[self.optimizer](parameters)
        for parameter in parameters:  # a first step makes the state
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        with without_trace(self.model), torch.enable_grad(), peak_memory(batch[1].device) as peak:
            with saved_by_module(self.model, batch) as saved:
                loss = loss_of(self.model, batch, self.loss_fn)
            loss.backward()
            del loss
            optimizer.step()
            gradients = _bytes_of(p.grad for p in parameters if p.grad is not None)
        return TrainingStep(
            batch_size=len(batch[1]),
            budget=sampler.budget,
            selected_bytes=sampler.cost.bytes,
            share=sampler.cost.elements / sampler.full_cost.elements,
            channels=sum(len(channels) for channels in sampler.selection.values()),
            model_bytes=_bytes_of((*self.model.parameters(), *self.model.buffers())),
            batch_bytes=_bytes_of(tensors_in(batch)),
            optimizer_bytes=_bytes_of(tensors_in(list(optimizer.state.values()))),
            gradient_bytes=gradients,
            saved_bytes=saved.saved_bytes,
            peak_bytes=peak.bytes,
        )


def check_scheme(name: str) -> None:
    """Refuse a scheme that has no largest budget to look for.

    Raises:
        ValueError: it has no budget, draws by the gradients of data, or is given as data.
    """
    unfit = {known: why for known, scheme in SCHEMES.items() if (why := _unfit(scheme))}
    if name in unfit:
        fit = ", ".join(known for known in SCHEMES if known not in unfit)
        raise ValueError(f"scheme: got {name!r}, which {unfit[name]}, expected one of {fit}")


def fit_total(
    meter: StepMeter,
    total: int,
    largest_batch: int,
    on_measure: Callable[[int, Budget], None] = lambda batch_size, budget: None,
) -> list[TrainingStep]:
    """For every batch size that fits, the step that selects most and takes at most ``total`` bytes.

    A step's peak is close to linear in the batch size and in the budget: lines through measured steps say what
    to try next. Every answer was measured, with three draws of channels, and fitted.

    Args:
        meter: measures the steps.
        total: bytes for weights, optimiser state, the batch, gradients, saved and transient tensors.
        largest_batch: batch sizes are 1, 2, 4 and so on up to this one, and the largest that fits.
        on_measure: called before every measurement.

    Returns:
        The steps by batch size.

    Raises:
        ValueError: not even one sample with no channel selected fits; the message has the total that would.
    """

    def measure(batch_size: int, budget: Budget, draws: int = 1) -> TrainingStep:
        on_measure(batch_size, budget)
        return meter.measure(batch_size, budget, draws)

    rows: list[TrainingStep] = []
    fulls: list[TrainingStep] = []
    empty = measure(1, NOTHING)
    if empty.total_bytes > total:
        raise ValueError(
            f"total: got {total:,} bytes, expected at least {empty.total_bytes:,}, which one sample with no channel "
            "selected takes, the head alone training"
        )
    for batch_size in _batch_sizes(largest_batch):
        fits = empty
        if batch_size > 1:
            empty = measure(batch_size, NOTHING)
        if empty.total_bytes > total:
            largest = _largest_batch(measure, fits, empty, total)
            return rows if largest is None else [*rows, _fit_budget(measure, largest, fulls, total)]
        rows.append(_fit_budget(measure, empty, fulls, total))
    return rows


def _batch_sizes(largest: int) -> Iterator[int]:
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest


def _largest_batch(
    measure: _Measure, fits: TrainingStep, too_large: TrainingStep, total: int
) -> TrainingStep | None:
    """The largest batch between two, of which the first is done already; None if there is none."""
    best = None
    while too_large.batch_size - fits.batch_size > 1:
        per_image = (too_large.total_bytes - fits.total_bytes) / (too_large.batch_size - fits.batch_size)
        guess = fits.batch_size + int((total - fits.total_bytes) / per_image)
        guess = min(max(guess, fits.batch_size + 1), too_large.batch_size - 1)
        step = measure(guess, NOTHING)
        if step.total_bytes <= total:
            best = fits = step
        else:
            too_large = step
    return best


def _fit_budget(
    measure: _Measure, empty: TrainingStep, fulls: list[TrainingStep], total: int
) -> TrainingStep:
    """The largest budget for a batch size whose step without channels fits.

    ``fulls`` are the steps with every channel at smaller batch sizes; this one's is added where it is measured.
    """
    size = empty.batch_size
    predicted = _on_line(fulls, size)
    full_total, full_bytes = predicted if predicted is not None else (0.0, 0.0)
    if full_total <= total:
        full = measure(size, EVERYTHING)
        fulls.append(full)
        if full.total_bytes <= total:
            return full
        full_total, full_bytes = full.total_bytes, full.selected_bytes
    best, low, low_total = empty, 0.0, float(empty.total_bytes)
    high, high_total = full_bytes, full_total
    guess = full_bytes / 100
    for _ in range(_TRIES):
        budget = Budget("bytes", max(int(guess) // 1024, 1) * 1024)
        if not low < budget.amount < high:
            break
        step = measure(size, budget, _DRAWS)
        if step.total_bytes <= total:
            low, low_total = float(budget.amount), step.total_bytes
            if step.channels > best.channels:
                best = step
            if step.total_bytes >= _CLOSE * total:
                break
            guess = low + (high - low) * (total - low_total) / max(high_total - low_total, 1.0) * _CLOSE
        else:
            high, high_total = float(budget.amount), step.total_bytes
            # Down to the lowest layer with a channel, bits are kept whatever the budget: no line near zero.
            guess = high / 4 if best is empty else (low + high) / 2
    return best


def _on_line(steps: list[TrainingStep], batch_size: int) -> tuple[float, float] | None:
    """Total and selected bytes of a batch size, on the line through the last two steps."""
    if len(steps) < 2:
        return None
    first, second = steps[-2:]
    along = (batch_size - first.batch_size) / (second.batch_size - first.batch_size)
    return (
        first.total_bytes + along * (second.total_bytes - first.total_bytes),
        first.selected_bytes + along * (second.selected_bytes - first.selected_bytes),
    )


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
