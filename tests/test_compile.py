"""Sparse layers under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import trady_kernels
from trady_kernels import SparseConv2d, SparseLinear
from trady_kernels.nn import FrozenBatchNorm2d, LeanDropout, LeanReLU

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    norm = FrozenBatchNorm2d(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(
        SparseConv2d(4, 6, 3, padding=1, channels=[0, 2]),
        norm,
        nn.ReLU(),
        SparseConv2d(6, 6, 3, padding="same", padding_mode="reflect", groups=2, channels=[]),
        SparseConv2d(6, 4, 2, padding="same", channels=3),
        nn.Flatten(),
        SparseLinear(4 * 25, 5, channels=7),
    )


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).square().sum() + model(-x).square().sum()) / 10


def train(model: nn.Module, inner: nn.Sequential, steps: int) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        for layer, count in ((inner[0], 2), (inner[4], 3), (inner[6], 7)):
            assert isinstance(layer, SparseConv2d | SparseLinear)
            layer.select(torch.randperm(layer.channel_count, generator=generator)[:count], optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, torch.randn(2, 4, 5, 5, generator=generator))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_twelve_resamples_in_one_graph() -> None:
    eager = network()
    inner = copy.deepcopy(eager)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    losses = train(compiled, inner, 12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(
        torch.stack(losses), torch.stack(train(eager, eager, 12)), rtol=1e-4, atol=1e-4
    )
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(inner.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "eager",
    (SparseConv2d(4, 6, 3, padding=1, channels=[0, 2]), SparseLinear(5, 3, channels=[1, 4])),
    ids=("conv", "linear"),
)
def test_inductor(eager: Any) -> None:
    inner = copy.deepcopy(eager)
    compiled = torch.compile(inner, fullgraph=True)
    for model, layer in ((eager, eager), (compiled, inner)):
        generator = torch.Generator().manual_seed(5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
        for chosen in ([0, 2], [1, 2]):
            layer.select(chosen)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, torch.randn(2, 4, 5, 5, generator=generator)).backward()
                optimizer.step()
    torch.testing.assert_close(inner.weight, eager.weight)


@pytest.mark.parametrize(
    "layer",
    (SparseConv2d(4, 6, 3, padding=1, stride=2, channels=[0, 2]), SparseLinear(5, 3, channels=[1, 4])),
    ids=("conv", "linear"),
)
@pytest.mark.parametrize("autocast", (False, True))
def test_gradients(layer: Any, autocast: bool) -> None:
    layer = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    grads = []
    for module in (layer, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(x)
        layer.zero_grad()
        x.grad = None
        output.float().square().sum().backward()
        grads.append((output, x.grad, layer.channel_weight.grad.clone(), layer.bias.grad.clone()))
    for eager, other in zip(*grads, strict=True):
        assert eager.dtype == other.dtype and eager.stride() == other.stride()
        torch.testing.assert_close(other, eager)


def test_channels_last_and_no_grad() -> None:
    layer = SparseConv2d(4, 6, 3, padding=1, channels=[0, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = []
    for module in (layer, compiled):
        (grad,) = torch.autograd.grad(module(x).square().sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_traced_graph_writes_nothing() -> None:
    layer = SparseConv2d(4, 6, 3, channels=[0, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    layer(x)
    version = layer.weight._version
    with torch.no_grad():
        layer.channel_weight.add_(1)
    before = layer.weight.detach().clone()
    compiled(x)
    assert layer.weight._version == version and torch.equal(layer.weight, before)
    layer.synchronize()
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("layer", "shape"),
    (
        (SparseConv2d(4, 6, 3, channels=[0, 2]), (2, 4, 5, 5)),
        (SparseLinear(8, 6, channels=[0, 2]), (3, 8)),
        (SparseLinear(8, 6, channels=[0, 2], stored="8bit"), (3, 8)),
    ),
    ids=("conv2d", "linear", "linear, 8 bit"),
)
def test_select_before_the_backward_of_a_graph_raises(
    layer: SparseConv2d | SparseLinear, shape: tuple[int, ...]
) -> None:
    """As without the compiler: its gradient would be that of the channels before."""
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(shape))
    layer.select([1, 3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_functional_call() -> None:
    layer = SparseConv2d(4, 6, 3, channels=[0, 2])
    x = torch.randn(2, 4, 5, 5)
    rows = torch.randn_like(layer.channel_weight).requires_grad_()

    def call(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"channel_weight": rows}, (x,)).square().sum()

    (expected,) = torch.autograd.grad(call(rows, x), rows)
    (grad,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(rows, x), rows)
    torch.testing.assert_close(grad, expected)


def test_another_forced_backend_compiles_anew() -> None:
    layer = SparseConv2d(4, 6, 3, padding=1, channels=[0, 2])
    compiled = torch.compile(layer, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for name in ("auto", "reference", "auto"):
        with trady_kernels.backend(name):
            compiled(torch.randn(2, 4, 5, 5)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_compiler_does_not_read_the_functions() -> None:
    """It writes down what they do, in a fraction of the time."""
    read: set[str] = set()
    layer = nn.Sequential(SparseConv2d(4, 6, 3, padding=1, channels=[0, 2]), LeanReLU())

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        read.update(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(layer, backend=note, fullgraph=True)(torch.randn(2, 4, 5, 5, requires_grad=True))
    assert read == {"SparseConv2d", "Rectify"}


def test_the_compiler_is_imported_by_nobody_but_its_users() -> None:
    """It takes seconds, and brings Triton. A Function that is there before it is run as well."""
    code = """if True:
        import sys, torch
        import trady_kernels as tk
        print("torch._dynamo" in sys.modules, "triton" in sys.modules)
        read = []
        def note(graph, inputs):
            read.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
            return graph
        layer = tk.SparseConv2d(4, 6, 3, channels=[0, 2])
        torch.compile(layer, backend=note, fullgraph=True)(torch.randn(2, 4, 5, 5)).sum().backward()
        print(read)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False False\n['SparseConv2d']\n", done.stderr


def test_a_backend_forced_inside_of_what_is_compiled() -> None:
    layer = SparseConv2d(4, 6, 3, padding=1, channels=[0, 2])
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with trady_kernels.backend("reference"):
            return layer(x)

    compiled = torch.compile(forward, backend=aot_autograd(fw_compiler=note))
    compiled(torch.randn(2, 4, 5, 5))
    assert "aten.index_select.default" in called and "trady.gather_channels.default" not in called


def test_second_derivatives_are_refused() -> None:
    layer = SparseConv2d(4, 6, 3, padding=1, channels=[0, 2])

    @torch.compile(backend="aot_eager")
    def second(x: torch.Tensor) -> torch.Tensor:
        first = torch.func.grad(lambda x: layer(x).square().sum())
        return torch.func.grad(lambda x: first(x).square().sum())(x)

    with pytest.raises(Exception, match="no double backward"):
        second(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("lean", (LeanReLU(), LeanDropout(0.5)), ids=lambda module: type(module).__name__)
def test_what_lean_modules_give_may_be_written_in_place(lean: nn.Module) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return lean(x * 2).add_(1)

    x = torch.randn(3, 40, requires_grad=True)
    torch.compile(forward, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 2.0, 4.0}
