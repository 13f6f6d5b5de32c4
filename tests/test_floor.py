"""The least bytes of a step, beside counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from floor import floor
from torch import nn

N, SIZE = 3, 6
MAP = N * 4 * SIZE * SIZE  # elements of what the first convolution returns


class Attend(nn.Module):
    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, 4, 6, 6), the maps as heads
        return F.scaled_dot_product_attention(-input, input, input, dropout_p=self.dropout_p)


class Gate(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * input.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class Case:
    """``conv(3 -> 4), *between, conv(4 -> 2)``."""

    name: str
    between: Callable[[], tuple[nn.Module, ...]]
    selected: dict[str, int] = field(default_factory=lambda: {"first": 2, "last": 3})
    channels: int = N * SIZE * SIZE * (2 + 3) * 4
    bits: int = 0
    pooled: int = 0
    other: int = 0


CASES = (
    Case("nothing between", tuple),
    Case("relu", lambda: (nn.ReLU(),), bits=-(-MAP // 8)),
    Case("in place, after a norm", lambda: (nn.BatchNorm2d(4), nn.ReLU6(inplace=True)), bits=-(-MAP // 8)),
    Case("dropout", lambda: (nn.Dropout(0.5),), bits=-(-MAP // 8)),
    Case("below the lowest layer", lambda: (nn.SiLU(),), {"last": 3}, N * SIZE * SIZE * 3 * 4),
    Case("max pooling", lambda: (nn.MaxPool2d(3, 1, 1),), pooled=MAP),
    Case("average pooling", lambda: (nn.AvgPool2d(3, 1, 1),)),
    Case("silu keeps its input", lambda: (nn.SiLU(),), other=4 * MAP),
    Case("both factors", lambda: (Gate(),), other=4 * (MAP + N * 4)),
    Case("shared storage counts once", lambda: (Gate(), nn.SiLU()), other=4 * (2 * MAP + N * 4)),
    Case("attention with dropout", lambda: (Attend(0.5),), other=4 * 2 * MAP + MAP // 8),
    Case("the whole batch is a reference", tuple, {"first": 3}, 0),
    Case("the head trains whole", tuple, {}, N * SIZE * SIZE * 4 * 4),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counts_by_hand(case: Case) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(3, 4, 1))
    for index, module in enumerate(case.between()):
        model.add_module(f"between{index}", module)
    model.add_module("last", nn.Conv2d(4, 2, 1))
    model[0].bias.requires_grad_(False)
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    least = floor(model, torch.randn(N, 3, SIZE, SIZE), case.selected, "last" if not case.selected else None)
    found = (least.selected, least.bits, least.pooled, sum(least.other.values()))
    assert found == (case.channels, case.bits, case.pooled, case.other)
    assert least.bytes == sum(found)
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == before
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_autocast_stores_its_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        least = floor(model, torch.randn(N, 3, SIZE, SIZE), {"0": 1, "2": 4}, None)
    assert least.selected == 2 * N * SIZE * SIZE * 5
    assert sum(least.other.values()) == 2 * MAP
