"""Bytes kept for backward and time of a whole training step of EfficientNet-Lite0, dense beside sparse.

python benchmarks/training_step.py
python benchmarks/training_step.py --json benchmarks/results/training_step.json

All contenders run interleaved, each in both memory formats; the ratio of two is that of their best formats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from whole_networks import NETWORKS, Network, loss

from trady_kernels import ChannelSampler, measure_memory, select_fraction, sparsify, trainable_parameters
from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.report import conditions
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.cli import BadUsage
from trady_kernels.cli.console import check_writable

NETWORK: Network = next(network for network in NETWORKS if network.name == "EfficientNet-Lite0")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """One way to train, in one memory format: bytes kept for backward by kind, and milliseconds a step."""

    contender: str
    memory_format: str
    saved_bytes: int
    by_kind: dict[str, int]
    milliseconds: float


@dataclass(frozen=True)
class Contender:
    """A way to train: what makes the network and the parameters that train, and the time it must reach."""

    name: str
    make: Callable[[torch.Tensor], tuple[nn.Module, list[nn.Parameter]]]
    of_full: float | None = None


def full(images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    """Everything trains, batch statistics included: what a user would run without this package."""
    model = NETWORK.make(size=images.shape[-1])
    return model, list(model.parameters())


def fraction(share: float, images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    model, _ = full(images)
    select_fraction(sparsify(model, images), share)
    return model, trainable_parameters(model)


def budget(images: torch.Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    model, _ = full(images)
    ChannelSampler(sparsify(model, images), images, budget="1MiB", scheme="d-full-random")
    return model, trainable_parameters(model)


CONTENDERS = (
    Contender("full", full),
    Contender("5% of the channels", partial(fraction, 0.05), of_full=0.6),
    Contender("25% of the channels", partial(fraction, 0.25)),
    Contender("1 MiB budget", budget, of_full=0.55),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps of each contender (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    if args.json is not None:
        try:
            check_writable("json", args.json)
        except BadUsage as error:
            parser.error(str(error))
    calm_malloc()
    torch.set_num_threads(args.threads)

    steps: dict[str, Callable[[], object]] = {}
    memory = {}
    images, target = NETWORK.batch(args.batch_size, size=args.image_size)
    for contender in CONTENDERS:
        for name, memory_format in FORMATS.items():
            batch = images.contiguous(memory_format=memory_format)
            model, parameters = contender.make(batch)
            model.train().to(memory_format=memory_format)
            optimizer = torch.optim.SGD(parameters, lr=1e-3)

            def step(model=model, optimizer=optimizer, batch=batch) -> None:
                optimizer.zero_grad()
                loss(model(batch), target).backward()
                optimizer.step()

            steps[f"{contender.name}|{name}"] = step
            memory[f"{contender.name}|{name}"] = measure_memory(model, (batch, target), loss)
    times = interleaved(steps, args.rounds)

    best = {c.name: min(times[f"{c.name}|{name}"] for name in FORMATS) for c in CONTENDERS}
    rows = []
    print(f"{'':<20}{'memory format':<15}{'saved MiB':>10}{'share':>8}{'ms a step':>11}{'of full':>9}")
    for key, report in memory.items():
        contender, name = key.split("|")
        baseline = f"full|{name}"
        rows.append(Row(contender, name, report.saved_bytes, dict(report.by_kind), times[key] / 1e3))
        print(
            f"{contender:<20}{name:<15}{report.saved_bytes / 2**20:>10.1f}"
            f"{report.saved_bytes / memory[baseline].saved_bytes:>8.1%}{times[key] / 1e3:>11.1f}"
            f"{times[key] / times[baseline]:>9.2f}"
        )
    print("\nbest memory format of each:")
    ratios = {contender.name: best[contender.name] / best["full"] for contender in CONTENDERS}
    for contender in CONTENDERS:
        ratio = ratios[contender.name]
        line = f"{contender.name:<20}{best[contender.name] / 1e3:>10.1f} ms  {ratio:>6.3f} of full"
        if contender.of_full is not None:
            line += f"  <= {contender.of_full} {'reached' if ratio <= contender.of_full else 'MISSED'}"
        print(line)
    if args.json:
        figures = {"rows": [asdict(row) for row in rows], "best_of_full": ratios}
        write_json(args.json, {**conditions(), **figures})


if __name__ == "__main__":
    main()
