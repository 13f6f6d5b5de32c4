from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from networks import ResidualNet, as_trained
from torch import nn

from trady_kernels.cost import Budget, Cost, LayerCost, measure_layers, total
from trady_kernels.models import MobileNetV2


def test_mobilenet_v2_costs_what_the_paper_says() -> None:
    layers = measure_layers(MobileNetV2(width=0.35), torch.randn(2, 3, 128, 128))
    layers.pop("classifier")
    full = total(layer.full for layer in layers.values())
    assert len(layers) == 52
    assert (full.weight_elements, full.activation_elements) == (288_864, 963_456)
    assert full.elements == 1_252_320


@dataclass(frozen=True)
class Case:
    name: str
    layer: nn.Module
    input: tuple[int, ...]
    channels: int
    weight: int
    activation: int
    macs: int


CASES = (
    Case("conv", nn.Conv2d(6, 10, (3, 5), stride=2), (4, 6, 9, 11), 6, 150, 99, 150 * 4 * 4),
    Case("depthwise", nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 7, 5), 6, 18, 35, 18 * 35),
    Case("grouped", nn.Conv2d(6, 9, 1, groups=3), (2, 6, 4, 4), 6, 3, 16, 48),
    Case("unbatched conv", nn.Conv2d(6, 10, 1), (6, 4, 4), 6, 10, 16, 160),
    Case("linear", nn.Linear(6, 10), (3, 6), 6, 10, 1, 10),
    Case("tokens", nn.Linear(6, 10), (3, 7, 6), 6, 10, 7, 70),
    Case("unbatched linear", nn.Linear(6, 10), (6,), 6, 10, 1, 10),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cost_of_a_channel(case: Case, dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(case.layer)).to(dtype)
    cost = measure_layers(model, torch.randn(case.input, dtype=dtype))["0"]
    batched = len(case.input) > (3 if isinstance(case.layer, nn.Conv2d) else 1)
    batch = case.input[0] if batched else 1
    stored = (case.weight + batch * case.activation) * dtype.itemsize
    assert cost == LayerCost("0", case.channels, Cost(case.weight, case.activation, stored, case.macs))


def test_a_layer_called_twice_stores_two_inputs_and_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.layer(input=self.layer(input))

    cost = measure_layers(Twice(), torch.randn(3, 6))["layer"]
    assert cost.channel == Cost(6, 2, 4 * (6 + 2 * 3), 2 * 6)


def test_bytes_are_counted_in_the_dtype_that_autocast_stores() -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        cost = measure_layers(model, torch.randn(3, 6))["0"]
    assert cost.channel.bytes == 4 * 10 + 2 * 3


def test_measuring_leaves_no_trace() -> None:
    model = as_trained(ResidualNet()).train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def draw(module: nn.Module, args: object) -> None:
        torch.rand(3)

    model.register_forward_pre_hook(draw)
    measure_layers(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.blocks[0].norm1.training and not model.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


GOOD = (
    (28_000, Budget("elements", 28_000)),
    ("28000", Budget("elements", 28_000)),
    ("256KiB", Budget("bytes", 262_144)),
    (" 1 MB ", Budget("bytes", 1_000_000)),
    ("0.5 MiB", Budget("bytes", 524_288)),
    ("100 b", Budget("bytes", 100)),
    ("2kb", Budget("bytes", 2_000)),
    ("5%", Budget("share", 0.05)),
    (".5 %", Budget("share", 0.005)),
    ("150%", Budget("share", 1.5)),
)


@pytest.mark.parametrize(("given", "expected"), GOOD, ids=lambda value: repr(value))
def test_budgets(given: int | str, expected: Budget) -> None:
    budget = Budget.parse(given)
    assert budget.kind == expected.kind
    assert budget.amount == pytest.approx(expected.amount)


BAD = (
    ("12 bananas", ValueError),
    ("", ValueError),
    ("MB", ValueError),
    ("0", ValueError),
    ("0 KiB", ValueError),
    ("0.4 B", ValueError),
    ("0%", ValueError),
    ("-5%", ValueError),
    ("nan", ValueError),
    ("nan%", ValueError),
    ("inf MB", ValueError),
    ("1e400 MB", ValueError),
    ("9" * 400 + " MB", ValueError),
    ("1.5", ValueError),
    ("5 %%", ValueError),
    (0, ValueError),
    (-3, ValueError),
    (float("nan"), TypeError),
    (float("inf"), TypeError),
    (0.05, TypeError),
    (True, TypeError),
    (None, TypeError),
    ([5], TypeError),
)


@pytest.mark.parametrize(("given", "error"), BAD, ids=lambda value: repr(value))
def test_bad_budgets_get_one_sentence(given: object, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Budget.parse(given)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"budget: got {given!r}, expected a positive int")
    assert "\n" not in message


def test_share_is_of_elements_and_rounds_down() -> None:
    full = Cost(weight_elements=90, activation_elements=109, bytes=7, macs=3)
    assert Budget.parse("50%").limit(full) == 99
    assert Budget.parse("50%").of(full) == 199
    assert Budget.parse("50B").limit(full) == 50
    assert Budget.parse("50B").of(full) == 7


@pytest.mark.parametrize("example", [None, "text", 3, (), {"a": 1}], ids=repr)
def test_bad_example_is_named(example: object) -> None:
    with pytest.raises(TypeError, match=r"example_input: got .*expected a tensor"):
        measure_layers(ResidualNet(), example)  # type: ignore[arg-type]
