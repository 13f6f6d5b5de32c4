"""Interleaved medians.

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
from collections.abc import Callable, Hashable, Mapping
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


def interleaved(
    contenders: Mapping[Name, Callable[[], object]], rounds: int | None = None, *, seconds: float = 1.0
) -> dict[Name, float]:
    """Median microseconds of each contender over rounds of all of them, each in another order.

    Args:
        contenders: what to time, by name.
        rounds: how many; by default as many as fit into ``seconds``, from 5 to 100.
        seconds: see ``rounds``.
    """
    now = clock()
    names = list(contenders)
    times: dict[Name, list[float]] = {name: [] for name in names}

    def one_round(order: list[Name]) -> None:
        for name in order:
            call = contenders[name]
            start = now()
            call()
            times[name].append(now() - start)

    one_round(names)  # to warm up
    if rounds is None:
        took = sum(values.pop() for values in times.values())
        rounds = min(max(int(seconds / max(took, 1e-6)), FEWEST_ROUNDS), MOST_ROUNDS)
    for values in times.values():
        values.clear()
    for turn in range(rounds):
        one_round(random.Random(turn).sample(names, len(names)))
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}
