"""Resident memory: what the operating system sees a training step take, nothing hidden from it."""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from trady_kernels.batch import Example, loss_of, without_trace

P = ParamSpec("P")
R = TypeVar("R")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MMAP_THRESHOLD = 64 * 1024  # a block from here on is a mapping of its own, gone when it is freed


@dataclass(frozen=True)
class ResidentReport:
    """Resident bytes that one training step adds to its process.

    Attributes:
        graph_bytes: growth while the graph of a forward is alive: what is kept for backward, wherever it is kept.
        peak_bytes: high-water mark of forward and backward above the loaded network; contains the gradients.
    """

    graph_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The report as plain numbers, for JSON."""
        return asdict(self)


def unavailable() -> str | None:
    """Why resident memory cannot be measured here, in one sentence; None where it can."""
    missing = next((path for path in (_STATUS, _CLEAR_REFS) if not path.exists()), None)
    if missing is not None:
        return f"resident memory: {missing} is not there, which only Linux has"
    if not all(hasattr(ctypes.CDLL(None), name) for name in ("malloc_trim", "mallopt")):
        return "resident memory: the C library has no malloc_trim and mallopt, which only glibc has"
    return None


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a Python process started for it, which ends with it.

    From its start the process gives every freed block of 64 KiB or more back to the system at once.

    Args:
        function: importable by its name, as pickle needs it.
        args, kwargs: its arguments, which are pickled.

    Returns:
        Its result.

    Raises:
        RuntimeError: the process died without one.
        Exception: whatever the function raises.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_free_at_once) as process:
        try:
            return process.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{getattr(function, '__name__', function)}: its process died without a result, expected one; it "
                "may have run out of memory"
            ) from error


def measure_resident(
    model: nn.Module, batch: Example, loss_fn: Callable[..., torch.Tensor] | None = None
) -> ResidentReport:
    """Run one training step and measure what the process grows by.

    A copy of the network runs a step before, so that the code pages, thread stacks and primitives of oneDNN
    that a first step loads are in no figure; whatever the network itself keeps is. The batch was there before.
    The figures are whole pages of 4 KiB, and the kernel's own counter may be a few hundred KiB late.

    Args:
        model, batch, loss_fn: as in ``measure_memory``; on the CPU.

    Returns:
        The growth in bytes.

    Raises:
        RuntimeError: the system does not tell resident memory, or the caller is not run by
            ``in_fresh_process``: an allocator that keeps freed blocks makes the figures too high.
        TypeError, ValueError: as in ``measure_memory``.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    if not _frees_at_once:
        raise RuntimeError(
            "measure_resident: got a call in a process that keeps freed memory, expected one inside "
            "in_fresh_process(function, ...)"
        )
    with without_trace(model), torch.enable_grad():
        loss_of(copy.deepcopy(model), batch, loss_fn).backward()
        before = _settled()
        _CLEAR_REFS.write_text("5")  # the high-water mark is from now on
        loss = loss_of(model, batch, loss_fn)
        graph = _settled() - before
        loss.backward()
        return ResidentReport(graph_bytes=graph, peak_bytes=_resident("VmHWM") - before)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"resident memory: {_STATUS} has no {field}, expected Linux 2.6 or later")
    return int(match[1]) * 1024


def _settled() -> int:
    """Resident bytes once everything free is back with the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS")


_frees_at_once = False


def _free_at_once() -> None:
    if unavailable() is not None:
        return
    global _frees_at_once
    _frees_at_once = True
    mallopt: Any = ctypes.CDLL(None).mallopt
    for setting, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, 0),
        (_M_TOP_PAD, 0),
    ):
        mallopt(setting, value)
