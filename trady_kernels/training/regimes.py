"""How a scheme trains a network: a sampler's channels through sparse layers, or everything, dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.convert import conversion_report, sparsify, trainable_parameters
from trady_kernels.cost import Budget, LayerCost, measure_layers, total
from trady_kernels.selection import SCHEMES, ChannelSampler, LayerRanking, channel_norms
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.lora import RANK, add_adapters, merged_state
from trady_kernels.training.settings import Settings
from trady_kernels.training.velocity import NeuronVelocities, fastest, neuron_outputs


@dataclass(frozen=True)
class SelectionCost:
    """What the channels of the current epoch take.

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
        batches: gives a few training batches, always the same, for schemes that measure something.
    """

    spec: Spec
    model: nn.Module
    example_input: Example
    head: str | None
    settings: Settings
    batches: Callable[[], Iterable[tuple[Example, torch.Tensor]]]

    @property
    def budget(self) -> int | str:
        """The scheme's own budget, or that of the settings."""
        return self.settings.budget if self.spec.budget is None else self.spec.budget

    @property
    def layers(self) -> dict[str, LayerCost]:
        """The plain network's layers and what their channels cost, the head left out."""
        layers = measure_layers(self.model, self.example_input)
        return {name: layer for name, layer in layers.items() if name != self.head}


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
        find_ranking(settings.ranking, settings.model, kind.metric)
        kind.for_network(settings.model, settings.layer_fractions)


class _Dense:
    """Trains the plain network, everything in it."""

    def __init__(self, start: Start) -> None:
        self.model = start.model
        self.full_cost = total(layer.full for layer in start.layers.values()).elements
        for ingredient in start.spec.ingredients:
            if ingredient.dense is not None:
                ingredient.dense(self.model)
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


class _Velocity(_Dense):
    """Trains the output neurons that change fastest, out of a dense network: activations are kept whole."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._batches = start.batches
        self._velocities = NeuronVelocities()
        self._generator = torch.Generator().manual_seed(start.settings.seed)
        self._costs = start.layers
        self._layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in self._costs}
        self._full = total(cost.full for cost in self._costs.values())
        budget = Budget.parse(start.budget)
        self._limit = budget.limit(self._full)
        self._prices = {
            name: layer.weight[0].numel() * (layer.weight.element_size() if budget.kind == "bytes" else 1)
            for name, layer in self._layers.items()
        }
        self.model.requires_grad_(False)
        if start.head is not None:
            self.model.get_submodule(start.head).requires_grad_(True)
        self._masks: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            layer.weight.requires_grad_(True)  # for the hook; whether it trains is decided at each draw
            layer.weight.register_post_accumulate_grad_hook(partial(self._mask, name))
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.notes = [
            "output neurons are chosen; the budget counts their weights alone, activations are kept whole: not like for like",
            "norms are frozen, statistics and affine",
            *start.spec.notes,
        ]
        self._choose()

    def _mask(self, name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad[~self._masks[name].to(weight.device)] = 0

    def _choose(self) -> None:
        outputs = neuron_outputs(self.model, self._layers, (batch[0] for batch in self._batches()))
        velocities = self._velocities.update(outputs)
        self._select(fastest(velocities, self._prices, self._limit, self._generator))

    def _select(self, masks: dict[str, torch.Tensor]) -> None:
        self._masks = masks
        for name, layer in self._layers.items():
            layer.weight.requires_grad_(bool(masks[name].any()))
            layer.weight.grad = None

    def parameters(self) -> list[nn.Parameter]:
        return self._trained

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        self._choose()

    def selection_cost(self) -> SelectionCost:
        weights = activations = macs = 0
        for name, mask in self._masks.items():
            chosen, cost = int(mask.sum()), self._costs[name].full
            weights += chosen * self._layers[name].weight[0].numel()
            activations += cost.activation_elements * bool(chosen)
            macs += cost.macs * chosen // len(mask)
        return SelectionCost(
            weights + activations,
            weights / self._full.weight_elements,
            activations / self._full.activation_elements,
            macs / self._full.macs,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "velocities": self._velocities.state_dict(),
            "generator": self._generator.get_state(),
            "masks": self._masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._velocities.load_state_dict(state["velocities"])
        self._generator.set_state(state["generator"])
        self._select(state["masks"])


class _Lora(_Dense):
    """Trains low-rank adapters of the last layers."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        costs = start.layers
        self._full = total(cost.full for cost in costs.values())
        self.model.requires_grad_(False)
        chosen, self._cost = add_adapters(self.model, costs, Budget.parse(start.budget), self._full)
        if start.head is not None:  # PEFT freezes what is no adapter
            self.model.get_submodule(start.head).requires_grad_(True)
        self.notes = [
            f"adapters of rank {RANK} in the last {len(chosen)} layers without groups; the budget counts their weights and the layers' whole inputs",
            "norms are frozen, statistics and affine",
            *start.spec.notes,
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def selection_cost(self) -> SelectionCost:
        cost, full = self._cost, self._full
        return SelectionCost(
            cost.elements,
            cost.weight_elements / full.weight_elements,
            cost.activation_elements / full.activation_elements,
            cost.macs / full.macs,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return merged_state(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["network"])


class _Sparse:
    """Trains the channels that a sampler chooses, and keeps those alone."""

    def __init__(self, start: Start) -> None:
        model, settings = start.model, start.settings
        kind = SCHEMES[start.spec.scheme]
        scheme = kind.for_network(settings.model, settings.layer_fractions)
        ranking = find_ranking(settings.ranking, settings.model, kind.metric)
        options = {"biases": scheme.bias_layers, **start.spec.sparsify}
        reached = len(scheme.reach(start.layers))
        if options["biases"] is True and reached < len(start.layers):
            options["biases"] = reached  # those below would take the backward pass further down
        self.model = sparsify(model, start.example_input, head=start.head or "auto", **options)
        self._sampler = ChannelSampler(
            model,
            start.example_input,
            budget=start.budget,
            scheme=scheme,
            ranking=ranking,
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
        if kind.ranked and ranking is None:
            self.notes.append("no layer ranking: channels are drawn from every sparse layer")
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
        cost, full = self._sampler.cost, self._sampler.full_cost
        return SelectionCost(
            cost.elements,
            cost.weight_elements / full.weight_elements,
            cost.activation_elements / full.activation_elements,
            cost.macs / full.macs,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)


#: What trains a network without choosing channels of it; every other scheme is one of ``SCHEMES``.
REGIMES: dict[str, Callable[[Start], Regime]] = {"full": _Dense, "velocity": _Velocity, "lora": _Lora}


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
