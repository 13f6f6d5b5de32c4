"""What every way of training a network has in common, and the plainest one: everything trains, dense."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.cost import Cost, LayerCost, measure_layers, total
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.settings import Settings


class Batches(Protocol):
    """Gives a few training batches: for a number always the same, for another one others, as far as the samples reach."""

    def __call__(self, number: int = 0) -> Iterable[tuple[Example, torch.Tensor]]: ...


@dataclass(frozen=True)
class SelectionCost:
    """What the selected channels take.

    Args:
        elements: weights and activations of one sample.
        weight_share: elements of the weight gradients over those of all channels.
        activation_share: elements of the stored inputs over those of all channels.
        gradient_share: multiply-accumulates of their weight gradients over those of all channels.
    """

    elements: int
    weight_share: float
    activation_share: float
    gradient_share: float

    @classmethod
    def of(cls, cost: Cost, full: Cost) -> SelectionCost:
        """From what the channels cost and what all of them would."""
        return cls(
            cost.elements,
            cost.weight_elements / full.weight_elements,
            cost.activation_elements / full.activation_elements,
            cost.macs / full.macs,
        )


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
        """What the channels of now take."""

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the plain network."""

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


@dataclass(frozen=True)
class Start:
    """What a regime is made of.

    Attributes:
        spec: scheme and ingredients.
        model: the plain network, to which ``prepare`` of the ingredients has been done.
        example_input: the input of a training batch.
        head: name of the classifier, which trains whole; None to look for it.
        settings: of the run.
        batches: gives a few training batches, for schemes that measure something.
    """

    spec: Spec
    model: nn.Module
    example_input: Example
    head: str | None
    settings: Settings
    batches: Batches

    @property
    def budget(self) -> int | str:
        """The scheme's own budget, or that of the settings."""
        return self.settings.budget if self.spec.budget is None else self.spec.budget

    @property
    def layers(self) -> dict[str, LayerCost]:
        """The plain network's layers and what their channels cost, the head left out."""
        layers = measure_layers(self.model, self.example_input)
        return {name: layer for name, layer in layers.items() if name != self.head}

    def finish_dense(self) -> None:
        """Let the ingredients do what they do to a network that chooses no channels, once it is otherwise ready."""
        for ingredient in self.spec.ingredients:
            if ingredient.dense is not None:
                ingredient.dense(self.model)


class Dense:
    """Trains the plain network, everything in it."""

    def __init__(self, start: Start) -> None:
        self.model = start.model
        self.full_cost = total(layer.full for layer in start.layers.values()).elements
        start.finish_dense()
        self.notes = [
            "all parameters train, biases and norm affines too; norm statistics are frozen",
            *start.spec.notes,
        ]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def train_mode(self) -> None:
        prepare_dense(self.model)

    def selection_cost(self) -> SelectionCost:
        return SelectionCost(self.full_cost, 1.0, 1.0, 1.0)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
