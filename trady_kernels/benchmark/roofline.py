"""What a call cannot avoid, over what the machine can do: ``max(bytes / copy bandwidth, FLOPs / FMA peak)``.

Every byte counts once, read or written, and the rates are measured in the run that uses them, with torch's number
of threads. A copy's writes cost more than its reads, so a kernel that mostly reads can stay below its roofline.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from trady_kernels.benchmark.layers import ConvLayer, LinearLayer
from trady_kernels.ops.backend import unavailable

_CACHE_LINE = 64
_RESULT_BYTES = 4  # gradients are float32 whatever the inputs are


@dataclass(frozen=True)
class Work:
    """What a call does at least.

    Attributes:
        bytes: read or written.
        flops: floating-point operations; an FMA is two.
        lines: the bytes again, with those of a grouped layer's ``grad_output``, of which only some channels are read,
            in whole cache lines.
    """

    bytes: int
    flops: int
    lines: int

    def in_lines(self) -> Work:
        """The same with whole cache lines moved, as a CPU does."""
        return Work(self.lines, self.flops, self.lines)


class Roofline:
    """The machine's rates with ``threads`` threads, each measured when it is first asked for.

    Attributes:
        threads: of the probes.
        copy_rates: bytes a second, read and written, by the bytes of the working set (powers of two).
        peaks: FLOPs a second by dtype.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.copy_rates: dict[int, float] = {}
        self.peaks: dict[str, float] = {}
        self._probes: Any = None if unavailable("cpp") else importlib.import_module("trady_kernels._C")

    def copy_bandwidth(self, bytes: int) -> float:
        """Bytes a second of a copy whose source and target have ``bytes`` together, between measured sizes."""
        exponent = math.log2(max(bytes, 1 << 13))
        low = math.floor(exponent)
        share = exponent - low
        return self._copy_rate(1 << low) ** (1 - share) * self._copy_rate(1 << (low + 1)) ** share

    def _copy_rate(self, bytes: int) -> float:
        if bytes not in self.copy_rates:
            self.copy_rates[bytes] = self._probes.copy_bandwidth(bytes, self.threads)
        return self.copy_rates[bytes]

    def fma_peak(self, dtype: str) -> float:
        """FLOPs a second in a dtype; for bfloat16 float32's, which a CPU with dot products of its own exceeds."""
        if dtype not in self.peaks:
            self.peaks[dtype] = self._probes.fma_peak(self.threads)
        return self.peaks[dtype]

    def microseconds(self, work: Work, dtype: str) -> float | None:
        """The least time for ``work``; None without compiled code, which has the probes."""
        if self._probes is None:
            return None
        return 1e6 * max(work.bytes / self.copy_bandwidth(work.bytes), work.flops / self.fma_peak(dtype))


def conv2d_work(
    layer: ConvLayer, channels: torch.Tensor, batch: int, memory_format: str, dtype: torch.dtype
) -> Work:
    """Of a grouped layer only the selected channels' outputs are read; of a strided one the rows that it touches."""
    selected, per_group = channels.shape[0], layer.out_channels // layer.groups
    outputs = layer.out_channels if layer.dense else selected * per_group
    rows = min(layer.size, layer.out_size * layer.kernel) if layer.kernel < layer.stride else layer.size
    pixel_bytes = selected * dtype.itemsize
    columns_skipped = memory_format == "channels_last" and pixel_bytes >= _CACHE_LINE
    columns = rows if columns_skipped else layer.size
    pixels = batch * layer.out_size**2
    taps = layer.kernel**2
    results = selected * per_group * taps
    grad_bytes = pixels * outputs * dtype.itemsize
    others = batch * rows * columns * pixel_bytes + results * _RESULT_BYTES
    lines = grad_bytes if layer.dense else batch * _grad_lines(layer, channels, memory_format, dtype)
    return Work(others + grad_bytes, 2 * pixels * results, others + lines)


def _grad_lines(layer: ConvLayer, channels: torch.Tensor, memory_format: str, dtype: torch.dtype) -> int:
    """Bytes of the cache lines that the selected channels' outputs of one image are in."""
    per_group, pixels = layer.out_channels // layer.groups, layer.out_size**2
    outputs = (channels.div(layer.in_channels // layer.groups, rounding_mode="floor") * per_group)[:, None]
    outputs = (outputs + torch.arange(per_group)).flatten()
    if memory_format == "channels_last":
        starts = torch.arange(pixels)[:, None] * layer.out_channels + outputs
        length = dtype.itemsize
    else:
        starts, length = outputs * pixels, pixels * dtype.itemsize
    starts = starts.flatten() * dtype.itemsize
    first, last = starts // _CACHE_LINE, (starts + length - 1) // _CACHE_LINE
    shared = int((first[1:] == last[:-1]).sum())
    return _CACHE_LINE * (int((last - first + 1).sum()) - shared)


def gather_work(layer: ConvLayer, selected: int, batch: int, dtype: torch.dtype) -> Work:
    """The selected channels, read and written."""
    moved = 2 * batch * layer.size**2 * selected * dtype.itemsize
    return Work(moved, 0, moved)


def linear_work(layer: LinearLayer, selected: int, batch: int, dtype: torch.dtype) -> Work:
    """The selected features, the outputs' gradients and the result."""
    rows, results = batch * layer.rows, selected * layer.out_features
    moved = rows * (selected + layer.out_features) * dtype.itemsize + results * _RESULT_BYTES
    return Work(moved, 2 * rows * results, moved)
