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

from trady_kernels.batch import Example
from trady_kernels.convert import sparsify
from trady_kernels.cost import Budget, Cost, Layer, LayerCost, total
from trady_kernels.models.loading import import_library
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.training.regime import SelectionCost, Start

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


def layers_that_fit(
    model: nn.Module, layers: Mapping[str, LayerCost], budget: Budget, full: Cost
) -> tuple[list[str], Cost]:
    """The last layers, as many as can have adapters within the budget.

    Args:
        model: a plain network.
        layers: those that may have one, in order; layers with groups are left out.
        budget, full: bound of the adapters' cost, as ``adapter_cost`` counts it, and the network's full cost.

    Returns:
        Names of the layers, and the cost of their adapters.

    Raises:
        ValueError: not even one adapter fits.
    """
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
    return chosen, cost


def make_lean(model: nn.Module, example_input: Example, head: str | None, adapted: list[str]) -> None:
    """Freeze a network, in place, and make what stands between its layers keep as little as it can.

    Norms stay behind the layers that get adapters: folded into one, they would come before what the adapter adds.
    """

    def sees_output(*args: Any) -> None:
        """A layer with a hook is not folded."""

    layers = {model.get_submodule(name): type(model.get_submodule(name)) for name in adapted}
    hooks = [layer.register_forward_hook(sees_output) for layer in layers]
    sparsify(model, example_input, head=head or "auto")
    for hook in hooks:
        hook.remove()
    for layer, dense in layers.items():  # PEFT makes adapters of the class that the layer has
        assert isinstance(layer, SparseChannels)
        layer.hand_back(dense)


def add_adapters(model: nn.Module, layers: list[str]) -> None:
    """Give layers adapters, in place; their own weights are frozen, and everything else.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
    """
    peft = _import_peft()
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about saving and merging by PEFT itself
        peft.inject_adapter_in_model(config, model)


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


class Lora:
    """Trains low-rank adapters of the last layers, in a network that keeps as little else as that of a sampler."""

    def __init__(self, start: Start) -> None:
        self.model = start.model
        costs = start.layers
        self._full = total(cost.full for cost in costs.values())
        self.full_cost = self._full.elements
        chosen, self._cost = layers_that_fit(self.model, costs, Budget.parse(start.budget), self._full)
        make_lean(self.model, start.example_input, start.head, chosen)
        add_adapters(self.model, chosen)
        start.finish_dense()
        if start.head is not None:  # PEFT freezes what is no adapter
            self.model.get_submodule(start.head).requires_grad_(True)
        self.notes = [
            f"adapters of rank {RANK} in the last {len(chosen)} layers without groups; the budget counts their weights and the layers' whole inputs",
            "norms are frozen, statistics and affine",
            *start.spec.notes,
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def resample(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def train_mode(self) -> None:
        self.model.train()

    def selection_cost(self) -> SelectionCost:
        return SelectionCost.of(self._cost, self._full)

    def weights(self) -> dict[str, torch.Tensor]:
        return merged_state(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["network"])
