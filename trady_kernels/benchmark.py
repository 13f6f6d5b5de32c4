"""Times of the operators beside what one would otherwise run: ATen on the compact input, and the dense call.

All contenders of a row run interleaved, in a new order each round (the same orders in every run): the one after
a large call starts with cold caches, and on a shared machine only figures of the same rounds compare. Rotating
would not do, since each contender would keep its predecessor.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trady_kernels.ops import backend, conv2d_channel_grad, gather_channels, last_kernel, linear_channel_grad
from trady_kernels.ops.backend import unavailable
from trady_kernels.provenance import describe


@dataclass(frozen=True)
class ConvLayer:
    """A convolution of a network, at the size its input has there."""

    network: str
    in_channels: int
    out_channels: int
    size: int  # input height and width
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def family(self) -> str:
        return f"{'depthwise ' if self.groups > 1 else ''}{self.kernel}x{self.kernel}"

    @property
    def label(self) -> str:
        channels = f"{self.in_channels}" if self.groups > 1 else f"{self.in_channels}->{self.out_channels}"
        return f"{self.family} {channels} @{self.size}" + (f" /{self.stride}" if self.stride > 1 else "")


def _layers(network: str, rows: Iterable[tuple[int, ...]]) -> tuple[ConvLayer, ...]:
    return tuple(ConvLayer(network, *row) for row in rows)


def _depthwise(channels: int, size: int, kernel: int = 3, stride: int = 1) -> tuple[int, ...]:
    return (channels, channels, size, kernel, stride, channels)


#: The distinct convolutions of each network at 224x224.
LAYERS: tuple[ConvLayer, ...] = (
    *_layers(
        "mobilenet_v2",
        (
            (3, 32, 224, 3, 2),
            _depthwise(32, 112),
            (32, 16, 112),
            (16, 96, 112),
            _depthwise(96, 112, stride=2),
            (96, 24, 56),
            (24, 144, 56),
            _depthwise(144, 56),
            (144, 24, 56),
            _depthwise(144, 56, stride=2),
            (144, 32, 28),
            (32, 192, 28),
            _depthwise(192, 28),
            (192, 32, 28),
            _depthwise(192, 28, stride=2),
            (192, 64, 14),
            (64, 384, 14),
            _depthwise(384, 14),
            (384, 64, 14),
            (384, 96, 14),
            (96, 576, 14),
            _depthwise(576, 14),
            (576, 96, 14),
            _depthwise(576, 14, stride=2),
            (576, 160, 7),
            (160, 960, 7),
            _depthwise(960, 7),
            (960, 160, 7),
            (960, 320, 7),
            (320, 1280, 7),
        ),
    ),
    *_layers(
        "resnet18",
        (
            (3, 64, 224, 7, 2),
            (64, 64, 56, 3),
            (64, 128, 56, 3, 2),
            (64, 128, 56, 1, 2),
            (128, 128, 28, 3),
            (128, 256, 28, 3, 2),
            (128, 256, 28, 1, 2),
            (256, 256, 14, 3),
            (256, 512, 14, 3, 2),
            (256, 512, 14, 1, 2),
            (512, 512, 7, 3),
        ),
    ),
    *_layers(
        "efficientnet_lite0",
        (
            (3, 32, 224, 3, 2),
            _depthwise(32, 112),
            (32, 16, 112),
            (16, 96, 112),
            _depthwise(96, 112, stride=2),
            (96, 24, 56),
            (24, 144, 56),
            _depthwise(144, 56),
            (144, 24, 56),
            _depthwise(144, 56, 5, 2),
            (144, 40, 28),
            (40, 240, 28),
            _depthwise(240, 28, 5),
            (240, 40, 28),
            _depthwise(240, 28, 3, 2),
            (240, 80, 14),
            (80, 480, 14),
            _depthwise(480, 14),
            (480, 80, 14),
            _depthwise(480, 14, 5),
            (480, 112, 14),
            (112, 672, 14),
            _depthwise(672, 14, 5),
            (672, 112, 14),
            _depthwise(672, 14, 5, 2),
            (672, 192, 7),
            (192, 1152, 7),
            _depthwise(1152, 7, 5),
            (1152, 192, 7),
            _depthwise(1152, 7),
            (1152, 320, 7),
            (320, 1280, 7),
        ),
    ),
)

#: How many input channels are selected; a quarter of the layer's beside these.
SELECTED = (1, 4, 16)


@dataclass(frozen=True)
class Row:
    """One operator call: median microseconds by contender, ``auto`` (the operator as anyone calls it), ``cpp``,
    ``aten`` (on the compact input) and ``dense`` (all channels)."""

    operator: str
    network: str
    family: str
    label: str
    selected: int
    memory_format: str
    chosen: str  # the backend that auto took
    microseconds: dict[str, float]

    def ratio(self, peer: str) -> float:
        """How many times the operator is faster than ``peer``; NaN where that did not run."""
        return self.microseconds.get(peer, math.nan) / self.microseconds["auto"]


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


def _clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each contender over ``rounds`` rounds of all of them, each in another order.

    With one thread it is that thread's own time: what other processes take on a shared machine is not in it.
    """
    clock = _clock()
    names = list(contenders)
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            start = clock()
            contenders[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def _on(name: str, operator: Callable[..., torch.Tensor], *args: Any) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with backend(name):
            return operator(*args)

    return call


def _ours(operator: Callable[..., torch.Tensor], *args: Any) -> dict[str, Callable[[], object]]:
    contenders: dict[str, Callable[[], object]] = {"auto": lambda: operator(*args)}
    if not unavailable("cpp"):
        contenders["cpp"] = _on("cpp", operator, *args)
    return contenders


def _format(memory_format: str) -> torch.memory_format:
    return torch.channels_last if memory_format == "channels_last" else torch.contiguous_format


def _selected(layer: ConvLayer, selected: Sequence[int], quarter: bool) -> list[int]:
    wanted = {*selected, *({layer.in_channels // 4} if quarter else ())}
    return sorted(k for k in wanted if 0 < k <= layer.in_channels)


def conv2d_rows(
    layers: Iterable[ConvLayer],
    selected: Sequence[int] = SELECTED,
    *,
    quarter: bool = True,
    batch: int = 8,
    memory_format: str = "contiguous",
    rounds: int = 9,
) -> Iterator[Row]:
    """``conv2d_channel_grad`` on each layer; gathering the channels is in nobody's time."""
    for layer in layers:
        generator = torch.Generator().manual_seed(0)
        laid_out = {"memory_format": _format(memory_format)}
        x = torch.randn(batch, layer.in_channels, layer.size, layer.size, generator=generator).contiguous(
            **laid_out
        )
        dy = torch.randn(batch, layer.out_channels, layer.out_size, layer.out_size, generator=generator)
        dy = dy.contiguous(**laid_out)
        geometry = tuple((v, v) for v in (layer.kernel, layer.stride, layer.padding, 1))
        everything = torch.arange(layer.in_channels)
        for k in _selected(layer, selected, quarter):
            channels = torch.randperm(layer.in_channels, generator=generator)[:k].sort().values
            compact = x[:, channels].contiguous(**laid_out)
            args = (compact, dy, channels, layer.in_channels, *geometry, layer.groups)
            contenders = _ours(conv2d_channel_grad, *args)
            contenders["aten"] = _on("aten", conv2d_channel_grad, *args)
            dense = (x, dy, everything, layer.in_channels, *geometry, layer.groups)
            contenders["dense"] = _on("aten", conv2d_channel_grad, *dense)
            contenders["auto"]()
            chosen = last_kernel("conv2d_channel_grad") or ""
            times = interleaved(contenders, rounds)
            yield Row(
                "conv2d_channel_grad",
                layer.network,
                layer.family,
                layer.label,
                k,
                memory_format,
                chosen,
                times,
            )


def gather_rows(
    layers: Iterable[ConvLayer],
    selected: Sequence[int] = SELECTED,
    *,
    quarter: bool = True,
    batch: int = 8,
    memory_format: str = "contiguous",
    rounds: int = 9,
) -> Iterator[Row]:
    """``gather_channels`` on each layer's input, beside ``index_select`` and a copy of the whole input."""
    for layer in layers:
        x = torch.randn(batch, layer.in_channels, layer.size, layer.size)
        x = x.contiguous(memory_format=_format(memory_format))
        for k in _selected(layer, selected, quarter):
            channels = (
                torch.randperm(layer.in_channels, generator=torch.Generator().manual_seed(k))[:k]
                .sort()
                .values
            )
            contenders = _ours(gather_channels, x, channels)
            contenders["aten"] = partial(x.index_select, 1, channels)
            contenders["dense"] = x.clone
            contenders["auto"]()
            chosen = last_kernel("gather_channels") or ""
            times = interleaved(contenders, rounds)
            yield Row(
                "gather_channels", layer.network, "gather", layer.label, k, memory_format, chosen, times
            )


#: (rows, in_features, out_features) of the linear layers: the networks' heads and a small transformer's.
LINEARS = ((8, 1280, 1000), (8, 512, 1000), (8 * 197, 192, 768), (8 * 197, 768, 192), (8 * 128, 384, 1536))


def linear_rows(
    sizes: Iterable[tuple[int, int, int]] = LINEARS,
    selected: Sequence[int] = SELECTED,
    *,
    quarter: bool = True,
    rounds: int = 9,
) -> Iterator[Row]:
    """``linear_channel_grad``, beside a matrix product on the compact and on the whole input."""
    for count, in_features, out_features in sizes:
        x, dy = torch.randn(count, in_features), torch.randn(count, out_features)
        for k in sorted({*selected, *({in_features // 4} if quarter else ())}):
            compact = x[:, :k].contiguous()
            contenders = _ours(linear_channel_grad, compact, dy)
            contenders["aten"] = partial(torch.matmul, compact.t(), dy)
            contenders["dense"] = partial(torch.matmul, x.t(), dy)
            contenders["auto"]()
            chosen = last_kernel("linear_channel_grad") or ""
            label = f"{count} x {in_features}->{out_features}"
            times = interleaved(contenders, rounds)
            yield Row("linear_channel_grad", "", "linear", label, k, "contiguous", chosen, times)


def distinct(layers: Iterable[ConvLayer]) -> list[ConvLayer]:
    """Layers that two networks share, once."""
    return list({(layer.label, layer.groups): layer for layer in reversed(list(layers))}.values())[::-1]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(rows: Sequence[Row]) -> str:
    """Aligned text: a line for each row, then the geometric means by family and number of channels."""
    lines = [
        f"{'layer':<28}{'k':>5}  {'auto us':>9}{'cpp us':>9}{'aten us':>9}{'dense us':>9}"
        f"{'aten/auto':>11}{'dense/auto':>11}  kernel"
    ]
    for row in rows:
        times = "".join(
            f"{row.microseconds.get(name, math.nan):>9.0f}" for name in ("auto", "cpp", "aten", "dense")
        )
        lines.append(
            f"{row.label:<28}{row.selected:>5}  {times}{row.ratio('aten'):>11.2f}{row.ratio('dense'):>11.2f}"
            f"  {row.chosen}"
        )
    lines += [
        "",
        f"{'family':<16}{'k':>8}{'rows':>6}{'aten/auto':>11}{'worst':>8}{'aten/cpp':>11}{'dense/auto':>12}",
    ]
    for family in sorted({row.family for row in rows}):
        for low, high in ((1, 1), (2, 4), (5, 12), (13, 16), (17, 1 << 30)):
            of = [row for row in rows if row.family == family and low <= row.selected <= high]
            if not of:
                continue
            ratios = [row.ratio("aten") for row in of]
            kernel = [row.microseconds["aten"] / row.microseconds.get("cpp", math.nan) for row in of]
            bucket = f"{low}" if low == high else f"{low}-{high}" if high < 1 << 30 else f">{low - 1}"
            lines.append(
                f"{family:<16}{bucket:>8}{len(of):>6}{geometric_mean(ratios):>11.2f}{min(ratios):>8.2f}"
                f"{geometric_mean(kernel):>11.2f}{geometric_mean(row.ratio('dense') for row in of):>12.2f}"
            )
    return "\n".join(lines)


def report(rows: Sequence[Row]) -> dict[str, object]:
    """Everything of a run as JSON takes it."""
    return {**conditions(), "rows": [asdict(row) for row in rows]}


def json_argument(description: str | None) -> Path | None:
    """Parse the command line of a benchmark that takes ``--json FILE`` and nothing else; returns the file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    path: Path | None = parser.parse_args().json
    return path


def conditions() -> dict[str, object]:
    """What a figure needs beside it: command, versions, commit, machine, clock and load."""
    facts = describe(torch.device("cpu")) | {"clock": _clock().__name__}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    return facts
