"""``velocity``: output neurons that change fastest, out of a dense network (NEq and its budgeted form)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from trady_kernels.batch import Example, call, without_trace
from trady_kernels.cost import Budget, Cost, total
from trady_kernels.selection.fill import that_fit
from trady_kernels.training.regime import Dense, SelectionCost, Start

#: Of the last velocity, how much is taken off [NEq, equation 6: mu_eq].
MOMENTUM = 0.5


class NeuronVelocities:
    """How fast every neuron's output turns, from one epoch to the next.

    With y_i the output of neuron i over all samples and pixels, phi_i is the cosine between y_i now and an epoch ago,
    and v_i = (phi_i - phi_i an epoch ago) - 0.5 v_i an epoch ago. Before the first epoch nothing has turned: phi_i = 1,
    v_i = 0.

    Source: Bragagnolo et al., arXiv 2207.09455, section 3.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, torch.Tensor] = {}
        self._cosines: dict[str, torch.Tensor] = {}
        self._velocities: dict[str, torch.Tensor] = {}

    def update(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take note of the outputs at the end of an epoch; the first call is the start.

        Args:
            outputs: ``{layer name: (neurons, values)}``.

        Returns:
            ``{layer name: (neurons,) float64}``, the velocities; zero at the start.
        """
        for name, now in outputs.items():
            before = self._outputs.get(name)
            if before is None:
                self._cosines[name] = torch.ones(len(now), dtype=torch.float64)
                self._velocities[name] = torch.zeros(len(now), dtype=torch.float64)
            else:
                cosines = torch.cosine_similarity(now.double(), before.double(), dim=1).cpu()
                turned = cosines - self._cosines[name]
                self._velocities[name] = turned - MOMENTUM * self._velocities[name]
                self._cosines[name] = cosines
            self._outputs[name] = now
        return dict(self._velocities)

    def state_dict(self) -> dict[str, Any]:
        """What the next update needs."""
        return {"outputs": self._outputs, "cosines": self._cosines, "velocities": self._velocities}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._outputs = dict(state["outputs"])
        self._cosines = dict(state["cosines"])
        self._velocities = dict(state["velocities"])


def neuron_outputs(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Example]
) -> dict[str, torch.Tensor]:
    """Every output neuron's values, in evaluation mode.

    Args:
        model: the network.
        layers: convolutions and linears of it, by name.
        inputs: what to run it on.

    Returns:
        ``{layer name: (neurons, values)}``, values of all samples and pixels, on the CPU.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def note(name: str, layer: nn.Module) -> Callable[..., None]:
        dimension = 1 if isinstance(layer, nn.Conv2d) else -1

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            found[name].append(output.movedim(dimension, 0).flatten(1).cpu())

        return hook

    with without_trace(model, training=False), torch.no_grad(), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(name, layer)).remove)
        for input in inputs:
            call(model, input)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def fastest(
    velocities: Mapping[str, torch.Tensor],
    prices: Mapping[str, int],
    limit: int,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """The neurons with the largest velocity, whatever its sign, each one that still fits; at random among equals.

    Args:
        velocities: ``{layer name: (neurons,)}``.
        prices: of a neuron of each layer.
        limit: of all prices together.
        generator: of the order among equals: at the start all of them.

    Returns:
        ``{layer name: (neurons,) bool}``.
    """
    names = list(velocities)
    speeds = torch.cat([velocities[name].abs() for name in names])
    price_of = torch.cat([torch.full((len(velocities[name]),), prices[name]) for name in names])
    shuffled = torch.randperm(len(speeds), generator=generator)
    order = shuffled[speeds[shuffled].argsort(descending=True, stable=True)]
    taken = torch.zeros(len(speeds), dtype=torch.bool)
    taken[that_fit(order, price_of, limit)] = True
    return dict(zip(names, taken.split([len(velocities[name]) for name in names]), strict=True))


def _mask(regime: weakref.ref[Velocity], name: str, weight: torch.Tensor) -> None:
    owner = regime()
    assert owner is not None and weight.grad is not None
    weight.grad[~owner._masks[name].to(weight.device)] = 0


class Velocity(Dense):
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
            # What a hook holds is not seen by Python's collector: it would keep the network for good.
            layer.weight.register_post_accumulate_grad_hook(partial(_mask, weakref.ref(self), name))
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.notes = [
            "output neurons are chosen; the budget counts their weights alone, activations are kept whole: not like for like",
            "norms are frozen, statistics and affine",
            *start.spec.notes,
        ]
        self._choose()

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
        for name, layer in self._layers.items():
            momentum = optimizer.state.get(layer.weight, {}).get("momentum_buffer")
            if momentum is not None:  # it would move neurons that no longer train
                momentum[~self._masks[name].to(momentum.device)] = 0

    def selection_cost(self) -> SelectionCost:
        chosen = Cost()
        for name, mask in self._masks.items():
            cost, neurons = self._costs[name].full, int(mask.sum())
            weights = neurons * self._layers[name].weight[0].numel()
            activations = cost.activation_elements * bool(neurons)
            chosen += Cost(weights, activations, macs=cost.macs * neurons // len(mask))
        return SelectionCost.of(chosen, self._full)

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
