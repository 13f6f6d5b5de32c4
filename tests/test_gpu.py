"""What holds on a GPU alone: streams, graphs, no waiting for the device, precision, and tensors past 2^31 elements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels import SparseConv2d, SparseLinear, backend, select_fraction, sparsify, trainable_parameters
from trady_kernels.benchmark.layers import CONVS, ConvLayer, distinct
from trady_kernels.nn import LeanReLU
from trady_kernels.ops import conv2d_channel_grad, gather_channels, last_kernel, linear_channel_grad, rectify
from trady_kernels.ops.backend import OPERATORS, unavailable
from trady_kernels.ops.conv2d_channel_grad import reference

pytestmark = pytest.mark.gpu


def network() -> nn.Module:
    """Every kind of sparse layer, with few channels selected."""
    return nn.Sequential(
        SparseConv2d(3, 16, 3, padding=1, channels=2),
        LeanReLU(),
        SparseConv2d(16, 16, 3, padding=1, groups=16, channels=5),
        LeanReLU(),
        SparseConv2d(16, 24, 1, channels=4),
        LeanReLU(),
        SparseConv2d(24, 24, 3, stride=2, padding=1, groups=4, channels=6),
        nn.Flatten(),
        SparseLinear(24 * 16 * 16, 10, channels=30),
    ).cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda")


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


# ---- the host waits for nothing -------------------------------------------------------------------------------


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """Called, it makes torch raise wherever the host waits for the GPU from then on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ("cpu", "cuda"))
def test_no_synchronisation(where: str, waiting_is_an_error: Callable[[], None]) -> None:
    """Forward, backward, a step of SGD and a new selection, wherever its indices come from."""
    model, (images, labels) = network(), batch()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1, momentum=0.9)
    selections = {
        name: [torch.randperm(module.channel_count)[: len(module.channels)].to(where) for _ in range(2)]
        for name, module in model.named_children()
        if isinstance(module, SparseConv2d | SparseLinear)
    }

    def step(turn: int) -> None:
        for name, of in selections.items():
            getattr(model, name).select(of[turn])
        loss_of(model, images, labels).backward()
        if where == "cpu":  # an optimiser that holds state asks which channels it belongs to
            optimizer.step()
        optimizer.zero_grad()

    step(0)  # kernels are compiled and libraries loaded
    torch.cuda.synchronize()
    waiting_is_an_error()
    step(1)
    step(0)


@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "bfloat16"))
def test_graph_of_a_training_step(autocast: bool) -> None:
    """Captured once and replayed, the step changes rows and weight as eager steps do."""
    captured, (images, labels) = network(), batch()
    eager = copy.deepcopy(captured)

    def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, images, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    optimizers = [
        torch.optim.SGD(trainable_parameters(model), lr=0.01, momentum=0.9) for model in (captured, eager)
    ]
    step = stepper(captured, optimizers[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(4):
        graph.replay()
    # Capturing runs nothing.
    eager_step = stepper(eager, optimizers[1])
    for _ in range(3 + 4):
        eager_loss = eager_step()
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss, eager_loss, **tolerance)
    for ours, theirs in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(
        captured[4].weight[:, captured[4].channels], captured[4].channel_weight.transpose(0, 1)
    )
    # As many other channels: the graph trains those.
    for model, optimizer in zip((captured, eager), optimizers, strict=True):
        for module in model.modules():
            if isinstance(module, SparseConv2d):
                module.select(module.channel_count - 1 - module.channels.flip(0), optimizer)
    for _ in range(2):
        graph.replay()
        eager_step()
    for ours, theirs in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_current_stream(name: str) -> None:
    """Kernels wait for what their own stream has been given, and for nothing else."""
    if unavailable(name):
        pytest.skip(unavailable(name))
    stream, value = torch.cuda.Stream(), torch.randn(2, 8, 20, 20, device="cuda")
    channels = torch.tensor([1, 6], device="cuda")
    late = torch.zeros_like(value)
    gradient = torch.randn(2, 8, 20, 20, device="cuda")

    def run() -> list[torch.Tensor]:
        compact = gather_channels(late, channels)
        groups = 8 if name == "cuda" else 1
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
        return [
            compact,
            conv2d_channel_grad(compact, gradient, channels, 8, *geometry, groups),
            *rectify(late, 0.0),
        ]

    with backend(name):
        run()  # compiled and loaded
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            late.copy_(value)
            found = run()
        stream.synchronize()
        expected = run()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_every_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("torch.cuda.device_count() is 1: this test needs two GPUs")
    x, channels = torch.randn(2, 8, 9, 9, device="cuda:1"), torch.tensor([1, 6], device="cuda:1")
    for name in ("cuda", "triton"):
        if unavailable(name) is None:
            with backend(name):
                found = gather_channels(x, channels)
            assert found.device == x.device and torch.equal(found, x[:, channels])
    with pytest.raises((RuntimeError, ValueError), match="channels"), backend("cuda"):
        gather_channels(x, channels.to("cuda:0"))


# ---- precision --------------------------------------------------------------------------------------------------

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LAYERS = [layer for layer in distinct(CONVS) if layer.network in ("mobilenet_v2", "resnet50", "resnet18")]


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_layers_of_networks(layer: ConvLayer, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """As chosen, as many times as asked the same bits, within the norm of the dtype of the float64 reference."""
    k = min(4, layer.in_channels)
    channels = torch.randperm(layer.in_channels)[:k].sort().values.cuda()
    x = torch.randn(4, k, layer.size, layer.size, device="cuda").to(dtype)
    dy = torch.randn(4, layer.out_channels, layer.out_size, layer.out_size, device="cuda").to(dtype)
    x, dy = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
    geometry = [(value, value) for value in (layer.kernel, layer.stride, layer.padding, 1)]
    arguments = (channels, layer.in_channels, *geometry, layer.groups)
    actual = conv2d_channel_grad(x, dy, *arguments)
    assert last_kernel("conv2d_channel_grad") != "reference"
    expected = reference(x.double(), dy.double(), *arguments)
    assert (actual.double() - expected).norm() <= LARGEST_ERROR[dtype] * expected.norm()
    assert torch.equal(actual, conv2d_channel_grad(x, dy, *arguments))


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
@pytest.mark.parametrize(("rows", "features", "outputs"), ((25216, 12, 768), (128, 3, 1000), (1, 1, 1)))
def test_linear_layers(rows: int, features: int, outputs: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, features, device="cuda").to(dtype)
    dy = torch.randn(rows, outputs, device="cuda").to(dtype)
    actual, expected = linear_channel_grad(x, dy), x.double().t() @ dy.double()
    assert (actual.double() - expected).norm() <= LARGEST_ERROR[dtype] * expected.norm()
    assert torch.equal(actual, linear_channel_grad(x, dy))


@pytest.mark.parametrize("mode", ("eager", "compiled"))
def test_a_network_trains_as_on_the_cpu(mode: str) -> None:
    on_gpu, (images, labels) = network(), batch()
    on_cpu = copy.deepcopy(on_gpu).cpu().double()
    model = torch.compile(on_gpu, fullgraph=True) if mode == "compiled" else on_gpu
    loss_of(model, images, labels).backward()
    loss_of(on_cpu, images.cpu().double(), labels.cpu()).backward()
    for ours, theirs in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            assert (ours.grad.cpu().double() - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


def test_a_sparsified_network() -> None:
    images = torch.randn(2, 3, 32, 32, device="cuda")
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10))
    model = sparsify(dense.cuda(), images)
    select_fraction(model, 0.5)
    with torch.autocast("cuda", torch.bfloat16):
        model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model))


# ---- past 2^31 elements -----------------------------------------------------------------------------------------

#: Images of 64 channels of 128x128: 2^20 elements each, and 16 more of them than 2^31 elements hold.
IMAGES, TAIL = 2048 + 16, 2


@pytest.fixture
def beyond() -> Iterator[torch.Tensor]:
    """More than 2^31 elements, zero but for the last two images."""
    if torch.cuda.mem_get_info()[1] < 40 << 30:
        pytest.skip("this test needs 40 GiB of GPU memory")
    deterministic = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensor = torch.zeros(IMAGES, 64, 128, 128, dtype=torch.bfloat16, device="cuda")
    tensor[-TAIL:].normal_()
    yield tensor
    torch.utils.deterministic.fill_uninitialized_memory = deterministic
    del tensor
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ("cuda", "triton"))
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
def test_large_offsets(name: str, channels_last: bool, beyond: torch.Tensor) -> None:
    if unavailable(name):
        pytest.skip(unavailable(name))
    if channels_last:
        beyond = beyond.contiguous(memory_format=torch.channels_last)
    channels = torch.tensor([0, 63], device="cuda")
    tail = beyond[-TAIL:]
    with backend(name):
        compact = gather_channels(beyond, channels)
        assert torch.equal(compact[-TAIL:], tail[:, channels])
        output, bits = rectify(beyond, 0.0)
        assert torch.equal(output[-TAIL:], tail.relu())
        few, few_bits = rectify(
            tail.contiguous(memory_format=torch.channels_last) if channels_last else tail, 0.0
        )
        assert torch.equal(bits[-few_bits.numel() :], few_bits) and few.shape == tail.shape
        del output, bits
        for groups in (64,) if name == "cuda" else (1, 64):
            arguments = (channels, 64, (3, 3), (1, 1), (1, 1), (1, 1), groups)
            actual = conv2d_channel_grad(compact, beyond, *arguments)
            expected = reference(compact[-TAIL:].double(), tail.double(), *arguments)
            assert (actual.double() - expected).norm() <= 1e-2 * expected.norm()
        if name == "triton":
            depthwise = OPERATORS["conv2d_depthwise_input_grad"].call
            weight = torch.randn(64, 1, 3, 3, dtype=beyond.dtype, device="cuda")
            size, *geometry = beyond.shape[2:], (1, 1), (1, 1), (1, 1)
            actual = depthwise(beyond, weight, size, *geometry)[-TAIL:]
            expected = depthwise(tail.clone(), weight, size, *geometry)
            assert torch.equal(actual, expected)
