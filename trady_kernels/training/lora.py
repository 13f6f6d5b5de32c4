"""``lora``: low-rank adapters of the last layers, by the PEFT library."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trady_kernels.cost import Budget, Cost, Layer, LayerCost, total
from trady_kernels.models.loading import import_library
from trady_kernels.training.regime import Dense, SelectionCost, Start

#: Rank of every adapter.
RANK = 4


def adapter_cost(layer: Layer, cost: LayerCost) -> Cost:
    """What an adapter of a layer takes: the layer's whole input is stored, the gradients are those of its two factors.

    Args:
        layer: dense, without groups.
        cost: of its channels.
    """
    outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
    weights = RANK * (outputs + inputs)
    full = cost.full
    itemsize = layer.weight.element_size()
    return Cost(
        weights,
        full.activation_elements,
        full.bytes + (weights - full.weight_elements) * itemsize,
        full.macs * weights // full.weight_elements,
    )


def add_adapters(
    model: nn.Module, layers: Mapping[str, LayerCost], budget: Budget, full: Cost
) -> tuple[list[str], Cost]:
    """Give the last layers adapters, in place, as many as fit the budget; their own weights are frozen.

    Args:
        model: a plain network.
        layers: those that may have one, in order; layers with groups are left out.
        budget, full: bound of the adapters' cost, as ``adapter_cost`` counts it, and the network's full cost.

    Returns:
        Names of the layers with adapters, and their cost.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: not even one adapter fits.
    """
    peft = _import_peft()
    chosen: list[str] = []
    cost, limit = Cost(), budget.limit(full)
    for name in reversed(list(layers)):
        layer: Any = model.get_submodule(name)
        if getattr(layer, "groups", 1) > 1:
            continue
        more = cost + adapter_cost(layer, layers[name])
        if budget.of(more) <= limit:
            chosen.append(name)
            cost = more
    if not chosen:
        raise ValueError(f"budget: got {budget}, which is below the cheapest adapter, expected more")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about saving and merging by PEFT itself
        peft.inject_adapter_in_model(config, model)
    return chosen, cost


def _import_peft() -> ModuleType:
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("scheme: 'lora' needs PEFT; install it with: pip install peft")
    if importlib.util.find_spec("torchvision") is not None:  # PEFT imports it, by way of transformers
        import_library("torchvision")
    return importlib.import_module("peft")


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of the plain network whose weights have the adapters' products added."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            base: Any = module
            delta = base.get_delta_weight("default")
            for key in ("weight", "bias"):
                value = state.pop(f"{name}.base_layer.{key}", None)
                if value is not None:
                    state[f"{name}.{key}"] = value + delta if key == "weight" else value
    return {key: value for key, value in state.items() if ".lora_" not in key}


class Lora(Dense):
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
        return SelectionCost.of(self._cost, self._full)

    def weights(self) -> dict[str, torch.Tensor]:
        return merged_state(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["network"])
