"""Layer rankings: how much gradient a layer has for what training it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.cost import Budget, LayerCost
from trady_kernels.selection.channel_norms import BlockNorms, layers_of, mean_norms, measure_batches
from trady_kernels.selection.saved import Saved


def _rgn(norms: torch.Tensor, cost: LayerCost) -> torch.Tensor:
    """RGN_i = sum_c ||dW_c||_2 / (C_W + C_A) [TraDy, arXiv 2510.19675, equation 8]."""
    return norms.sum() / cost.channel.elements


def _lara(norms: torch.Tensor, cost: LayerCost) -> torch.Tensor:
    """LaRa_i = ||dW_i||_2 / sum_c (C_W + C_A) [MeDyate, arXiv 2510.20979, equation 9]."""
    return torch.linalg.vector_norm(norms) / cost.full.elements


def _norm(norms: torch.Tensor, cost: LayerCost) -> torch.Tensor:
    """||dW_i||_2, whatever the layer costs."""
    return torch.linalg.vector_norm(norms)


#: Of a layer, from the norms of its channels' gradients.
METRICS: Mapping[str, Callable[[torch.Tensor, LayerCost], torch.Tensor]] = {
    "rgn": _rgn,
    "lara": _lara,
    "norm": _norm,
}


class LayerRanking(Mapping[str, float], Saved):
    """Layers by score, highest first: an ordered ``{layer name: score}``.

    Args:
        scores: ``{layer name: score}`` in any order; finite, not negative, not all zero.
        metric: name of the metric the scores are sums of.

    Raises:
        ValueError: scores or metric are not of that kind.
    """

    format = "trady-layer-ranking"
    words = "layer ranking"
    folder = "rankings"

    def __init__(self, scores: Mapping[str, float], metric: str = "rgn") -> None:
        _check_metric(metric)
        for name, score in scores.items():
            number = isinstance(score, float | Real) and not isinstance(score, bool)
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
        if (
            isinstance(cumulative, bool)
            or not isinstance(cumulative, float | Real)
            or not 0 < cumulative <= 1
        ):
            raise ValueError(f"cumulative: got {cumulative!r}, expected a number above 0 and up to 1")
        names = set(self if among is None else among)
        scores = {name: score for name, score in self.items() if name in names}
        needed, reached, layers = float(cumulative) * math.fsum(scores.values()), 0.0, []
        for name, score in scores.items():
            # Rounding must not let the last layers in or out; those without a score never count.
            if not score or reached >= needed * (1 - 1e-12):
                break
            layers.append(name)
            reached += score
        return layers

    def agreement(self, other: Mapping[str, float]) -> float:
        """Spearman's rank correlation with another ranking of the same layers, from -1 to 1; NaN where all are tied.

        Raises:
            ValueError: ``other`` has other layers.

        Source: TraDy, arXiv 2510.19675, section 4.1, which compares tasks so.
        """
        if set(other) != set(self):
            raise ValueError(
                f"other: got a ranking of {len(other)} other layers, expected one of these {len(self)}"
            )
        scores = torch.tensor([[self[name], other[name]] for name in self], dtype=torch.float64).t()
        # Of layers that are tied each has the mean of their places.
        above, level = scores[:, :, None] > scores[:, None], scores[:, :, None] == scores[:, None]
        places = (above.double() + level.double() / 2).sum(2)
        return float(torch.corrcoef(places)[0, 1])

    def to_json(self) -> dict[str, Any]:
        return {"metric": self.metric, "scores": self._scores}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerRanking:
        if not isinstance(data.get("scores"), dict):
            raise ValueError('it has no "scores" object, expected {layer name: score}')
        return cls(data["scores"], data.get("metric"))  # type: ignore[arg-type]

    @classmethod
    def shipped(cls, name: str, metric: str = "rgn") -> LayerRanking:
        """The ranking of an embedded network that comes with the package.

        Args:
            name: of the network, such as "efficientnet_lite0".
            metric: "rgn", "lara" or "norm".

        Raises:
            ValueError: an unknown metric, or none by it is shipped under that name.
        """
        _check_metric(metric)
        try:
            return cls._shipped(name, f"-{metric}")
        except KeyError as error:
            known = ", ".join(error.args) or "(none is shipped)"
            raise ValueError(f"name: got {name!r}, expected one of {known}") from None


def rank_layers(
    model: nn.Module,
    batches: Iterable[Example],
    loss_fn: Callable[..., torch.Tensor],
    metric: str = "rgn",
    *,
    budget: int | str | Budget | None = None,
    learning_rate: float = 0.0,
    seed: int = 0,
) -> LayerRanking:
    """Rank a network's layers by their gradient for what training them costs, summed over batches.

    The network runs in eval mode, so norms keep their statistics. Gradients are reduced to norms as soon as
    each one is complete. Weights, statistics, modes, gradients, selections and random numbers are left as they
    were.

    Args:
        model: a network with sparse layers, which are ranked; of a dense one, without a budget, every
            ``nn.Conv2d`` and ``nn.Linear`` whose weight gets a gradient is.
        batches: pairs ``(input, target)``, or whatever ``measure_memory`` takes; read once. The first gives
            the resolution of the costs.
        loss_fn: called with output and target.
        metric: "rgn" (TraDy), "lara" (MeDyate) or "norm", the norm of the layer's gradient alone.
        budget: as :func:`channel_norms` takes it; None takes the whole gradient of every batch. With a budget each
            batch gives the gradient of one block of channels, and the score is the metric of the channels' mean
            norms times the number of batches.
        learning_rate: of plain SGD steps on the ranked weights (with a budget, on the block's) and on the
            parameters that require a gradient, between the batches: the short fine-tuning that the papers
            accumulate over. 0 takes every gradient at the weights of now.
        seed: of the blocks.

    Returns:
        The sum of the metric over the batches, by layer.

    Raises:
        ValueError: an unknown metric, no batch, with a budget fewer batches than blocks, a bad budget, a
            negative learning rate, a loss or gradient that is not finite, or no gradient at all.
    """
    _check_metric(metric)
    scores: dict[str, torch.Tensor] = {}

    def add(found: Mapping[str, BlockNorms], costs: Mapping[str, LayerCost]) -> None:
        for name, block in found.items():
            scores[name] = scores.get(name, 0.0) + METRICS[metric](block.norms, costs[name])

    if budget is None:
        layers = layers_of(model)
        measure_batches(layers, model, batches, loss_fn, add, learning_rate=learning_rate)
        return LayerRanking({name: float(scores[name]) for name in layers if name in scores}, metric)
    means = mean_norms(
        model, batches, loss_fn, budget=Budget.parse(budget), learning_rate=learning_rate, seed=seed
    )
    return LayerRanking(
        {
            name: means.batches * float(METRICS[metric](means.norms[name], means.costs[name]))
            for name in means.reached
        },
        metric,
    )


def _check_metric(metric: object) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
