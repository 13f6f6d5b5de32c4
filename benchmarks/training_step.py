"""Bytes kept for backward and time of a network's whole training step, dense beside sparse.

python benchmarks/training_step.py
python benchmarks/training_step.py --json benchmarks/results/training_step.json
python benchmarks/training_step.py --network ResNet-50 --autocast bfloat16 --format channels_last --compile
python benchmarks/training_step.py --device cuda --network ResNet-50 --autocast bfloat16 --format channels_last

All contenders run interleaved, each in both memory formats; the ratio of two is that of their best formats. On a GPU
they take turns in short runs of steps, timed by events between the steps, as they are and captured in a CUDA graph,
which the host has no part in. The allocator's peak stands beside: that of a step, with weights, gradients, optimiser and
batch, and without what the other contenders hold.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from whole_networks import NETWORKS, Network, loss

from trady_kernels import ChannelSampler, measure_memory, select_fraction, sparsify, trainable_parameters
from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.report import conditions
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.cli import BadUsage
from trady_kernels.cli.console import check_writable
from trady_kernels.ops.layout import FORMATS

IMAGE_NETWORKS = {network.name: network for network in NETWORKS if network.relu_like}
#: By type of device: images of a step unless a number is asked for.
BATCH = {"cpu": 8, "cuda": 128}
#: On a GPU: steps before anything is measured (kernels are chosen and compiled), and steps of a run.
WARM_UP, RUN = 3, 5


@dataclass(frozen=True)
class Row:
    """One way to train, in one memory format: bytes kept for backward by kind, and milliseconds a step.

    On a GPU also milliseconds of the same step replayed from a CUDA graph, and the allocator's peak. Compiled also the
    seconds of the first step, in which torch.compile does its work.
    """

    contender: str
    memory_format: str
    saved_bytes: int
    by_kind: dict[str, int]
    milliseconds: float
    graph_milliseconds: float | None = None
    peak_bytes: int | None = None
    first_step_seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """A way to train: what makes the network and the parameters that train."""

    name: str
    make: Callable[[Network, torch.Tensor], tuple[nn.Module, list[nn.Parameter]]]


def full(network: Network, images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    """Everything trains, batch statistics included: what a user would run without this package."""
    model = network.make(size=images.shape[-1]).to(images.device)
    return model, list(model.parameters())


def fraction(share: float, network: Network, images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    model, _ = full(network, images)
    select_fraction(sparsify(model, images[:1]), share)
    return model, trainable_parameters(model)


def budget(network: Network, images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    model, _ = full(network, images)
    ChannelSampler(sparsify(model, images), images, budget="1MiB", scheme="d-full-random")
    return model, trainable_parameters(model)


FULL, FIVE_PERCENT, ONE_MIB = "full", "5% of the channels", "1 MiB budget"
CONTENDERS = (
    Contender(FULL, full),
    Contender(FIVE_PERCENT, partial(fraction, 0.05)),
    Contender("25% of the channels", partial(fraction, 0.25)),
    Contender(ONE_MIB, budget),
)


@dataclass(frozen=True)
class Goal:
    """The most of full fine-tuning's figure that a contender may take, each in its best memory format."""

    contender: str
    figure: str
    most: float
    networks: tuple[str, ...]

    @property
    def text(self) -> str:
        """What is asked for."""
        return f"{self.contender}: {self.figure}, of full fine-tuning"


TIME, GRAPH_TIME, PEAK = "step time", "step time in a CUDA graph", "peak allocated memory"
_LITE, _GPU_NETWORKS = ("EfficientNet-Lite0",), ("ResNet-50", "MobileNetV2")
#: Modes of torch.compile as rows have them.
COMPILED = {None: "off", "default": "on", "reduce-overhead": "on, reduce-overhead"}

#: By type of device; on a GPU at batch 128, 224x224, bfloat16 autocast, channels_last, compiled and not.
GOALS = {
    "cpu": (Goal(FIVE_PERCENT, TIME, 0.6, _LITE), Goal(ONE_MIB, TIME, 0.55, _LITE)),
    "cuda": (
        Goal(FIVE_PERCENT, TIME, 0.6, _GPU_NETWORKS),
        Goal(FIVE_PERCENT, GRAPH_TIME, 0.6, _GPU_NETWORKS),
        Goal(FIVE_PERCENT, PEAK, 0.25, _GPU_NETWORKS),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What all contenders have in common."""

    network: Network
    device: str
    batch_size: int
    image_size: int
    rounds: int
    autocast: str | None
    compiled: str | None
    formats: tuple[str, ...]
    contenders: tuple[Contender, ...]

    def __str__(self) -> str:
        return (
            f"{self.network.name}, batch {self.batch_size}, {self.image_size}x{self.image_size}, "
            f"{f'{self.autocast} autocast' if self.autocast else 'float32'}, {' and '.join(self.formats)}, "
            f"torch.compile {COMPILED[self.compiled]}"
        )

    @property
    def goals(self) -> list[Goal]:
        """Those that the contenders are about."""
        names = {contender.name for contender in self.contenders}
        return [
            goal
            for goal in GOALS[self.device]
            if self.network.name in goal.networks and {FULL, goal.contender} <= names
        ]

    def precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, self.autocast))


@dataclass(frozen=True)
class Figures:
    """What was measured, by contender and memory format."""

    rows: dict[tuple[str, str], Row]
    steps: dict[tuple[str, str], Callable[[], None]]

    def best(self, figure: Callable[[Row], float | None]) -> dict[str, float]:
        """Each contender's least figure over the memory formats, where there is one."""
        found: dict[str, float] = {}
        for row in self.rows.values():
            if (value := figure(row)) is not None:
                found[row.contender] = min(value, found.get(row.contender, value))
        return found


def of_full(figures: Mapping[str, float]) -> dict[str, float]:
    """Each contender's figure as a share of full fine-tuning's; empty where that was not measured."""
    return {name: value / figures[FULL] for name, value in figures.items()} if FULL in figures else {}


# ---- measuring ----------------------------------------------------------------------------------------------


def measure(settings: Settings) -> Figures:
    """Make all contenders, count what their steps keep, and time them interleaved."""
    images, target = settings.network.batch(settings.batch_size, size=settings.image_size)
    target = target.to(settings.device)
    steps, memory, peaks, first_steps = {}, {}, {}, {}
    for contender in settings.contenders:
        for name in settings.formats:
            key = (contender.name, name)
            others = held_on_gpu() if settings.device == "cuda" else 0
            batch = images.to(settings.device, memory_format=FORMATS[name])
            # What looks at the network runs it in float32, for whose layers no algorithm need be tried out.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
                model, parameters = contender.make(settings.network, batch)
            model.train().to(memory_format=FORMATS[name])
            with settings.precision():
                memory[key] = measure_memory(model, (batch, target), loss)
            steps[key] = training_step(settings, model, parameters, batch, target)
            if settings.compiled is not None:
                started = time.perf_counter()
                steps[key]()
                first_steps[key] = time.perf_counter() - started
            if settings.device == "cuda":
                peaks[key] = peak_on_gpu(steps[key]) - others
    graph_times: dict[tuple[str, str], float] = {}
    if settings.device == "cuda":
        times = between_events(steps, settings.rounds)
        if settings.compiled != "reduce-overhead":  # which has graphs of its own
            try:
                graph_times = between_events(
                    {key: captured(step) for key, step in steps.items()}, settings.rounds
                )
            except RuntimeError as error:  # the other figures stand
                print(f"a step cannot be captured in a CUDA graph: {error}", file=sys.stderr)
    else:
        times = interleaved(steps, settings.rounds)
    rows = {
        key: Row(
            *key,
            report.saved_bytes,
            dict(report.by_kind),
            times[key] / 1e3,
            graph_times[key] / 1e3 if graph_times else None,
            peaks.get(key),
            first_steps.get(key),
        )
        for key, report in memory.items()
    }
    return Figures(rows, steps)


def training_step(
    settings: Settings,
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: torch.Tensor,
    target: torch.Tensor,
) -> Callable[[], None]:
    """A whole step of plain SGD, without anything that waits for a GPU."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    network = model if settings.compiled is None else torch.compile(model, mode=settings.compiled)

    def step() -> None:
        optimizer.zero_grad()
        with settings.precision():
            value = loss(network(batch), target)
        value.backward()
        optimizer.step()

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same warm step, recorded once and replayed: all its kernels in one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces by stream
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def held_on_gpu() -> int:
    """Bytes that live tensors take; the matrix product's workspaces go, so that everybody pays for their own."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def peak_on_gpu(step: Callable[[], None]) -> int:
    """The allocator's high-water mark in a warm step."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def between_events(
    steps: Mapping[tuple[str, str], Callable[[], None]], rounds: int
) -> dict[tuple[str, str], float]:
    """Median microseconds of a step, over short runs of each contender in turn, in another order each round.

    The host's gaps between kernels are in it: events stand between steps that follow one another.
    """
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for turn in range(rounds):
        for key in random.Random(turn).sample(list(steps), len(steps)):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(RUN + 1)]
            torch.cuda.synchronize()
            steps[key]()  # finds another contender's caches and guards, and gives the host a head start
            events[0].record()
            for event in events[1:]:
                steps[key]()
                event.record()
            torch.cuda.synchronize()
            times[key] += [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)]
    return {key: statistics.median(values) for key, values in times.items()}


def costliest(step: Callable[[], None], device: str, count: int) -> list[dict[str, Any]]:
    """The kernels of one step (on the CPU: ATen's operators) that take most time, added up by name."""
    on_gpu = device == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as run:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    found = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in run.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    total = sum(time for time, _ in found)
    found.sort(key=lambda pair: pair[0], reverse=True)
    return [
        {"name": event.key, "calls": event.count, "microseconds": time, "share": time / total}
        for time, event in found[:count]
        if time
    ]


# ---- printing -----------------------------------------------------------------------------------------------


def print_rows(figures: Figures) -> None:
    on_gpu = any(row.peak_bytes is not None for row in figures.rows.values())
    gpu_columns = f"{'in a graph':>12}{'of full':>9}{'peak MiB':>10}{'of full':>9}" if on_gpu else ""
    compiled = any(row.first_step_seconds is not None for row in figures.rows.values())
    print(
        f"{'':<20}{'memory format':<15}{'saved MiB':>10}{'share':>8}{'ms a step':>11}{'of full':>9}{gpu_columns}"
        + (f"{'first step s':>14}" if compiled else "")
    )
    for row in figures.rows.values():
        whole = figures.rows.get((FULL, row.memory_format))

        def beside_full(
            figure: Callable[[Row], float | None], row: Row = row, whole: Row | None = whole
        ) -> str:
            value, of = figure(row), figure(whole) if whole else None
            return f"{value / of:>9.2f}" if value and of else f"{'-':>9}"

        line = (
            f"{row.contender:<20}{row.memory_format:<15}{row.saved_bytes / 2**20:>10.1f}"
            + (f"{row.saved_bytes / whole.saved_bytes:>8.1%}" if whole else f"{'-':>8}")
            + f"{row.milliseconds:>11.1f}{beside_full(lambda of: of.milliseconds)}"
        )
        if row.graph_milliseconds is not None:
            line += f"{row.graph_milliseconds:>12.1f}{beside_full(lambda of: of.graph_milliseconds)}"
        if row.peak_bytes is not None:
            line += f"{row.peak_bytes / 2**20:>10.1f}{beside_full(lambda of: of.peak_bytes)}"
        if row.first_step_seconds is not None:
            line += f"{row.first_step_seconds:>14.1f}"
        print(line)


def verdict(goal: Goal, about: str, figure: float) -> dict[str, Any]:
    """A goal held against a figure, as ``trady bench`` writes them."""
    return {
        "goal": goal.text,
        "rows": about,
        "figure": figure,
        "bound": goal.most,
        "reached": figure <= goal.most,
    }


def print_best(figure: str, unit: str, best: Mapping[str, float], goals: Sequence[Goal]) -> None:
    ratios, most = of_full(best), {goal.contender: goal.most for goal in goals if goal.figure == figure}
    for name, value in best.items():
        line = f"{name:<20}{value:>10.1f} {unit}"
        if name in ratios:
            line += f"  {ratios[name]:>6.3f} of full"
        if name in most:
            line += f"  <= {most[name]} {'reached' if ratios[name] <= most[name] else 'MISSED'}"
        print(line)


def print_kernels(key: tuple[str, str], kernels: Sequence[Mapping[str, Any]]) -> None:
    print(f"\ncostliest of a step, {', '.join(key)}:\n{'us':>10}{'share':>8}{'calls':>7}  name")
    for kernel in kernels:
        print(
            f"{kernel['microseconds']:>10.0f}{kernel['share']:>8.1%}{kernel['calls']:>7}  {kernel['name'][:120]}"
        )


# ---- command line -------------------------------------------------------------------------------------------


def parse() -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network",
        choices=IMAGE_NETWORKS,
        default="EfficientNet-Lite0",
        metavar="NAME",
        help=f"one of {', '.join(IMAGE_NETWORKS)} (default: %(default)s)",
    )
    parser.add_argument("--device", choices=BATCH, default="cpu", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="default: 8, on a GPU 128")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help=f"steps of each contender, on a GPU runs of {RUN} steps (default: %(default)s)",
    )
    parser.add_argument("--autocast", choices=["bfloat16"], help="train under autocast (default: float32)")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=[mode for mode in COMPILED if mode],
        metavar="MODE",
        help="under torch.compile, every contender: default, or reduce-overhead, which replays CUDA graphs",
    )
    parser.add_argument("--format", choices=FORMATS, help="this memory format only (default: both)")
    parser.add_argument(
        "--contender",
        action="append",
        choices=[contender.name for contender in CONTENDERS],
        metavar="NAME",
        help=f"only this one, may be repeated: {', '.join(c.name for c in CONTENDERS)}".replace("%", "%%"),
    )
    parser.add_argument(
        "--profile", type=int, metavar="N", help="also show the N costliest kernels of a step of each"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = BATCH[args.device]
    for name in ("batch_size", "image_size", "rounds", "threads", "profile"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    network = IMAGE_NETWORKS[args.network]
    if network.missing is not None:
        parser.error(f"--network: got {network.name!r}, but {network.missing}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', but torch.cuda.is_available() is False; run trady doctor")
    if args.json is not None:
        try:
            check_writable("json", args.json)
        except BadUsage as error:
            parser.error(str(error))
    settings = Settings(
        network,
        args.device,
        args.batch_size,
        args.image_size,
        args.rounds,
        args.autocast,
        args.compile,
        (args.format,) if args.format else tuple(FORMATS),
        tuple(c for c in CONTENDERS if not args.contender or c.name in args.contender),
    )
    return settings, args


def main() -> None:
    settings, args = parse()
    if settings.device == "cpu":
        calm_malloc()
    else:
        torch.backends.cudnn.benchmark = True  # the peer is cuDNN's best
    torch.set_num_threads(args.threads)
    figures = measure(settings)
    print_rows(figures)
    times = figures.best(lambda row: row.milliseconds)
    peaks = figures.best(lambda row: row.peak_bytes)
    print("\nbest memory format of each:")
    print_best(TIME, "ms", times, settings.goals)
    content: dict[str, Any] = {
        **conditions(settings.device),
        "rows": [
            {name: value for name, value in asdict(row).items() if value is not None}
            for row in figures.rows.values()
        ],
        "best_of_full": of_full(times),
    }
    if settings.device == "cuda":
        graph_times = figures.best(lambda row: row.graph_milliseconds)
        if graph_times:
            print(f"\n{GRAPH_TIME} of each:")
            print_best(GRAPH_TIME, "ms", graph_times, settings.goals)
        print(f"\n{PEAK} of each:")
        print_best(PEAK, "MiB", {name: peak / 2**20 for name, peak in peaks.items()}, settings.goals)
        ratios = {TIME: of_full(times), GRAPH_TIME: of_full(graph_times), PEAK: of_full(peaks)}
        content["graph_of_full"], content["peak_of_full"] = ratios[GRAPH_TIME], ratios[PEAK]
        content["goals"] = [
            verdict(goal, str(settings), ratios[goal.figure][goal.contender])
            for goal in settings.goals
            if goal.contender in ratios[goal.figure]
        ]
    if args.profile is not None:
        content["kernels"] = {}
        for key, step in figures.steps.items():
            kernels = costliest(step, settings.device, args.profile)
            content["kernels"][", ".join(key)] = kernels
            print_kernels(key, kernels)
    if args.json is not None:
        write_json(args.json, content)


if __name__ == "__main__":
    main()
