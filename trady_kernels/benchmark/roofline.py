"""What a call cannot avoid, over what the machine can do: ``max(bytes / copy bandwidth, FLOPs / FMA peak)``.

Every byte counts once, read or written, and the rates are measured in the run that uses them, with torch's number
of threads. A copy's writes cost more than its reads, so a kernel that mostly reads can stay below its roofline.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from trady_kernels.benchmark.layers import ConvLayer, LinearLayer
from trady_kernels.benchmark.timing import interleaved
from trady_kernels.ops.backend import unavailable

#: Least that is moved from memory: a CPU's cache line, a sector of a GPU's.
_LINES = {"cpu": 64, "cuda": 32}
_RESULT_BYTES = 4  # gradients are float32 whatever the inputs are


@dataclass(frozen=True)
class Work:
    """What a call does at least.

    Attributes:
        bytes: read or written.
        flops: floating-point operations; an FMA is two.
        lines: the bytes again, with those of a tensor of which only some channels are read, a grouped layer's
            ``grad_output`` or what is gathered from, in whole cache lines.
    """

    bytes: int
    flops: int
    lines: int

    def in_lines(self) -> Work:
        """The same with whole cache lines moved, as a CPU does."""
        return Work(self.lines, self.flops, self.lines)


class _Probes(Protocol):
    def copy_bandwidth(self, bytes: int) -> float: ...

    def peak(self, dtype: str) -> float: ...


class _CpuProbes:
    """In C++, with ``threads`` threads."""

    def __init__(self, threads: int) -> None:
        self._compiled = importlib.import_module("trady_kernels._C")
        self._threads = threads

    def copy_bandwidth(self, bytes: int) -> float:
        return self._compiled.copy_bandwidth(bytes, self._threads)

    def peak(self, dtype: str) -> float:
        """float32's multiply-adds for any dtype: a CPU with dot products of bfloat16 exceeds it."""
        return self._compiled.fma_peak(self._threads)


class _GpuProbes:
    """A copy by torch, and the product of two large matrices by its library."""

    def copy_bandwidth(self, bytes: int) -> float:
        source = torch.empty(bytes // 2, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        return bytes / self._seconds(lambda: target.copy_(source))

    def peak(self, dtype: str) -> float:
        size = 8192
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        return 2 * size**3 / self._seconds(lambda: torch.mm(a, b))

    @staticmethod
    def _seconds(call: Callable[[], object]) -> float:
        return interleaved({"": call}, 7, device="cuda")[""] / 1e6


class Roofline:
    """The machine's rates, each measured when it is first asked for.

    Args:
        threads: of the probes of a CPU.
        device: type of the device, ``"cpu"`` or ``"cuda"``.

    Attributes:
        copy_rates: bytes a second, read and written, by the bytes of the working set (powers of two).
        peaks: FLOPs a second by dtype.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.copy_rates: dict[int, float] = {}
        self.peaks: dict[str, float] = {}
        self._probes: _Probes | None = None
        if device == "cuda":
            self._probes = _GpuProbes()
        elif not unavailable("cpp"):
            self._probes = _CpuProbes(threads)

    def copy_bandwidth(self, bytes: int) -> float:
        """Bytes a second of a copy whose source and target have ``bytes`` together, between measured sizes."""
        exponent = math.log2(max(bytes, 1 << 13))
        low = math.floor(exponent)
        share = exponent - low
        return self._copy_rate(1 << low) ** (1 - share) * self._copy_rate(1 << (low + 1)) ** share

    def _copy_rate(self, bytes: int) -> float:
        assert self._probes is not None
        if bytes not in self.copy_rates:
            self.copy_rates[bytes] = self._probes.copy_bandwidth(bytes)
        return self.copy_rates[bytes]

    def peak(self, dtype: str) -> float:
        """FLOPs a second in a dtype; on a CPU those of float32's multiply-adds, which products of bfloat16 exceed."""
        assert self._probes is not None
        if dtype not in self.peaks:
            self.peaks[dtype] = self._probes.peak(dtype)
        return self.peaks[dtype]

    def microseconds(self, work: Work, dtype: str) -> float | None:
        """The least time for ``work``; None without compiled code, which has the probes."""
        if self._probes is None:
            return None
        moving = work.bytes / self.copy_bandwidth(work.bytes)
        return 1e6 * max(moving, work.flops / self.peak(dtype) if work.flops else 0.0)


def conv2d_work(
    layer: ConvLayer,
    channels: torch.Tensor,
    batch: int,
    memory_format: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Work:
    """Of a grouped layer only the selected channels' outputs are read; of a strided one the rows that it touches."""
    selected, per_group = channels.shape[0], layer.out_channels // layer.groups
    outputs = layer.out_channels if layer.dense else selected * per_group
    rows = min(layer.size, layer.out_size * layer.kernel) if layer.kernel < layer.stride else layer.size
    pixel_bytes = selected * dtype.itemsize
    line = _LINES[device]
    columns_skipped = memory_format == "channels_last" and pixel_bytes >= line
    columns = rows if columns_skipped else layer.size
    pixels = batch * layer.out_size**2
    taps = layer.kernel**2
    results = selected * per_group * taps
    grad_bytes = pixels * outputs * dtype.itemsize
    others = batch * rows * columns * pixel_bytes + results * _RESULT_BYTES
    lines = grad_bytes if layer.dense else batch * _grad_lines(layer, channels, memory_format, dtype, line)
    return Work(others + grad_bytes, 2 * pixels * results, others + lines)


def _grad_lines(
    layer: ConvLayer, channels: torch.Tensor, memory_format: str, dtype: torch.dtype, line: int
) -> int:
    """Bytes of the lines that the selected channels' outputs of one image are in."""
    per_group = layer.out_channels // layer.groups
    outputs = (channels.div(layer.in_channels // layer.groups, rounding_mode="floor") * per_group)[:, None]
    outputs = (outputs + torch.arange(per_group)).flatten()
    return _lines_of(outputs, layer.out_channels, layer.out_size**2, memory_format, dtype, line)


def _lines_of(
    channels: torch.Tensor, count: int, pixels: int, memory_format: str, dtype: torch.dtype, line: int
) -> int:
    """Bytes of the lines that some of an image's ``count`` channels are in."""
    if memory_format == "channels_last":
        starts = torch.arange(pixels)[:, None] * count + channels
        length = dtype.itemsize
    else:
        starts, length = channels * pixels, pixels * dtype.itemsize
    starts = starts.flatten() * dtype.itemsize
    first, last = starts // line, (starts + length - 1) // line
    shared = int((first[1:] == last[:-1]).sum())
    return line * (int((last - first + 1).sum()) - shared)


def gather_work(
    layer: ConvLayer,
    channels: torch.Tensor,
    batch: int,
    memory_format: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Work:
    """The selected channels, read and written."""
    pixels = layer.size**2
    moved = batch * pixels * channels.shape[0] * dtype.itemsize
    read = _lines_of(channels, layer.in_channels, pixels, memory_format, dtype, _LINES[device])
    return Work(2 * moved, 0, moved + batch * read)


def mask_work(elements: int, dtype: torch.dtype) -> Work:
    """A tensor read and written, and one bit an element."""
    moved = 2 * elements * dtype.itemsize + elements // 8
    return Work(moved, 0, moved)


def linear_work(layer: LinearLayer, selected: int, batch: int, dtype: torch.dtype) -> Work:
    """The selected features, the outputs' gradients and the result."""
    rows, results = batch * layer.rows, selected * layer.out_features
    moved = rows * (selected + layer.out_features) * dtype.itemsize + results * _RESULT_BYTES
    return Work(moved, 2 * rows * results, moved)
