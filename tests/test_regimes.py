"""Regimes without channels: what ``velocity`` and ``lora`` train, and what they cost."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import as_trained
from torch import nn

import trady_kernels as tk
from trady_kernels.cost import measure_layers
from trady_kernels.selection import SCHEMES
from trady_kernels.training.ingredients import WITHOUT_CHANNELS, Spec
from trady_kernels.training.lora import RANK, adapter_cost
from trady_kernels.training.regime import Start
from trady_kernels.training.regimes import REGIMES, prepare_regime
from trady_kernels.training.settings import Settings

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(input)))
        return self.head(F.relu(self.second(F.relu(self.depthwise(x)))).mean((2, 3)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


def started(scheme: str, budget: int | str) -> tuple[Any, Start]:
    torch.manual_seed(0)
    recipe = Settings(schemes=(scheme,), budget=budget, threads=1)
    start = Start(Spec.parse(scheme), Net(), X, "head", recipe, lambda: [(X, Y)])
    return prepare_regime(start), start


def test_every_scheme_without_channels_has_a_regime() -> None:
    assert set(REGIMES) == set(WITHOUT_CHANNELS)
    assert {name for name in WITHOUT_CHANNELS if name in SCHEMES} == {"full"}
    assert not SCHEMES["full"].budgeted and not WITHOUT_CHANNELS["full"]


def test_velocity_trains_whole_neurons_within_the_budget_of_weights() -> None:
    regime, start = started("velocity", 60)
    optimizer = torch.optim.SGD(regime.parameters(), lr=0.1)
    changed = []
    for _ in range(3):
        before = {
            name: layer.weight.detach().clone()
            for name, layer in start.model.named_modules()
            if hasattr(layer, "weight")
        }
        regime.train_mode()
        F.cross_entropy(start.model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = {
            name: (start.model.get_submodule(name).weight != value).flatten(1).any(1)
            for name, value in before.items()
            if name not in ("norm", "head")
        }
        spent = sum(int(moved.sum()) * before[name][0].numel() for name, moved in rows.items())
        # A neuron behind a dead ReLU has no gradient: what moved is part of what was chosen.
        assert 0 < spent <= regime.selection_cost().weight_share * regime._full.weight_elements + 0.5 <= 60.5
        assert (before["head"] != start.model.head.weight).any()
        assert torch.equal(before["norm"], start.model.norm.weight)
        changed.append({name: moved.tolist() for name, moved in rows.items()})
        regime.resample(optimizer)
    assert changed[0] != changed[1]
    cost = regime.selection_cost()
    layers = measure_layers(start.model, X)
    whole = {
        name: layers[name].full.activation_elements for name, mask in regime._masks.items() if mask.any()
    }
    assert cost.elements - sum(whole.values()) <= 60
    assert any("not like for like" in note for note in regime.notes)


def test_a_budget_in_bytes_counts_bytes_of_weights() -> None:
    regime, _ = started("velocity", "240 B")
    other, _ = started("velocity", 60)
    assert all(torch.equal(mask, other._masks[name]) for name, mask in regime._masks.items())


@needs_peft
def test_adapters_of_the_last_layers_within_the_budget() -> None:
    plain = Net()
    layers = measure_layers(plain, X)
    costs = {name: adapter_cost(plain.get_submodule(name), layers[name]) for name in ("first", "second")}  # type: ignore[arg-type]
    assert costs["second"].weight_elements == RANK * (6 + 8)
    assert costs["second"].activation_elements == 8 * 64
    assert costs["second"].bytes == 4 * (RANK * (6 + 8) + 4 * 8 * 64)
    regime, start = started("lora", costs["second"].elements)
    assert regime.selection_cost().elements == costs["second"].elements
    trained = [name for name, p in start.model.named_parameters() if p.requires_grad]
    assert trained == [
        "second.lora_A.default.weight", "second.lora_B.default.weight", "head.weight", "head.bias",
    ]  # fmt: skip
    optimizer = torch.optim.SGD(regime.parameters(), lr=0.5)
    for _ in range(3):
        regime.train_mode()
        F.cross_entropy(start.model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = Net()
    assert (merged.load_state_dict(regime.weights()).missing_keys) == []
    assert (merged.second.weight != plain.second.weight).any()
    start.model.eval()
    torch.testing.assert_close(merged.eval()(X), start.model(X))
    both, _ = started("lora", costs["first"].elements + costs["second"].elements)
    assert both.selection_cost().elements == costs["first"].elements + costs["second"].elements
    with pytest.raises(ValueError, match="below the cheapest adapter"):
        started("lora", 10)


@needs_peft
def test_adapters_keep_their_own_inputs_and_a_bit_of_an_activation() -> None:
    """Norms behind adapted layers stay, and come after what the adapters add."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16),
        nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    as_trained(plain)
    model, recipe = copy.deepcopy(plain), Settings(schemes=("lora",), budget="100%", threads=1)
    regime = prepare_regime(Start(Spec.parse("lora"), model, X, "8", recipe, lambda: [(X, Y)]))
    torch.testing.assert_close(model.eval()(X), plain.eval()(X))
    regime.train_mode()
    saved = tk.measure_memory(model, (X, Y), F.cross_entropy)
    pixels, kinds = 4 * 64, saved.by_kind
    assert kinds["conv input"] == 4 * pixels * (RANK + 8 + RANK)  # the images are the batch
    assert kinds["activation"] == pixels * (8 + 16) // 8 and kinds.get("norm", 0) == 0
    optimizer = torch.optim.SGD(regime.parameters(), lr=0.5)
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = copy.deepcopy(plain)
    merged.load_state_dict(regime.weights())
    assert (merged[0].weight != plain[0].weight).any()
    torch.testing.assert_close(merged.eval()(X), model.eval()(X))


@needs_peft
def test_adapters_in_checkpointed_blocks_have_the_same_gradients_and_keep_less() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(i, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU6()) for i in (3, 8, 8)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    found = {}
    for scheme in ("lora", "lora+checkpoint"):
        torch.manual_seed(1)
        model, recipe = copy.deepcopy(plain), Settings(schemes=(scheme,), budget="100%", threads=1)
        regime = prepare_regime(Start(Spec.parse(scheme), model, X, "3.2", recipe, lambda: [(X, Y)]))
        regime.train_mode()
        F.cross_entropy(model(X), Y).backward()
        gradients = [parameter.grad for parameter in regime.parameters()]
        found[scheme] = gradients, tk.measure_memory(model, (X, Y), F.cross_entropy).saved_bytes
    (gradients, kept), (again, less) = found.values()
    assert len(gradients) > 2 and less < kept
    torch.testing.assert_close(again, gradients)


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        started("lora", 1000)
