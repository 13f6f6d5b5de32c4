"""``channel_norms``: how large every channel's weight gradient is, whole gradients at once or inside a budget."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.batch import Example, input_of, loss_of, without_trace
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Budget, Layer, LayerCost, measure_layers, total
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.norm import FrozenBatchNorm2d


class NotFinite(ValueError):
    """A loss or a gradient is infinite or NaN."""


@dataclass(frozen=True)
class BlockNorms:
    """Norms of one layer's gradient on one batch.

    Attributes:
        channels: ``(k,)`` int64, sorted: the channels that were measured.
        norms: ``(k,)`` float64 on the CPU.
    """

    channels: torch.Tensor
    norms: torch.Tensor


@dataclass(frozen=True)
class MeanNorms:
    """Mean norms of all layers' gradients.

    Attributes:
        norms: ``{layer name: (C,)}`` float64 on the CPU; zero where no gradient came.
        costs: of the layers.
        reached: names of the layers that a gradient reached, in the order of ``norms``.
        batches: how many there were.
    """

    norms: dict[str, torch.Tensor]
    costs: dict[str, LayerCost]
    reached: list[str]
    batches: int


#: ``{layer name: channels}`` to measure on one batch.
_Block = Mapping[str, torch.Tensor]
#: Is handed a parameter whose gradient is complete, and that gradient as ``(k, elements of a channel)``.
_Reduce = Callable[[torch.Tensor, torch.Tensor], None]
#: Is told what one batch gave, by layer that a gradient reached, and what the layers cost.
_Note = Callable[[Mapping[str, BlockNorms], Mapping[str, LayerCost]], None]


def channel_norms(
    model: nn.Module,
    batches: Iterable[Example],
    loss_fn: Callable[..., torch.Tensor],
    *,
    budget: int | str | Budget | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The norm ||dW_c|| of every input channel's weight gradient, the mean over batches.

    The network runs in eval mode; weights, statistics, modes, gradients, selections and random numbers are left
    as they were, also where an error ends the run.

    Args:
        model: a network that ``sparsify`` has converted.
        batches: pairs ``(input, target)``, or whatever ``measure_memory`` takes; read once.
        loss_fn: called with output and target.
        budget: as ``ChannelSampler`` takes it. With one, the channels of all layers are shuffled and cut into
            blocks that each fit; each batch gives the gradient of one block, in turn, and of no other channel:
            what is kept for backward and the gradient stay inside the budget, as in training. After the last
            block they are shuffled anew: a pass takes about as many batches as budgets go into the full cost.
            None takes the whole gradient of every batch.
        seed: of the blocks.

    Returns:
        ``{layer name: (C,)}`` float64 on the CPU, of every sparse layer: zero where no gradient comes.

    Raises:
        TypeError, ValueError: a bad budget or one that some channel alone exceeds, no batch, with a budget fewer
            batches than blocks, a loss that is not finite, or a model without sparse layers.
    """
    parsed = None if budget is None else Budget.parse(budget)
    return mean_norms(model, batches, loss_fn, budget=parsed, seed=seed).norms


def mean_norms(
    model: nn.Module,
    batches: Iterable[Example],
    loss_fn: Callable[..., torch.Tensor],
    *,
    budget: Budget | None = None,
    learning_rate: float = 0.0,
    seed: int = 0,
) -> MeanNorms:
    """As :func:`channel_norms`, with what else is known then.

    Args:
        model, batches, loss_fn, budget, seed: as for :func:`channel_norms`.
        learning_rate: as for :func:`measure_batches`.
    """
    layers = sparse_layers(model)
    sums = {name: torch.zeros(layer.channel_count, dtype=torch.float64) for name, layer in layers.items()}
    visits = {name: torch.zeros(layer.channel_count, dtype=torch.int64) for name, layer in layers.items()}
    costs: dict[str, LayerCost] = {}
    reached: set[str] = set()
    blocks = 0  # of the first pass through all channels

    def cut(measured: Mapping[str, LayerCost]) -> Iterator[_Block]:
        nonlocal blocks
        generator = torch.Generator().manual_seed(operator.index(seed))
        while True:
            parts = _cut(measured, budget, generator)
            blocks = blocks or len(parts)
            for block in parts:
                for name, channels in block.items():
                    visits[name][channels] += 1
                yield block

    def add(found: Mapping[str, BlockNorms], measured: Mapping[str, LayerCost]) -> None:
        costs.update(measured)
        for name, block in found.items():
            sums[name][block.channels] += block.norms
            reached.add(name)

    count = measure_batches(dict(layers), model, batches, loss_fn, add, learning_rate=learning_rate, cut=cut)
    if any(int(visits[name].min()) == 0 for name in costs if name in visits):
        raise ValueError(
            f"batches: got {count}, expected at least {blocks}, one for each block of channels that fits the budget "
            f"({budget})"
        )
    return MeanNorms(
        {name: sums[name] / visits[name].clamp(min=1) for name in layers},
        costs,
        [name for name in layers if name in reached],
        count,
    )


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The sparse layers of a network by name; of a dense one every ``nn.Conv2d`` and ``nn.Linear``."""
    named = dict(model.named_modules())
    sparse: dict[str, Any] = {
        name: module for name, module in named.items() if isinstance(module, SparseChannels)
    }
    return sparse or {name: module for name, module in named.items() if isinstance(module, Layer)}


def measure_batches(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Iterable[Example],
    loss_fn: Callable[..., torch.Tensor],
    note: _Note,
    *,
    learning_rate: float = 0.0,
    cut: Callable[[Mapping[str, LayerCost]], Iterator[_Block]] | None = None,
) -> int:
    """Run batches forward and backward, and tell the norms that each one's weight gradients have.

    Args:
        layers: by name, sparse or dense.
        model, batches, loss_fn: as for :func:`channel_norms`.
        note: is told what each batch gave.
        learning_rate: of plain SGD steps between the batches, on the weights that were measured and on the
            parameters that require a gradient; the values come back in the end.
        cut: makes, from the layers' costs, the block of channels that each batch is for; None is all channels,
            dense layers' too.

    Returns:
        The number of batches.

    Raises:
        ValueError: no batch, a learning rate or loss that is negative or not finite.
    """
    if not isinstance(learning_rate, float | Real) or not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate: got {learning_rate!r}, expected a number that is not negative")
    layers = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer._parameters.get("weight"), nn.Parameter)
    }
    costs: dict[str, LayerCost] = {}
    found: dict[str, BlockNorms] = {}

    def descend(parameter: torch.Tensor) -> None:
        if learning_rate and parameter.grad is not None:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=float(learning_rate))
        parameter.grad = None

    def reduce(name: str, channels: torch.Tensor, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if name in costs:
            norms = torch.linalg.vector_norm(gradient.double(), dim=1)
            found[name] = BlockNorms(channels, norms.cpu())
        descend(parameter)

    def watch(name: str, block: _Block | None) -> AbstractContextManager[None]:
        if block is None:
            return _whole_gradient(layers[name], partial(reduce, name, _all_channels(costs.get(name))))
        channels = block.get(name, _all_channels(None))
        return _rows_gradient(layers[name], channels, partial(reduce, name, channels))

    with without_trace(model, training=False), ExitStack() as stack:
        weights = {id(layer.weight): layer.weight for layer in layers.values()}
        others = [p for p in model.parameters() if p.requires_grad]
        if learning_rate:
            stack.enter_context(_values_kept([*weights.values(), *others]))
        others = [p for p in others if id(p) not in weights]
        blocks: Iterator[_Block | None] = repeat(None)
        count = 0
        for count, batch in enumerate(batches, start=1):
            if not costs:
                costs.update(measure_layers(model, input_of(batch)))
                if cut is not None:
                    blocks = cut({name: costs[name] for name in layers if name in costs})
            block = next(blocks)
            found.clear()
            with ExitStack() as watched:
                for name in layers:
                    watched.enter_context(watch(name, block))
                with torch.enable_grad():
                    loss = loss_of(model, batch, loss_fn)
                if not torch.isfinite(loss).all():
                    raise NotFinite(
                        f"batches: batch {count} has loss {loss.item()}, expected a finite one: lower "
                        f"learning_rate ({learning_rate}) or check the data"
                    )
                loss.backward()
            for parameter in others:
                descend(parameter)
            note(found, costs)
    if not count:
        raise ValueError("batches: got none, expected at least one")
    return count


def _all_channels(cost: LayerCost | None) -> torch.Tensor:
    return torch.arange(0 if cost is None else cost.channels)


def _cut(
    costs: Mapping[str, LayerCost], budget: Budget | None, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """All channels, shuffled, in runs that each fit the budget; one run without a budget."""
    if budget is None:
        return [{name: torch.arange(cost.channels) for name, cost in costs.items()}]
    limit = budget.limit(total(cost.full for cost in costs.values()))
    prices = {name: budget.of(cost.channel) for name, cost in costs.items()}
    dearest = max(prices, key=prices.__getitem__)
    if prices[dearest] > limit:
        unit = "bytes" if budget.kind == "bytes" else "elements"
        raise ValueError(
            f"budget: got {budget}, expected at least {prices[dearest]:,} {unit}, what one channel of {dearest} costs"
        )
    owners = [name for name, cost in costs.items() for _ in range(cost.channels)]
    indices = [index for cost in costs.values() for index in range(cost.channels)]
    runs: list[dict[str, list[int]]] = [{}]
    left = limit
    for position in torch.randperm(len(owners), generator=generator).tolist():
        name = owners[position]
        if prices[name] > left:
            runs.append({})
            left = limit
        runs[-1].setdefault(name, []).append(indices[position])
        left -= prices[name]
    return [{name: torch.tensor(sorted(run[name])) for name in run} for run in runs]


@contextmanager
def _values_kept(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _convolve(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """What a sparse layer computes, with what is folded into it, by torch's convolution."""
    if layer.folded_margins is not None:
        input = F.pad(input, layer.folded_margins)
    output = nn.Conv2d.forward(layer, input)
    norm: Any = layer.folded_norm
    return output if norm is None else FrozenBatchNorm2d.forward(norm, output)


def by_channel(gradient: torch.Tensor, layer: Any) -> torch.Tensor:
    """The gradient of a layer's whole weight as ``(C, elements of a channel)``."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    # (C', C/groups, ...) -> (groups, C'/groups, C/groups, elements)
    parts = gradient.reshape(groups, gradient.shape[0] // groups, gradient.shape[1], -1)
    return parts.transpose(1, 2).flatten(2).flatten(0, 1)


@contextmanager
def _computing(layer: SparseChannels, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let ``forward`` hide the layer's own, which may be a wrapper that somebody put on the instance."""
    own = layer.__dict__.get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own  # type: ignore[method-assign]


@contextmanager
def _whole_gradient(layer: Any, reduce: _Reduce) -> Iterator[None]:
    """Let the layer's whole weight get its gradient, sparse or not, and hand it to ``reduce``."""
    weight = layer.weight

    def complete(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            reduce(parameter, by_channel(parameter.grad, layer))

    computing: AbstractContextManager[None] = nullcontext()
    if isinstance(layer, SparseChannels):
        layer.synchronize()
        dense: Callable[..., torch.Tensor] = (
            _convolve if isinstance(layer, SparseConv2d) else nn.Linear.forward
        )
        computing = _computing(layer, partial(dense, layer))  # rows and their gradient are not touched
    flag = weight.requires_grad
    weight.requires_grad_(True)
    handle = weight.register_post_accumulate_grad_hook(complete)
    try:
        with computing:
            yield
    finally:
        handle.remove()
        weight.requires_grad_(flag)


@contextmanager
def _rows_gradient(layer: SparseChannels, channels: torch.Tensor, reduce: _Reduce) -> Iterator[None]:
    """Let the rows of ``channels`` get their gradient, none else, and hand it to ``reduce``, which may move them.

    The layer's own selection, rows and optimiser state are not touched: other rows take part in their place.
    """
    layer.synchronize()
    weight = layer.weight.detach()
    there = channels.to(weight.device)
    rows = layer.read_rows(weight, there).requires_grad_(len(channels) > 0)

    def complete(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            reduce(parameter, parameter.grad.flatten(1))

    if len(channels):
        rows.register_post_accumulate_grad_hook(complete)
    version = rows._version

    def forward(input: torch.Tensor) -> torch.Tensor:
        return layer.compute(input, layer.weight, rows, there)

    with _computing(layer, forward):
        yield
        if rows._version != version:
            with torch.no_grad():
                layer.write_rows(layer.weight, there, rows)
