"""Which regime trains which scheme: a sampler's channels through sparse layers, or one without channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.convert import conversion_report, sparsify, trainable_parameters
from trady_kernels.cost import LayerCost
from trady_kernels.selection import SCHEMES, ChannelSampler, LayerRanking, Pool, Scheme, channel_norms
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.lora import Lora
from trady_kernels.training.regime import Dense, Regime, SelectionCost, Start
from trady_kernels.training.settings import Settings
from trady_kernels.training.velocity import Velocity


def prepare_regime(start: Start) -> Regime:
    """Make a plain network ready for a scheme, in place.

    Raises:
        ValueError: a bad budget or ranking.
        ModuleNotFoundError: a library that the scheme needs is not installed.
    """
    return REGIMES.get(start.spec.scheme, _Sparse)(start)


def check_spec(spec: Spec, settings: Settings) -> None:
    """Find what is wrong with a scheme's files, before anything is written.

    Raises:
        OSError, ValueError: a file cannot be read or holds something else, or what the scheme needs does not ship.
    """
    if spec.scheme not in REGIMES:
        kind = SCHEMES[spec.scheme]
        find_ranking(settings.ranking, settings.model, metric_of(kind, settings.pool))
        kind.for_network(settings.model, settings.layer_fractions)


def sparsify_options(spec: Spec, scheme: Scheme, layers: Mapping[str, LayerCost]) -> dict[str, Any]:
    """Arguments of ``sparsify`` that a scheme and its ingredients set.

    Args:
        spec: with the ingredients.
        scheme: of the network.
        layers: of the plain network, the head left out.
    """
    options = {"biases": scheme.biases, **spec.sparsify}
    reached = len(scheme.reach(layers))
    if options["biases"] is True and reached < len(layers):
        options["biases"] = reached  # those below would take the backward pass further down
    return options


class _Sparse:
    """Trains the channels that a sampler chooses, and keeps those alone."""

    def __init__(self, start: Start) -> None:
        model, settings = start.model, start.settings
        kind = SCHEMES[start.spec.scheme]
        scheme = kind.for_network(settings.model, settings.layer_fractions)
        pool = settings.pool if scheme.takes_pool else None
        ranking = find_ranking(settings.ranking, settings.model, metric_of(kind, pool))
        options = sparsify_options(start.spec, scheme, start.layers)
        self.model = sparsify(model, start.example_input, head=start.head or "auto", **options)
        self._sampler = ChannelSampler(
            model,
            start.example_input,
            budget=start.budget,
            scheme=scheme,
            ranking=ranking,
            pool=pool,
            resampling=settings.resampling,
            seed=settings.seed,
            gradients=lambda: channel_norms(model, start.batches(), F.cross_entropy),
        )
        self.full_cost = self._sampler.full_cost.elements
        report = conversion_report(model)
        if report.biases:
            self.notes = [
                "norms are frozen, all but their biases",
                f"{len(report.biases)} biases train, {sum(report.biases.values()):,} elements",
            ]
        else:
            self.notes = ["norms are frozen, statistics and affine"]
        self.notes += start.spec.notes
        if pool is not None:
            drawn = f"{len(self._sampler.pool)} of {len(self._sampler.layers)}"
            self.notes.append(f"the pool is {pool!r}: channels are drawn from {drawn} layers")
        elif kind.ranked and ranking is None:
            self.notes.append("no layer ranking: channels are drawn from every sparse layer")
        elif kind.ranked and ranking is not None and ranking.metric != kind.metric:
            self.notes.append(
                f"the ranking is one by {ranking.metric}; that of the scheme's source is by {kind.metric}"
            )
        if kind.observes and start.spec.at_once is not None:
            self.notes.append(
                "draws follow the gradient norms of the parts that go backward at a time, not those of the batch"
            )
        if kind.needs_gradients:
            self.notes.append(
                "an oracle: it measures the whole gradient before it draws, which is over the budget by design"
            )
        if kind.budgeted and not kind.given:
            if self._sampler.cost.elements == self.full_cost:
                self.notes.append("the budget is above the full cost: every channel is selected")
            elif not self._sampler.cost.elements:
                self.notes.append("the budget is below the cheapest channel: none is selected")
        if report.dense:
            self.notes.append(f"stay dense and frozen: {', '.join(report.dense)}")

    def parameters(self) -> list[nn.Parameter]:
        return trainable_parameters(self.model)

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        if self._sampler.resampling.kind == "epoch":
            self._sampler.resample(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._sampler.step(optimizer)

    def train_mode(self) -> None:
        self.model.train()

    def selection_cost(self) -> SelectionCost:
        return SelectionCost.of(self._sampler.cost, self._sampler.full_cost)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)


#: What trains a network without choosing channels of it; every other scheme is one of ``SCHEMES``.
REGIMES: dict[str, Callable[[Start], Regime]] = {"full": Dense, "velocity": Velocity, "lora": Lora}


def metric_of(kind: type[Scheme], pool: str | None) -> str:
    """The metric of the ranking that a scheme goes by: the pool's where it names one, else that of the scheme's source."""
    return (None if pool is None else Pool.parse(pool).metric) or kind.metric


def find_ranking(file: str | Path | None, model_name: str, metric: str) -> LayerRanking | None:
    """The ranking in ``file``, or without one the ranking by that metric that ships for the model, or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no ranking.
    """
    if file is not None:
        return LayerRanking.load(file)
    shipped = resources.files("trady_kernels.selection") / "rankings" / f"{model_name}-{metric}.json"
    return LayerRanking.shipped(model_name, metric) if shipped.is_file() else None
