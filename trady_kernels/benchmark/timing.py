"""Interleaved medians, by the host's clock or a GPU's events.

All contenders of a row run interleaved, in a new order each round (the same orders in every run): the one after
a large call starts with cold caches, and on a shared machine only figures of the same rounds compare. Rotating
would not do, since each contender would keep its predecessor.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

#: Rounds where the time decides: a median wants some, and more than these no longer change it.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100


def calm_malloc() -> None:
    """Restart this Python with an allocator that keeps large blocks.

    glibc returns large temporaries to the system at every call and faults them in again at the next, which
    makes ATen's times bimodal by up to ten times. The settings are read at start only.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
        "MALLOC_TOP_PAD_": str(1 << 28),
    }
    if sys.platform == "linux" and any(name not in os.environ for name in settings):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings})


def clock() -> Callable[[], float]:
    """The thread's own time where there is one thread: what others take on a shared machine is not in it."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _on_host(calls: Sequence[Callable[[], object]]) -> list[float]:
    now = clock()
    times = []
    for call in calls:
        start = now()
        call()
        times.append(now() - start)
    return times


#: Bytes written before each call on a GPU, several times its cache: in a training step, too, others have been there.
_FLUSHED = 1 << 28
#: Clock cycles that a GPU waits before each call, half a millisecond: the host has by then launched all of it. A tenth is too
#: little for a virtual machine.
_HEAD_START = 1_000_000


@cache
def _flush_buffer(device: int) -> torch.Tensor:
    return torch.empty(_FLUSHED, dtype=torch.int8, device=f"cuda:{device}")


def _on_gpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Between two events around each call, so that the time is the GPU's own and not the host's."""
    buffer = _flush_buffer(torch.cuda.current_device())
    events = []
    for call in calls:
        buffer.zero_()
        torch.cuda._sleep(_HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


_SECONDS: dict[str, Callable[[Sequence[Callable[[], object]]], list[float]]] = {
    "cpu": _on_host,
    "cuda": _on_gpu,
}


def interleaved(
    contenders: Mapping[Name, Callable[[], object]],
    rounds: int | None = None,
    *,
    seconds: float = 1.0,
    device: str = "cpu",
) -> dict[Name, float]:
    """Median microseconds of each contender over rounds of all of them, each in another order.

    Args:
        contenders: what to time, by name.
        rounds: how many; by default as many as fit into ``seconds``, from 5 to 100.
        seconds: see ``rounds``.
        device: type of the device that they run on, ``"cpu"`` or ``"cuda"``.
    """
    names = list(contenders)
    times: dict[Name, list[float]] = {name: [] for name in names}

    def one_round(order: list[Name]) -> float:
        start = time.perf_counter()
        found = _SECONDS[device]([contenders[name] for name in order])
        for name, value in zip(order, found, strict=True):
            times[name].append(value)
        return time.perf_counter() - start

    took = one_round(names)  # to warm up
    if rounds is None:
        if device != "cpu":  # kernels were compiled in the first one
            took = one_round(names)
        rounds = min(max(int(seconds / max(took, 1e-6)), FEWEST_ROUNDS), MOST_ROUNDS)
    for values in times.values():
        values.clear()
    for turn in range(rounds):
        one_round(random.Random(turn).sample(names, len(names)))
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}
