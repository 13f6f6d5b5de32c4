"""Other people's networks, whole: exact outputs and gradients, a round trip, and what they keep."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from floor import floor
from networks import as_trained, near_own_statistics
from torch import nn
from whole_networks import FRACTION, NETWORKS, Network, loss

import trady_kernels as tk
from trady_kernels.convert import sparse_layers

CLASSES, BATCH = 10, 2
#: Largest error relative to the largest element, in float64: many layers, each summing in its own order.
OUTPUT, GRADIENT = 1e-9, 1e-8
#: The most that a step may keep, as a multiple of its floor, by what the network's activations are.
RELU_LIKE, EXACT, EIGHT_BIT = 1.15, 1.1, 0.4


def networks(*slow: str) -> pytest.MarkDecorator:
    """Runs a test on every network, on those named in the slow set."""
    marked = [
        pytest.param(network, id=network.name, marks=pytest.mark.slow if network.name in slow else ())
        for network in NETWORKS
    ]
    return pytest.mark.parametrize("network", marked)


@functools.cache
def _trained(network: Network) -> nn.Module:
    torch.manual_seed(0)
    model = as_trained(network.make(CLASSES, network.small)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # train() and eval() are then the same, but for the norms
    return near_own_statistics(model, lambda model: run(model, batch(network)[0])).eval()


def trained(network: Network) -> nn.Module:
    """The dense network in float64, in evaluation mode, its values as after training."""
    if network.missing is not None:
        pytest.skip(network.missing)
    return copy.deepcopy(_trained(network))


def batch(
    network: Network, size: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Any, torch.Tensor]:
    input, target = network.batch(BATCH, CLASSES, size or network.small)
    return (input.to(dtype) if isinstance(input, torch.Tensor) else input), target


def run(model: nn.Module, input: Any) -> torch.Tensor:
    output = model(**input) if isinstance(input, dict) else model(input)
    return getattr(output, "logits", output)


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float, what: str = "output") -> None:
    assert within > 0, f"{what}: nothing to compare with"
    error = float((found - expected).detach().abs().max())
    assert error <= within, f"{what}: off by {error:.2g}, expected at most {within:.2g}"


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max())


@networks()
def test_outputs_and_gradients_are_the_dense_networks(network: Network) -> None:
    dense, (input, target) = trained(network), batch(network)
    sparse = tk.sparsify(copy.deepcopy(dense), input)
    expected = run(dense, input)
    within = OUTPUT * largest(expected)
    with torch.no_grad():
        assert_near(run(sparse, input), expected, within)
    selection = tk.select_fraction(sparse.train(), 0.05)
    output = run(sparse, input)
    assert_near(output, expected, within)
    for made in (expected, output):
        loss(made, target).backward()
    for name, layer in sparse_layers(sparse).items():
        gradient = dense.get_parameter(f"{name}.weight").grad
        rows = layer.read_rows(gradient, selection[name])
        assert_near(layer.channel_weight.grad, rows, GRADIENT * largest(gradient), name)
    head = tk.conversion_report(sparse).head
    assert head is not None
    for key, parameter in sparse.get_submodule(head).named_parameters():
        gradient = dense.get_parameter(f"{head}.{key}").grad
        assert_near(parameter.grad, gradient, GRADIENT * largest(gradient), f"{head}.{key}")

    # other values, of the same order
    with torch.no_grad():
        for value in dense.state_dict().values():
            if value.is_floating_point():
                value *= torch.empty_like(value).uniform_(0.8, 1.2)
        sparse.load_state_dict(dense.state_dict(), strict=True)
        expected = run(dense, input)
        assert largest(expected - output) > OUTPUT * largest(expected)
        assert_near(run(sparse, input), expected, OUTPUT * largest(expected), "output after loading")


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.001, weight_decay=0.1),
}


@networks("MobileNetV2", "ResNet-50")
@pytest.mark.parametrize("optimizer", [pytest.param("SGD", marks=pytest.mark.slow), "AdamW"])
def test_round_trip_through_a_step(network: Network, optimizer: str) -> None:
    model, plain, (input, target) = trained(network), trained(network), batch(network)
    before, classes = plain.state_dict(), [type(module) for module in model.modules()]
    tk.sparsify(model.train(), input)
    selection = tk.select_fraction(model, 0.05)
    step = OPTIMIZERS[optimizer](tk.trainable_parameters(model))
    loss(run(model, input), target).backward()
    step.step()
    for name, layer in sparse_layers(model).items():
        every = torch.arange(layer.channel_count)
        change = layer.read_rows(layer.weight - before[f"{name}.weight"], every).abs().flatten(1).sum(1)
        assert change.nonzero().flatten().tolist() == selection[name].tolist(), name
    with torch.no_grad():
        expected = run(model.eval(), input)
    tk.densify(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == list(before)
    plain.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert_near(run(plain, input), expected, OUTPUT * largest(expected))


# -- what a step keeps -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    name: str
    context: Callable[[], AbstractContextManager[Any]]
    slow: bool = False


PRECISIONS = (
    Precision("float32", nullcontext),
    Precision("bfloat16 autocast", lambda: torch.autocast("cpu", torch.bfloat16), slow=True),
)


def of_precision(precision: Precision) -> Any:
    return pytest.param(precision, id=precision.name, marks=pytest.mark.slow if precision.slow else ())


def untrained(network: Network, size: int) -> nn.Module:
    if network.missing is not None:
        pytest.skip(network.missing)
    return network.make(CLASSES, size)


def keeps(network: Network, size: int, lean: bool | str, half: bool) -> tuple[int, int]:
    """Bytes that a step keeps, and its floor; all layers have selected channels, or those of the upper half."""
    example = batch(network, size, torch.float32)
    model = untrained(network, size)
    tk.sparsify(model, example[0], lean=lean)
    tk.select_fraction(model, float(FRACTION.rstrip("%")) / 100)
    layers = sparse_layers(model)
    for layer in list(layers.values())[: len(layers) // 2] if half else ():
        layer.select(())
    counts = {name: len(layer.channels) for name, layer in layers.items()}
    saved = tk.measure_memory(model, example, loss).saved_bytes
    return saved, floor(untrained(network, size), example[0], counts, tk.conversion_report(model).head).bytes


@networks()
@pytest.mark.parametrize(
    "half", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all layers", "upper half"]
)
def test_a_step_keeps_little_more_than_its_floor(network: Network, half: bool) -> None:
    saved, least = keeps(network, network.small, lean=True, half=half)
    assert 0.99 * least <= saved <= (RELU_LIKE if network.relu_like else EXACT) * least


@pytest.mark.parametrize(
    "network", [n for n in NETWORKS if not n.relu_like], ids=lambda network: network.name
)
def test_eight_bits_keep_less_than_the_exact_floor(network: Network) -> None:
    size = {224: 128, 128: 64}[network.size]  # at smaller sizes the scales and what stays as it is weigh more
    saved, least = keeps(network, size, lean="8bit", half=False)
    assert saved <= EIGHT_BIT * least


@pytest.mark.parametrize("precision", [of_precision(precision) for precision in PRECISIONS])
@networks("MobileNetV2", "ResNet-50")
def test_a_budget_holds_for_measured_bytes(network: Network, precision: Precision) -> None:
    example = batch(network, dtype=torch.float32)
    model = untrained(network, network.small)
    with precision.context():
        tk.sparsify(model, example[0])
        sampler = tk.ChannelSampler(model, example[0], budget="64KiB", scheme="d-full-random")
        report = tk.measure_memory(model, example, loss)
        loss(run(model, example[0]), example[1]).backward()
    layers = sparse_layers(model)
    activations = sum(report.by_module.get(name, 0) for name in layers)
    rows = [layer.channel_weight.grad for layer in layers.values()]
    gradients = sum(row.numel() * row.element_size() for row in rows if row is not None)
    assert activations > 0 and gradients > 0
    assert 0.9 * 2**16 <= activations + gradients <= 2**16
    assert activations + gradients == sampler.cost.bytes
