"""How a scheme trains a network: a sampler's channels through sparse layers, or everything, dense."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.convert import conversion_report, sparsify, trainable_parameters
from trady_kernels.cost import measure_layers, total
from trady_kernels.selection import SCHEMES, ChannelSampler, LayerRanking


@dataclass(frozen=True)
class SelectionCost:
    """What the channels of the current epoch take.

    Args:
        elements: weights and activations of one sample.
        gradient_share: multiply-accumulates of their weight gradients over those of all channels.
    """

    elements: int
    gradient_share: float


class Regime(Protocol):
    """A network made ready for one scheme.

    Args:
        model: the network that trains; its state dict has the plain network's keys and values.
        full_cost: elements of one sample that all channels of all layers take.
        notes: what a reader of the scheme's results must know.
    """

    model: nn.Module
    full_cost: int
    notes: list[str]

    def parameters(self) -> list[nn.Parameter]:
        """What to give the optimiser."""

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose the next epoch's channels; the first epoch's are chosen already."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A training step is done: choose channels anew if the settings ask for it."""

    def train_mode(self) -> None:
        """Put the network into training mode, norm statistics frozen."""

    def selection_cost(self) -> SelectionCost:
        """What the epoch's channels take."""

    def state_dict(self) -> dict[str, Any]:
        """What going on after an interruption needs beyond the network's weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""


def prepare_dense(model: nn.Module) -> nn.Module:
    """Put a plain network into training mode with its norm statistics frozen; all parameters train."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return model


def prepare_regime(
    scheme: str,
    model: nn.Module,
    example_input: Example,
    *,
    head: str | None,
    budget: int | str,
    ranking: LayerRanking | None,
    resampling: str,
    seed: int,
) -> Regime:
    """Make a plain network ready for a scheme, in place.

    Args:
        scheme: ``"full"`` leaves the network dense; any other is one of ``SCHEMES``.
        model: the network.
        example_input: the input of a training batch.
        head: name of the classifier, which trains whole; None to look for it.
        budget: for the schemes that have one.
        ranking: for the schemes that take one.
        resampling: when they draw again.
        seed: of the sampler's draws.

    Raises:
        ValueError: no such scheme, or a bad budget or ranking.
    """
    if scheme == "full":
        return _Dense(model, example_input, head)
    return _Sparse(scheme, model, example_input, head, budget, ranking, resampling, seed)


class _Dense:
    def __init__(self, model: nn.Module, example_input: Example, head: str | None) -> None:
        self.model = model
        layers = measure_layers(model, example_input)
        self.full_cost = total(layer.full for name, layer in layers.items() if name != head).elements
        self.notes = ["all parameters train, biases and norm affines too; norm statistics are frozen"]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def train_mode(self) -> None:
        prepare_dense(self.model)

    def selection_cost(self) -> SelectionCost:
        return SelectionCost(self.full_cost, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Sparse:
    def __init__(
        self,
        scheme: str,
        model: nn.Module,
        example_input: Example,
        head: str | None,
        budget: int | str,
        ranking: LayerRanking | None,
        resampling: str,
        seed: int,
    ) -> None:
        self.model = sparsify(model, example_input, head=head or "auto")
        self._sampler = ChannelSampler(
            model,
            example_input,
            budget=budget,
            scheme=scheme,
            ranking=ranking,
            resampling=resampling,
            seed=seed,
        )
        self.full_cost = self._sampler.full_cost.elements
        self.notes = ["norms are frozen, statistics and affine"]
        if SCHEMES[scheme].ranked and ranking is None:
            self.notes.append("no layer ranking: channels are drawn from every sparse layer")
        if SCHEMES[scheme].budgeted:
            if self._sampler.cost.elements == self.full_cost:
                self.notes.append("the budget is above the full cost: every channel is selected")
            elif not self._sampler.cost.elements:
                self.notes.append("the budget is below the cheapest channel: none is selected")
        if dense := conversion_report(model).dense:
            self.notes.append(f"stay dense and frozen: {', '.join(dense)}")

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
        cost = self._sampler.cost
        return SelectionCost(cost.elements, cost.macs / self._sampler.full_cost.macs)

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)


def find_ranking(file: str | Path | None, model_name: str) -> LayerRanking | None:
    """The ranking in ``file``, or without one the ranking that ships for the model, or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no ranking.
    """
    if file is not None:
        return LayerRanking.load(file)
    shipped = resources.files("trady_kernels.selection") / "rankings" / f"{model_name}.json"
    return LayerRanking.shipped(model_name) if shipped.is_file() else None
