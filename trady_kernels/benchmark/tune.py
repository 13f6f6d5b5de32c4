"""Limits of the choice table (:mod:`trady_kernels.ops.choice`) from measurements on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from trady_kernels.benchmark.layers import ConvLayer, Layer, selections
from trady_kernels.benchmark.rows import BENCHMARKS, Setting
from trady_kernels.benchmark.timing import interleaved
from trady_kernels.ops.backend import OPERATORS
from trady_kernels.ops.choice import ANY, DTYPES, KEYS, Key, Limit, own_kernel
from trady_kernels.ops.conv2d_channel_grad import channels_to_choose_by, family
from trady_kernels.ops.layout import FORMATS

#: Output pixels, or rows, that limits may be split at.
_SPLITS = (64, 512, 1024, 2048, 8192)
#: A split must bring the root mean square of the loss down by this much (2%): less is what runs differ by.
_WORTH = 0.02


@dataclass(frozen=True)
class Point:
    """Microseconds of both kernels at one shape, all that ``auto`` would spend in either included.

    Attributes:
        ours: of the C++ kernel, or on a GPU of Triton's or CUDA C++.
    """

    label: str
    threads: int
    pixels: int
    selected: int
    channels: int  # that the limit counts
    ours: float
    aten: float

    def loss(self, most_channels: int) -> float:
        """Logarithm of the time under a limit over that of the faster kernel."""
        taken = self.ours if self.channels <= most_channels else self.aten
        return math.log(taken / min(self.ours, self.aten))


def key_of(operator: str, layer: Layer, setting: Setting) -> Key | None:
    """What the layer's limit is for; None where there is no choice."""
    key = (operator, _family(layer), FORMATS[setting.memory_format], DTYPES[setting.dtype])
    return key if key in KEYS[setting.device] else None


def pixels_of(layer: Layer, batch: int) -> int:
    """Output pixels of a batch, or rows."""
    return batch * (layer.out_size**2 if isinstance(layer, ConvLayer) else layer.rows)


def points(operator: str, layer: Layer, setting: Setting) -> Iterator[Point]:
    """Time both kernels on a layer, at all its numbers of channels in one interleaved run."""
    benchmark = BENCHMARKS[operator]
    wanted = setting.selected or selections(layer.in_channels)
    calls = benchmark.calls(layer, setting, sorted({k for k in wanted if k <= layer.in_channels}))
    names = {call.selected: (_own_kernel(layer, setting, call.selected), "aten") for call in calls}
    times = interleaved(
        {
            (name, call.selected): partial(
                OPERATORS[operator].checked(name), *benchmark.operands(call.arguments)
            )
            for call in calls
            for name in names[call.selected]
        },
        setting.rounds,
        seconds=benchmark.seconds,
        device=setting.device,
    )
    pixels, threads = pixels_of(layer, setting.batch), torch.get_num_threads()
    for call in calls:
        k = call.selected
        ours, aten = (times[name, k] for name in names[k])
        yield Point(layer.label, threads, pixels, k, _channels(layer, k), ours, aten)


def _own_kernel(layer: Layer, setting: Setting, selected: int) -> str:
    of = FORMATS[setting.memory_format], DTYPES[setting.dtype], _channels(layer, selected)
    return own_kernel(setting.device, _family(layer), *of)


def _channels(layer: Layer, selected: int) -> int:
    if isinstance(layer, ConvLayer):
        return channels_to_choose_by(_family(layer), selected, layer.out_channels)
    return selected


def _family(layer: Layer) -> str:
    if isinstance(layer, ConvLayer):
        return family((layer.kernel,) * 2, (layer.stride,) * 2, layer.groups)
    return "linear"


def fit(key: Key, measured: Iterable[Point]) -> list[Limit]:
    """The limits that lose least, in the mean of squares, over the faster kernel of each point.

    One limit for all layers, or one below and one above a number of pixels where that is worth it. Squares, since a
    shape that runs at half its speed is worse than ten that lose a twentieth.
    """
    of = list(measured)
    whole = [Limit(*key, _best_limit(of))]
    splits = [
        [Limit(*key, _best_limit(below), at), Limit(*key, _best_limit(above))]
        for at in _SPLITS
        if (below := [p for p in of if p.pixels <= at]) and (above := [p for p in of if p.pixels > at])
    ]
    best = min([whole, *splits], key=lambda limits: losses(limits, of)[0])
    return best if losses(best, of)[0] + _WORTH < losses(whole, of)[0] else whole


def losses(limits: Sequence[Limit], measured: Iterable[Point]) -> tuple[float, float]:
    """Root mean square and largest loss, each as a share: 0.05 is 5% more time than the faster kernel."""
    found = []
    for point in measured:
        limit = next(limit for limit in limits if point.pixels <= limit.most_pixels)
        found.append(point.loss(limit.most_channels))
    return math.expm1(math.sqrt(sum(loss**2 for loss in found) / len(found))), math.expm1(max(found))


def _best_limit(of: Sequence[Point]) -> int:
    """Half way, on a logarithmic scale, between the last number of channels for ours and the first for ATen."""
    counts = sorted({point.channels for point in of})
    # Of equal ones the largest: ours needs no copy of a layout.
    best = min(reversed([0, *counts]), key=lambda most: sum(point.loss(most) ** 2 for point in of))
    if best == 0:
        return 0
    if best == counts[-1]:
        return ANY
    return math.isqrt(best * counts[counts.index(best) + 1])
