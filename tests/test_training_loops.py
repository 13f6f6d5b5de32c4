"""Training loops around a whole lean network, against the same loop around the dense one with its norms in evaluation mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import as_trained
from processes import TWO_FORWARDS, in_processes, needs_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_network

Tensors = list[torch.Tensor]


def conv(inputs: int, outputs: int, act: nn.Module | None = None, **arguments: int) -> list[nn.Module]:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **arguments), nn.BatchNorm2d(outputs)]
    return layers if act is None else [*layers, act]


class Skip(nn.Module):
    """Two convolutions, a skip, and one activation module used for both sums."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, channels)
        self.conv2, self.norm2 = conv(channels, channels, groups=2)
        self.act = act

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.conv1(input)))
        x = self.norm2(self.conv2(x))
        x += input
        return self.act(x)


class Net(nn.Module):
    """A stem that pools, skips, and what else stands between layers; every activation keeps bits once lean."""

    def __init__(self, inplace: bool = True, p: float = 0.3) -> None:
        super().__init__()
        act = nn.ReLU(inplace=inplace)
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), *conv(3, 6, nn.ReLU6(inplace=inplace)), nn.MaxPool2d(3, 2, 1)
        )
        self.body = nn.Sequential(
            Skip(6, act),
            nn.Sequential(*conv(6, 8, nn.LeakyReLU(0.1, inplace=inplace), stride=2), nn.Dropout(p)),
            Skip(8, act),  # the same activation once more
            nn.Sequential(*conv(8, 8, nn.Hardtanh(-0.7, 0.9, inplace=inplace)), nn.AvgPool2d(2, padding=1)),
        )
        self.neck = nn.Sequential(nn.Linear(8, 7), nn.ReLU6(inplace=inplace), nn.Dropout(p))
        self.head = nn.Linear(7, 4)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(F.adaptive_avg_pool2d(features, 1).flatten(1)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, 3, H, W) -> (N, 4)
        return self.classify(self.body(self.stem(input)))


class Shared(nn.Module):
    """One convolution with its norm in two places, the second time before another activation; a block twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(*conv(5, 5))
        self.stem = nn.Sequential(*conv(3, 5, nn.ReLU()))
        self.first = nn.Sequential(shared, nn.LeakyReLU(0.2))
        self.second = nn.Sequential(shared, nn.ReLU6())
        self.block = Skip(6, nn.LeakyReLU(0.3))
        self.widen = nn.Conv2d(5, 6, 1)
        self.norm = nn.BatchNorm2d(6)  # after two convolutions
        self.other = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.stem(input)))
        x = torch.relu_(self.norm(self.widen(x))) + F.relu6(self.norm(self.other(x)), inplace=True)
        return self.head(self.block(self.block(x)).mean((2, 3)))


class Kept(nn.Module):
    """Outputs of layers are needed again after the activation behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(3, 6)
        self.conv2, self.norm2 = conv(6, 6)
        self.act = nn.LeakyReLU(0.1)
        self.gate = nn.Hardsigmoid()
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.clip = nn.Hardtanh()
        self.head = nn.Linear(6, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first = self.norm1(self.conv1(input))
        x = self.act(first)
        second = self.conv2(x)
        x = self.act(self.norm2(second)) * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = self.clip(x + first) * second.tanh()
        return self.head(x.flatten(2).amax(2))


def flat(p: float = 0.3) -> nn.Sequential:
    """Nothing but a sequence, which ``checkpoint_sequential`` may cut anywhere."""
    return nn.Sequential(
        *conv(3, 6, nn.LeakyReLU(0.1)),
        *conv(6, 6, nn.ReLU()),
        nn.Conv2d(6, 6, 1),
        nn.Hardsigmoid(),
        nn.Dropout(p),
        *conv(6, 6, nn.Hardtanh()),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def batch(number: int = 0, size: tuple[int, int] = (13, 11)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=output.dtype)
    return (output * weights).sum() + output.square().mean()


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A lean network in training mode, and the dense one whose norms are in evaluation mode."""
    torch.manual_seed(1)
    dense = as_trained(make()).double().train()
    lean = tk.sparsify(copy.deepcopy(dense), batch()).train()
    tk.select_fraction(lean, 0.4)
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return lean, dense


def check(found: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    assert found is not None and expected is not None, what
    assert found.shape == expected.shape, what
    error, size = (found - expected).detach().abs().max().item(), expected.detach().abs().max().item()
    assert size > 0 and error <= 1e-8 * size, f"{what}: off by {error:.1e} of {size:.1e}"


def check_gradients(lean: nn.Module, dense: nn.Module) -> None:
    modules = dict(dense.named_modules())
    for name, layer in sparse_layers(lean).items():
        if len(layer.channels):
            weight = modules[name].weight.grad
            assert weight is not None, name
            check(layer.channel_weight.grad, layer.read_rows(weight, layer.channels), name)
    head = tk.conversion_report(lean).head
    assert head is not None
    for name, parameter in lean.get_submodule(head).named_parameters():
        check(parameter.grad, modules[head].get_parameter(name).grad, f"{head}.{name}")


# -- loops: what they do to a network, and the outputs and input gradients they see ------------------


def one_step(model: nn.Module) -> Tensors:
    x = batch().requires_grad_()
    output = model(x)
    loss_of(output).backward()
    assert x.grad is not None
    return [output, x.grad]


def accumulation(model: nn.Module) -> Tensors:
    return [tensor for _ in range(3) for tensor in one_step(model)]


def two_forwards(model: nn.Module) -> Tensors:
    first, second = model(batch(1)), model(batch(2, (12, 17)))
    (loss_of(first) + 2 * loss_of(second)).backward()
    return [first, second]


def backward_twice(model: nn.Module) -> Tensors:
    output = model(batch())
    loss_of(output).backward(retain_graph=True)
    loss_of(output.square()).backward()
    return [output]


def evaluation_before_backward(model: nn.Module) -> Tensors:
    output = model(batch())
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        other = model.eval()(batch(1))
    for module, mode in modes.items():
        module.training = mode
    loss_of(output).backward()
    return [output, other]


def channels_last(model: nn.Module) -> Tensors:
    output = model.to(memory_format=torch.channels_last)(batch().to(memory_format=torch.channels_last))
    loss_of(output).backward()
    return [output]


def through_functional_call(model: nn.Module) -> Tensors:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    output = torch.func.functional_call(model, state, (batch(),))
    loss_of(output).backward()
    return [output]


def after_copies(model: nn.Module) -> Tensors:
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    outputs = one_step(copied)
    for name, parameter in copied.named_parameters():
        model.get_parameter(name).grad = parameter.grad
    return outputs


def checkpointed(model: nn.Module, use_reentrant: bool) -> Tensors:
    assert isinstance(model, Net)
    x = batch().requires_grad_()
    features = checkpoint(model.stem, x, use_reentrant=use_reentrant)
    for block in model.body:
        features = checkpoint(block, features, use_reentrant=use_reentrant)
    output = model.classify(features)
    loss_of(output).backward()
    assert x.grad is not None
    return [output, x.grad]


def cut(model: nn.Module, segments: int, use_reentrant: bool) -> Tensors:
    assert isinstance(model, nn.Sequential)
    x = batch().requires_grad_()
    output = checkpoint_sequential(model, segments, x, use_reentrant=use_reentrant)
    loss_of(output).backward()
    assert x.grad is not None
    return [output, x.grad]


@dataclass(frozen=True)
class Loop:
    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensors]


PLAIN: Mapping[str, Callable[[nn.Module], Tensors]] = {
    "one step": one_step,
    "gradient accumulation": accumulation,
    "two forwards, one backward": two_forwards,
    "backward twice": backward_twice,
    "evaluation before backward": evaluation_before_backward,
    "channels_last": channels_last,
    "functional_call": through_functional_call,
    "copied and pickled": after_copies,
}
LOOPS = (
    *(Loop(f"in place, {name}", Net, run) for name, run in PLAIN.items()),
    *(
        Loop(f"out of place, {name}", partial(Net, inplace=False), PLAIN[name])
        for name in ("one step", "two forwards, one backward", "channels_last")
    ),
    *(
        Loop(f"{make.__name__}, {name}", make, PLAIN[name])
        for make in (Shared, Kept, flat)
        for name in ("one step", "two forwards, one backward", "backward twice")
    ),
    *(
        Loop(f"checkpoint, reentrant {reentrant}", make, partial(checkpointed, use_reentrant=reentrant))
        for make in (Net, partial(Net, inplace=False))
        for reentrant in (False, True)
    ),
    *(
        Loop(
            f"{segments} segments, reentrant {reentrant}",
            flat,
            partial(cut, segments=segments, use_reentrant=reentrant),
        )
        for segments in (2, 5, 7, 15)
        for reentrant in (False, True)
    ),
)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_equals_the_dense_network(loop: Loop) -> None:
    lean, dense = pair(loop.make)
    results = []
    for model in (lean, dense):
        torch.manual_seed(2)  # the same dropout
        results.append(loop.run(model))
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        check(found, expected, f"result {index}")
    check_gradients(lean, dense)


def test_forward_mode_without_gradients_equals_the_dense_network() -> None:
    lean, dense = pair(Net)
    x, tangent = batch(1), batch(2)
    with pytest.raises(NotImplementedError, match="sparse and lean layers have no forward-mode derivative"):
        torch.func.jvp(lean, (x,), (tangent,))
    with torch.no_grad():
        for found, expected in zip(
            *(torch.func.jvp(m.eval(), (x,), (tangent,)) for m in (lean, dense)), strict=True
        ):
            check(found, expected, "output or derivative")


# -- compiled --------------------------------------------------------------------------------------


def two_steps(model: nn.Module) -> Tensors:
    outputs = [model(batch(number)) for number in (1, 2)]
    torch.stack([loss_of(output) for output in outputs]).sum().backward()
    outputs.append(model(batch(3)))
    loss_of(outputs[-1]).backward()
    return outputs


COMPILED = (
    pytest.param(Net, "aot_eager", id="Net"),
    pytest.param(flat, "aot_eager", id="flat"),
    pytest.param(Shared, "aot_eager", id="Shared", marks=pytest.mark.slow),
    pytest.param(Kept, "aot_eager", id="Kept", marks=pytest.mark.slow),
    *(
        pytest.param(make, "inductor", id=f"{make.__name__}, inductor", marks=pytest.mark.slow)
        for make in (Net, Shared, Kept, flat)
    ),
)


@pytest.mark.parametrize(("make", "backend"), COMPILED)
def test_compiled_as_one_graph(make: Callable[[], nn.Module], backend: str) -> None:
    lean, dense = pair(make)
    for module in (*lean.modules(), *dense.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the compiler draws other numbers
    torch._dynamo.reset()
    compiled = torch.compile(lean, fullgraph=True, backend=backend)
    for found, expected in zip(two_steps(compiled), two_steps(dense), strict=True):
        check(found, expected, "output")
    check_gradients(lean, dense)
    torch._dynamo.reset()


# -- on two processes ------------------------------------------------------------------------------


def train(model: nn.Module, inner: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(tk.trainable_parameters(inner), 0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = (model(x), model(-x)) if TWO_FORWARDS else (model(x),)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        optimizer.step()
    return inner.state_dict()


def work(rank: int) -> dict[str, torch.Tensor]:
    lean, _ = pair(partial(flat, p=0.0))
    wrapped = DistributedDataParallel(lean)
    x = torch.cat([batch(rank), batch(5 + rank)])
    measure_network(wrapped, x)  # the wrapper must not wait for a backward pass of this run
    return train(wrapped, lean, x)


@needs_gloo
def test_two_processes_equal_one(tmp_path: Path) -> None:
    states = in_processes(work, tmp_path)
    lean, _ = pair(partial(flat, p=0.0))
    x = torch.cat([batch(number) for number in (0, 5, 1, 6)])
    before = {name: value.clone() for name, value in lean.state_dict().items()}
    expected = train(lean, lean, x)
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    for state in states:
        for name, value in state.items():
            if value.is_floating_point():
                check(value, expected[name], name)
