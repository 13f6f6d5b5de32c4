"""The same function in two processes of one gloo group."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)
#: Before torch's broadcast of buffers kept their version counters, one between two forwards made the backward of
#: anything raise that had saved a buffer, nn.BatchNorm2d's in training too.
TWO_FORWARDS = "_unsafe_preserve_version_counter" in inspect.getsource(DistributedDataParallel)


def _member(rank: int, work: Callable[[int], Any], port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save(work(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)`` returns in each process; ``work`` is a function of a test module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_member, (work, port, str(folder)), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
