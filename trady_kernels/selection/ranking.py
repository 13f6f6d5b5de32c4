"""Layer rankings: how much gradient a layer has for what training it costs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.atomic_write import write_json
from trady_kernels.batch import Example, input_of, loss_of, without_trace
from trady_kernels.cost import Layer, LayerCost, measure_layers
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.norm import FrozenBatchNorm2d

_FORMAT = "trady-layer-ranking"
_VERSION = 1


def _rgn(gradient: torch.Tensor, layer: Layer, cost: LayerCost) -> torch.Tensor:
    """RGN_i = sum_c ||dW_c||_2 / (C_W + C_A) [TraDy, arXiv 2510.19675, equation 8]."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    # (C', C/groups, ...) -> (groups, C'/groups, C/groups, elements)
    by_channel = gradient.reshape(groups, gradient.shape[0] // groups, gradient.shape[1], -1)
    return torch.linalg.vector_norm(by_channel, dim=(1, 3)).sum() / cost.channel.elements


def _lara(gradient: torch.Tensor, layer: Layer, cost: LayerCost) -> torch.Tensor:
    """LaRa_i = ||dW_i||_2 / sum_c (C_W + C_A) [MeDyate, arXiv 2510.20979, equation 9]."""
    return torch.linalg.vector_norm(gradient) / cost.full.elements


METRICS: Mapping[str, Callable[[torch.Tensor, Layer, LayerCost], torch.Tensor]] = {"rgn": _rgn, "lara": _lara}


class LayerRanking(Mapping[str, float]):
    """Layers by score, highest first: an ordered ``{layer name: score}``.

    Args:
        scores: ``{layer name: score}`` in any order; finite, not negative, not all zero.
        metric: name of the metric the scores are sums of.

    Raises:
        ValueError: scores or metric are not of that kind.
    """

    def __init__(self, scores: Mapping[str, float], metric: str = "rgn") -> None:
        _check_metric(metric)
        for name, score in scores.items():
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not isinstance(name, str) or not number or not math.isfinite(score) or score < 0:
                raise ValueError(
                    f"scores: got {score!r} for layer {name!r}, expected a finite number that is not negative"
                )
        if not any(scores.values()):
            raise ValueError(
                f"scores: got {len(scores)} layers without a score above 0, expected at least one: did any "
                "gradient reach the layers?"
            )
        self.metric = metric
        self._scores = {name: float(scores[name]) for name in sorted(scores, key=lambda name: -scores[name])}

    def __getitem__(self, name: str) -> float:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"LayerRanking({len(self)} layers by {self.metric}, first {next(iter(self))!r})"

    def top(self, cumulative: float = 0.97, among: Iterable[str] | None = None) -> list[str]:
        """The fewest first layers whose scores add up to that share of the total.

        Args:
            cumulative: above 0, up to 1.
            among: names of the layers to consider; all by default.

        Raises:
            ValueError: ``cumulative`` is not above 0 and up to 1.
        """
        if isinstance(cumulative, bool) or not isinstance(cumulative, int | float) or not 0 < cumulative <= 1:
            raise ValueError(f"cumulative: got {cumulative!r}, expected a number above 0 and up to 1")
        names = set(self if among is None else among)
        scores = {name: score for name, score in self.items() if name in names}
        needed, reached, layers = cumulative * math.fsum(scores.values()), 0.0, []
        for name, score in scores.items():
            # Rounding must not let the last layers in or out; those without a score never count.
            if not score or reached >= needed * (1 - 1e-12):
                break
            layers.append(name)
            reached += score
        return layers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranking as JSON; an interrupted write leaves the file that was there.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "metric": self.metric,
            "scores": self._scores,
        }
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerRanking:
        """The ranking that ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not hold a ranking.
        """
        return cls._parse(Path(path).read_bytes(), os.fspath(path))

    @classmethod
    def shipped(cls, name: str) -> LayerRanking:
        """The ranking of an embedded network that comes with the package.

        Args:
            name: of the network, such as "efficientnet_lite0".

        Raises:
            ValueError: none is shipped under that name.
        """
        folder = resources.files("trady_kernels.selection") / "rankings"
        names = sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))
        if name not in names:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(names) or '(none is shipped)'}")
        return cls._parse((folder / f"{name}.json").read_bytes(), f"{name}.json")

    @classmethod
    def _parse(cls, content: bytes, origin: str) -> LayerRanking:
        try:
            data = json.loads(content)
        except ValueError as error:
            raise ValueError(f"path: {origin} is not JSON ({error}), expected a saved LayerRanking") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ValueError(
                f"path: {origin} is not a layer ranking of version {_VERSION}, expected a file that "
                "LayerRanking.save wrote"
            )
        if not isinstance(data.get("scores"), dict):
            raise ValueError(f'path: {origin} has no "scores" object, expected {{layer name: score}}')
        try:
            return cls(data["scores"], data.get("metric"))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"path: {origin} is damaged: {error}") from None


def rank_layers(
    model: nn.Module,
    batches: Iterable[Example],
    loss_fn: Callable[..., torch.Tensor],
    metric: str = "rgn",
    *,
    learning_rate: float = 0.0,
) -> LayerRanking:
    """Rank a network's layers by their gradient for what training them costs, summed over batches.

    The network runs in eval mode, so norms keep their statistics. Gradients are reduced to a score as soon as
    each one is complete. Weights, statistics, modes, gradients, selections and random numbers are left as they
    were.

    Args:
        model: a network with sparse layers, which are ranked; of a dense one every ``nn.Conv2d`` and
            ``nn.Linear`` whose weight gets a gradient is.
        batches: pairs ``(input, target)``, or whatever ``measure_memory`` takes; read once. The first gives
            the resolution of the costs.
        loss_fn: called with output and target.
        metric: "rgn" (TraDy) or "lara" (MeDyate).
        learning_rate: of plain SGD steps on the ranked weights and on the parameters that require a
            gradient, between the batches: the short fine-tuning that the papers accumulate over. 0 takes
            every gradient at the weights of now.

    Returns:
        The sum of the metric over the batches, by layer.

    Raises:
        ValueError: an unknown metric, no batch, a negative learning rate, a loss or gradient that is not
            finite, or no gradient at all.
    """
    _check_metric(metric)
    if not isinstance(learning_rate, int | float) or not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate: got {learning_rate!r}, expected a number that is not negative")
    named = dict(model.named_modules())
    sparse = {name: module for name, module in named.items() if isinstance(module, SparseChannels)}
    dense = {name: module for name, module in named.items() if isinstance(module, Layer)}
    layers: dict[str, Any] = {**sparse} or {**dense}
    scores: dict[str, torch.Tensor] = {}
    costs: dict[str, LayerCost] = {}

    def reduce(name: str, weight: torch.Tensor) -> None:
        if name not in costs or weight.grad is None:
            return
        layer = layers[name]
        assert isinstance(layer, Layer)
        gradient = weight.grad.double()
        scores[name] = scores.get(name, 0.0) + METRICS[metric](gradient, layer, costs[name])
        descend(weight)

    def descend(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if learning_rate:
            with torch.no_grad():
                weight.sub_(weight.grad, alpha=learning_rate)
        weight.grad = None

    with without_trace(model, training=False), ExitStack() as stack:
        others = [p for p in model.parameters() if p.requires_grad]
        if learning_rate:
            weights = {id(module.weight): module.weight for module in layers.values()}
            stack.enter_context(_values_kept([*weights.values(), *others]))
        ranked = {
            id(weight): stack.enter_context(_whole_gradient(layer, partial(reduce, name)))
            for name, layer in layers.items()
            if isinstance(weight := layer._parameters.get("weight"), nn.Parameter)
        }
        others = [p for p in others if id(p) not in ranked]
        count = 0
        for count, batch in enumerate(batches, start=1):
            if not costs:
                costs.update(measure_layers(model, input_of(batch)))
            with torch.enable_grad():
                loss = loss_of(model, batch, loss_fn)
            if not torch.isfinite(loss).all():
                raise ValueError(
                    f"batches: batch {count} has loss {loss.item()}, expected a finite one: lower learning_rate "
                    f"({learning_rate}) or check the data"
                )
            loss.backward()
            for parameter in others:
                if parameter.grad is not None:
                    descend(parameter)
    if not count:
        raise ValueError("batches: got none, expected at least one")
    return LayerRanking({name: float(scores[name]) for name in layers if name in scores}, metric)


def _check_metric(metric: object) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")


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


@contextmanager
def _whole_gradient(layer: nn.Module, reduce: Callable[[torch.Tensor], None]) -> Iterator[nn.Parameter]:
    """Let the layer's whole weight get its gradient, sparse or not, and hand it to ``reduce``."""
    weight: Any = layer.weight
    if isinstance(layer, SparseChannels):
        layer.synchronize()
        dense: Callable[..., torch.Tensor] = (
            _convolve if isinstance(layer, SparseConv2d) else nn.Linear.forward
        )
        # The instance's own attribute hides the sparse forward; rows and their gradient are not touched.
        layer.forward = partial(dense, layer)
    flag = weight.requires_grad
    weight.requires_grad_(True)
    handle = weight.register_post_accumulate_grad_hook(reduce)
    try:
        yield weight
    finally:
        handle.remove()
        weight.requires_grad_(flag)
        if isinstance(layer, SparseChannels):
            del layer.forward
