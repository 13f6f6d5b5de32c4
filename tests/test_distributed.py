"""Sparse layers under DistributedDataParallel on two processes."""

from __future__ import annotations

import inspect
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trady_kernels import SparseConv2d, SparseLinear

WORLD = 2
# Before torch's broadcast of buffers kept their version counters, one between two forwards made the backward of
# anything raise that had saved a buffer, nn.BatchNorm2d's in training too.
TWO_FORWARDS = "_unsafe_preserve_version_counter" in inspect.getsource(DistributedDataParallel)


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


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(rank)  # other weights and channels on each rank: the wrapper takes rank 0's
        inner = network()
        state = train(DistributedDataParallel(inner), inner, batch().chunk(WORLD)[rank])
        torch.save((inner[4].channels, state), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)
def test_equals_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), WORLD)
    torch.manual_seed(0)
    single = network()
    expected = train(single, single, batch())
    for rank in range(WORLD):
        channels, state = torch.load(tmp_path / f"{rank}.pt")
        assert channels.tolist() == single[4].channels.tolist()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
