"""Sparse layers under DistributedDataParallel on two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import TWO_FORWARDS, WORLD, in_processes, needs_gloo
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from trady_kernels import ChannelSampler, SparseConv2d, SparseLinear, sparsify, trainable_parameters


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """But for rounding: each process sums its half of the batch in float32, over several steps."""
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def network() -> nn.Sequential:
    return nn.Sequential(
        SparseConv2d(4, 6, 3, padding=1, channels=[0, 2]),
        nn.BatchNorm2d(6),  # buffers of its own, broadcast at every forward
        SparseConv2d(6, 6, 3, groups=2, channels=[]),
        nn.Flatten(),
        SparseLinear(6 * 9, 5, channels=7),
        nn.Linear(5, 3),
    )


def batch() -> torch.Tensor:
    return torch.randn(2 * WORLD, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    outputs = (model(x), model(-x)) if TWO_FORWARDS else (model(x),)
    return torch.stack([output.square().sum() for output in outputs]).sum() / len(x)


def train(model: nn.Module, inner: nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    inner[1].eval()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01)
    for selection in ([0, 2], [1, 2], [0, 3]):
        inner[0].select(selection)  # type: ignore[operator]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    inner[2].select([1, 5])  # type: ignore[operator]  # other counts: a new wrapper
    wrapped = DistributedDataParallel(inner) if dist.is_initialized() else inner
    optimizer.zero_grad()
    loss_of(wrapped, x).backward()
    optimizer.step()
    return inner.state_dict()


def work(rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(rank)  # other weights and channels on each rank: the wrapper takes rank 0's
    inner = network()
    state = train(DistributedDataParallel(inner), inner, batch().chunk(WORLD)[rank])
    return inner[4].channels, state


@needs_gloo
def test_equals_one_process(tmp_path: Path) -> None:
    results = in_processes(work, tmp_path)
    torch.manual_seed(0)
    single = network()
    expected = train(single, single, batch())
    for channels, state in results:
        assert channels.tolist() == single[4].channels.tolist()
        assert_same(state, expected)


def other_counts(rank: int) -> list[str]:
    x = batch().chunk(WORLD)[rank]
    refused = []
    for index, selection in ((0, [1]), (2, [3]), (4, [])):  # fewer, some of none, none of some
        inner = network()
        wrapped = DistributedDataParallel(inner)
        wrapped(x).sum().backward()
        inner[index].select(selection)  # type: ignore[operator]
        try:
            wrapped(x)
        except RuntimeError as error:
            refused.append(str(error))
        DistributedDataParallel(inner)(x).sum().backward()
    return refused


@needs_gloo
def test_another_number_of_channels_needs_a_new_wrapper(tmp_path: Path) -> None:
    for refused in in_processes(other_counts, tmp_path):
        assert [text.partition("expected")[0] for text in refused] == [
            f"channels: got {count} of them in a layer whose DistributedDataParallel was made for {made}, "
            for count, made in ((1, 2), (1, 0), (0, 7))
        ]


@needs_gloo
def test_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for model in (SparseLinear(4, 3, channels=2), nn.Sequential(SparseConv2d(4, 3, 3, channels=2))):
            with pytest.raises(TypeError, match=r"^weight: got a DTensor, expected a plain parameter"):
                fully_shard(model, mesh=mesh)
        with pytest.raises(TypeError, match=r"^weight: got a DTensor, expected a plain parameter"):
            parallelize_module(nn.Sequential(SparseLinear(4, 4)), mesh, {"0": ColwiseParallel()})
    finally:
        dist.destroy_process_group()


def resample(rank: int | None) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 3)
    )
    sparsify(model, batch())
    sampler = ChannelSampler(model, batch(), budget="30%", scheme="d-full-random", counts="fixed", seed=3)
    network = model if rank is None else DistributedDataParallel(model)
    x = batch() if rank is None else batch().chunk(WORLD)[rank]
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.01, momentum=0.9)
    selections = []
    for _ in range(3):
        sampler.resample(optimizer)
        selections.append([index for channels in sampler.selection.values() for index in channels.tolist()])
        for _ in range(2):
            optimizer.zero_grad()
            (network(x).square().sum() / len(x)).backward()
            optimizer.step()
    return selections, model.state_dict()


@needs_gloo
def test_fixed_counts_are_drawn_anew_in_one_wrapper(tmp_path: Path) -> None:
    expected_selections, expected = resample(None)
    assert len({tuple(selection) for selection in expected_selections}) > 1
    for selections, state in in_processes(resample, tmp_path):
        assert selections == expected_selections
        assert_same(state, expected)


@pytest.mark.parametrize(
    "options",
    ({}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}, {"cpu_offload": True}),
    ids=str,
)
@pytest.mark.parametrize("cls", (torch.optim.Adam, torch.optim.SGD))
def test_distributed_checkpoint_of_a_selection(cls: Any, options: dict[str, bool]) -> None:
    def make() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = nn.Sequential(SparseLinear(6, 4, channels=[0, 1]), nn.Linear(4, 2))
        arguments = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        return model, cls(trainable_parameters(model), lr=0.01, **arguments)

    def steps(model: nn.Sequential, optimizer: torch.optim.Optimizer, count: int) -> None:
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(5, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    steps(model, optimizer, 2)
    model[0].select([1, 2, 5], optimizer)  # type: ignore[operator]
    steps(model, optimizer, 1)
    kind = StateDictOptions(**options)
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=kind))
    other, fresh = make()
    other[0].select([1, 2, 5])  # type: ignore[operator]
    missing, unexpected = set_state_dict(
        other, fresh, model_state_dict=saved[0], optim_state_dict=saved[1], options=kind
    )
    assert not missing and not unexpected
    for one in ((model, optimizer), (other, fresh)):
        steps(*one, 2)
        one[0][0].select([0, 5], one[1])  # type: ignore[operator]
        steps(*one, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
