from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.memory import peak_memory, saved_by_module

N, C, SIZE = 4, 6, 5
MAP = N * C * SIZE * SIZE * 4  # bytes of one activation


def x() -> torch.Tensor:
    return torch.randn(N, C, SIZE, SIZE)


@dataclass(frozen=True)
class Case:
    name: str
    layers: Callable[[], tuple[nn.Module, ...]]
    by_kind: dict[str, int]


class Elsewhere(nn.Module):
    """What another library calls its own activation, norm or layer: it keeps its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


def named(name: str, *children: nn.Module) -> nn.Module:
    module = type(name, (Elsewhere,), {})()
    for index, child in enumerate(children):
        module.add_module(str(index), child)
    return module


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Gated(nn.Module):
    """A skip and a scale around a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(C, C, 1)
        self.scale = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x) * self.scale


CONV = nn.Conv2d(C, C, 1)
CASES = (
    Case("conv", lambda: (CONV, nn.Conv2d(C, C, 1)), {"conv input": MAP}),
    Case("norm", lambda: (CONV, nn.BatchNorm2d(C)), {"norm": MAP + 2 * C * 4}),  # and the batch's statistics
    Case("activation", lambda: (CONV, nn.SiLU()), {"activation": MAP}),
    Case(
        "an output that two keep counts once",
        lambda: (CONV, nn.ReLU(), nn.Conv2d(C, C, 1)),
        {"activation": MAP},
    ),
    Case("dropout", lambda: (CONV, nn.Dropout(0.5)), {"dropout": MAP}),
    Case("pooling", lambda: (CONV, nn.AvgPool2d(1)), {"pooling": MAP}),
    Case("linear", lambda: (CONV, nn.Linear(SIZE, 2)), {"linear input": MAP}),
    Case("residual", lambda: (CONV, Gated()), {"conv input": MAP, "residual": MAP}),
    Case(
        "a subclass of torch's norm",
        lambda: (CONV, LayerNorm2d(C)),
        {"norm": MAP + 2 * 4 * N * SIZE * SIZE},  # and each position's statistics
    ),
    Case("a leaf that nothing tells", lambda: (CONV, nn.Identity(), named("Squares")), {"other": MAP}),
)
#: Class names of timm, Hugging Face and torchvision that subclass no layer of torch's.
FOREIGN = {
    "GELUActivation": "activation",
    "QuickGELU": "activation",
    "HardSwish": "activation",
    "RmsNorm2dFp32": "norm",
    "T5LayerNorm": "norm",
    "EvoNorm2dB0": "norm",
    "DropPath": "dropout",
    "BeitDropPath": "dropout",
    "StochasticDepth": "dropout",
    "FastAdaptiveAvgPool": "pooling",
    "BlurPool2d": "pooling",
    "BertSelfAttention": "attention",
    "EfficientChannelAttn": "attention",
    "Conv1D": "linear input",
    "Rotation": "other",
}
#: The same with modules inside: what their own operations keep.
FOREIGN_CONTAINERS = {
    "RmsNormAct2d": "norm",
    "Attention": "attention",
    "Conv2dNormActivation": "residual",
    "ConvNormAct": "residual",
    "BertPooler": "residual",
    "SqueezeExcite": "residual",
    "SwiGLU": "residual",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kinds(case: Case) -> None:
    model = nn.Sequential(*case.layers()).train()
    report = tk.measure_memory(model, x())
    assert report.by_kind == case.by_kind
    assert report.saved_bytes == sum(case.by_kind.values()) == sum(report.by_module.values())
    assert report.batch_bytes == MAP  # the first convolution's input
    assert {name.partition(".")[0] for name in report.by_module} <= {"0", "1", "2"}


def test_kinds_of_classes_that_subclass_none_of_torchs() -> None:
    def kind(module: nn.Module) -> str:
        (kind,) = tk.measure_memory(nn.Sequential(CONV, module), x()).by_kind
        return kind

    assert {name: kind(named(name)) for name in FOREIGN} == FOREIGN
    with_children = {name: kind(named(name, nn.Identity())) for name in FOREIGN_CONTAINERS}
    assert with_children == FOREIGN_CONTAINERS


def test_what_a_bare_forward_keeps() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.SiLU(), Gated())
    batch = x()
    with saved_by_module(model, batch) as saved:
        output = model(batch)
    assert saved.by_module == {"1": MAP, "2.inner": MAP, "2": MAP} and saved.batch_bytes == MAP
    assert saved.parameter_bytes == 4 * (2 * C * C + C)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    output.sum().backward()
    assert saved.saved_bytes == 3 * MAP
    with torch.no_grad(), saved_by_module(model) as saved:
        model(batch)
    assert (saved.saved_bytes, saved.parameter_bytes, saved.batch_bytes) == (0, 0, 0)


def test_a_storage_at_the_address_of_a_dropped_one_counts() -> None:
    class Drops(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            addresses = [x.exp().data_ptr() for _ in range(20)]  # an output is saved, and goes with its graph
            assert len(set(addresses)) < 20
            return x

    model = nn.Sequential(nn.Conv2d(C, C, 1), Drops())
    assert tk.measure_memory(model, x()).by_module["1"] == 20 * MAP


def test_gradients_by_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.Linear(SIZE, 2).requires_grad_(False))
    report = tk.measure_memory(model, torch.randn(N, 3, SIZE, SIZE))
    assert report.gradients == {"0.weight": 4 * 3 * C, "0.bias": 4 * C}
    assert report.gradient_bytes == 4 * 4 * C


class Between(nn.Module):
    """Everything that becomes lean, between two convolutions, and an activation that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.5)
        self.gelu = nn.GELU()
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.pool(self.relu(self.norm(self.conv(x)))))
        x = self.last(self.gelu(x))
        return self.head((x * x.sigmoid()).mean((2, 3)))


def test_what_lean_modules_keep_counts_under_their_kind() -> None:
    batch = torch.randn(4, 3, 32, 32)
    full, pooled = 4 * 8 * 32 * 32, 4 * 8 * 16 * 16  # elements

    def by_kind(lean: Any) -> dict[str, int]:
        model = tk.sparsify(as_trained(Between()).train(), batch, lean=lean)
        model.conv.select([0, 2])
        return dict(tk.measure_memory(model, batch).by_kind)

    selected, head = 4 * 2 * 4 * 32 * 32, 4 * 8 * 4
    bits = {"conv input": selected, "pooling": pooled, "dropout": pooled // 8, "linear input": head}
    exact = by_kind(True)
    assert exact == bits | {"activation": full // 8 + 4 * pooled, "residual": 2 * 4 * pooled}
    codes = pooled + 4 * pooled // 64  # one byte an element, a scale for 64
    assert by_kind("8bit") == bits | {"activation": full // 8 + codes, "residual": 2 * codes}


def test_views_count_their_whole_storage_once() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return (y[:, :1] * y[:, 1:2]) * y[:, 2:3]

    report = tk.measure_memory(Views(), torch.randn(16, 8))
    products = 16 * 4
    assert report.saved_bytes == 16 * 8 * 4 + products
    assert report.by_kind == {"residual": report.saved_bytes}
    assert report.by_module == {"": report.saved_bytes}


@pytest.mark.parametrize("budget", ["5%", "2KiB", "60%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counted_and_measured_agree(budget: str, dtype: torch.dtype) -> None:
    model = as_trained(ResidualNet()).to(dtype)
    batch = (torch.randn(4, 3, 16, 16, dtype=dtype), torch.tensor([0, 1, 2, 3]))
    sampler = tk.ChannelSampler(tk.sparsify(model, batch[0]), batch[0], budget=budget)
    report = tk.measure_memory(model, batch, F.cross_entropy)
    of_layers = {name: report.by_module.get(name, 0) for name in sparse_layers(model)}
    gradients = sum(report.gradients.get(f"{name}.channel_weight", 0) for name in of_layers)
    assert gradients + sum(of_layers.values()) == sampler.cost.bytes
    for name, channels in sampler.selection.items():
        stored = sampler.layers[name].channel.activation_elements * len(channels) * len(batch[0])
        assert of_layers[name] == stored * dtype.itemsize, name


def test_counted_and_measured_agree_under_autocast() -> None:
    model = as_trained(ResidualNet())
    batch = (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        sampler = tk.ChannelSampler(tk.sparsify(model, batch[0]), batch[0], budget="30%")
        report = tk.measure_memory(model, batch, F.cross_entropy)
    stored = sum(report.by_module.get(name, 0) for name in sparse_layers(model))
    assert stored == sampler.cost.bytes - 4 * sampler.cost.weight_elements > 0


def test_autocasts_copies_of_weights_are_no_inputs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        report = tk.measure_memory(model, torch.randn(16, 8))
    assert report.by_kind == {"linear input": 2 * 16 * 8 * 2, "other": 8 * 4 * 2}


def test_an_input_of_the_weights_shape_is_an_input() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    assert tk.measure_memory(model, torch.randn(4, 8)).by_kind == {"linear input": 4 * 8 * 4}


def test_a_selected_layer_keeps_less_than_a_dense_one() -> None:
    dense = as_trained(ResidualNet()).train()
    batch = (torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
    before = tk.measure_memory(dense, batch, F.cross_entropy)
    sparse = tk.sparsify(dense, batch[0])
    tk.select_fraction(sparse, 0.1)
    after = tk.measure_memory(sparse, batch, F.cross_entropy)
    assert after.by_kind["conv input"] < before.by_kind["conv input"] / 4
    frozen = tk.conversion_report(sparse).frozen_norms
    assert not any(name in after.by_module for name in frozen)
    assert all(name in before.by_module for name in frozen)
    assert after.peak_bytes < before.peak_bytes


def test_peak_contains_what_is_saved() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.SiLU(), nn.SiLU(), nn.SiLU())
    batch = torch.randn(16, C, 64, 64)
    report = tk.measure_memory(model, batch)
    size = batch.numel() * 4
    assert report.saved_bytes == 3 * size
    # The saved outputs and the last one at the end of the forward; a few gradients on top.
    assert 4 * size <= report.peak_bytes <= 8 * size
    assert report.device == "cpu"


def test_measuring_leaves_no_trace() -> None:
    model = as_trained(ResidualNet()).train()
    model.dropout.p = 0.5
    batch = (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    state = torch.get_rng_state()
    tk.measure_memory(model, batch, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name] and torch.equal(parameter.grad, copies[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.zero_grad()
    tk.measure_memory(model, batch, F.cross_entropy)
    assert all(parameter.grad is None for parameter in model.parameters())


class Counting(nn.Module):
    """Buffers that a forward replaces: a counter, and a cache as long as the batch."""

    count: torch.Tensor
    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.cached = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        if self.cached < len(x):
            self.cached, self.cache = len(x), torch.arange(float(len(x)))
        return self.layer(x) + self.cache[: len(x), None]


def test_buffers_that_a_forward_replaces_are_put_back_but_for_caches_that_grow() -> None:
    model = Counting()
    count = model.count
    tk.measure_memory(model, torch.randn(5, 3))
    assert model.count is count and model.count.item() == 0
    assert model.cached == len(model.cache) == 5  # the module would not make it again


COMPILE: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "wrapped": lambda net: torch.compile(net, backend="eager"),  # type: ignore[dict-item]
    "in place": lambda net: net.compile(backend="eager") or net,  # type: ignore[func-returns-value]
    "part": lambda net: nn.Sequential(torch.compile(net[:3], backend="eager"), *net[3:]),
}


@pytest.mark.parametrize("way", COMPILE)
def test_a_compiled_network_is_measured_as_it_runs_uncompiled(way: str) -> None:
    net = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.SiLU(), nn.Flatten(), nn.Linear(150, 2))
    expected = tk.measure_memory(net, x())
    net[0].forward = torch.compile(net[0].forward, backend="eager")
    model = COMPILE[way](net)
    found = tk.measure_memory(model, x())
    assert found.by_kind == expected.by_kind and len(found.by_module) == len(expected.by_module)
    torch._dynamo.reset()


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layer(x) + shift}


def test_kinds_of_batch() -> None:
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    model = Keywords()
    saved = 5 * 3 * 4
    for batch in ({"x": a, "shift": b}, ((a, b), None), ({"x": a, "shift": b}, None)):
        report = tk.measure_memory(model, batch)
        assert (report.saved_bytes, report.batch_bytes) == (0, saved)
    with_loss = tk.measure_memory(model, {"x": a, "shift": b}, lambda output: output["logits"].square().sum())
    assert with_loss.by_kind == {"other": 5 * 2 * 4}


def test_report_is_a_table_and_json() -> None:
    report = tk.measure_memory(nn.Sequential(nn.Conv2d(C, C, 1), nn.SiLU()), x())
    lines = str(report).splitlines()
    assert lines[0].split() == ["activation", f"{MAP:,}", "B", "0.00", "MiB"]
    assert lines[1].split()[3] == f"{MAP:,}"
    content = json.loads(json.dumps(report.to_dict()))
    assert content["by_kind"] == {"activation": MAP} and content["saved_bytes"] == MAP


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (3, TypeError, "batch: got int, expected a tensor, a pair"),
        ((1, 2, 3), ValueError, "batch: got a tuple of 3, expected a pair"),
        ((3, None), TypeError, "example_input: got int, expected a tensor"),
    ],
)
def test_bad_batches_get_one_sentence(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        tk.measure_memory(nn.Linear(3, 2), batch)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_network_that_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got a loss that depends on no parameter that requires"):
        tk.measure_memory(nn.Linear(3, 2).requires_grad_(False), torch.randn(2, 3))


def test_the_garbage_collector_does_not_change_a_peak() -> None:
    """A ring of 1 MiB, then as much again: the ring is there until the end, however eager the collector is."""

    class Ring:
        def __init__(self) -> None:
            self.ring, self.tensor = self, torch.empty(2**18)

    before = gc.get_threshold()
    try:
        peaks = []
        for threshold in (1, 100_000):
            gc.set_threshold(threshold)
            with peak_memory(torch.device("cpu")) as peak:
                Ring()
                _ = [[] for _ in range(100)]  # objects, at which an eager collector comes
                torch.empty(2**18)
            peaks.append(peak.bytes)
    finally:
        gc.set_threshold(*before)
    assert peaks == [2**21, 2**21] and gc.isenabled()
