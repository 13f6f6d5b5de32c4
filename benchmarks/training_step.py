"""Bytes kept for backward and time of a whole training step, dense beside sparse.

python benchmarks/training_step.py
python benchmarks/training_step.py --json benchmarks/results/training_step.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels import measure_memory, select_fraction, sparsify, trainable_parameters
from trady_kernels.benchmark import calm_malloc, conditions, interleaved
from trady_kernels.models import EfficientNetLite0

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """One way to train, in one memory format: bytes kept for backward by kind, and milliseconds a step."""

    contender: str
    memory_format: str
    saved_bytes: int
    by_kind: dict[str, int]
    milliseconds: float


def network() -> nn.Module:
    torch.manual_seed(0)
    return EfficientNetLite0(num_classes=10)


def full() -> tuple[nn.Module, list[nn.Parameter]]:
    """Everything trains, batch statistics included: what a user would run without this package."""
    model = network()
    return model, list(model.parameters())


def sparse(fraction: float) -> Callable[[], tuple[nn.Module, list[nn.Parameter]]]:
    def make() -> tuple[nn.Module, list[nn.Parameter]]:
        model = sparsify(network(), torch.randn(1, 3, 64, 64))
        select_fraction(model, fraction)
        return model, trainable_parameters(model)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--fraction", type=float, default=0.05, help="share of every layer's channels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    calm_malloc()
    torch.set_num_threads(args.threads)

    contenders = {"full": full, f"sparse, {args.fraction:.0%} of the channels": sparse(args.fraction)}
    steps: dict[str, Callable[[], object]] = {}
    memory = {}
    target = torch.randint(10, (args.batch_size,))
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    for contender, make in contenders.items():
        for name, memory_format in FORMATS.items():
            model, parameters = make()
            model.train().to(memory_format=memory_format)
            optimizer = torch.optim.SGD(parameters, lr=1e-3)
            batch = images.contiguous(memory_format=memory_format)

            def step(model=model, optimizer=optimizer, batch=batch) -> None:
                optimizer.zero_grad()
                F.cross_entropy(model(batch), target).backward()
                optimizer.step()

            steps[f"{contender}|{name}"] = step
            memory[f"{contender}|{name}"] = measure_memory(model, (batch, target), F.cross_entropy)
    times = interleaved(steps, args.rounds)

    rows = []
    print(f"{'':<32}{'memory format':<15}{'saved MiB':>10}{'share':>8}{'ms a step':>11}{'of full':>9}")
    for key, report in memory.items():
        contender, name = key.split("|")
        baseline = f"full|{name}"
        rows.append(Row(contender, name, report.saved_bytes, dict(report.by_kind), times[key] / 1e3))
        print(
            f"{contender:<32}{name:<15}{report.saved_bytes / 2**20:>10.1f}"
            f"{report.saved_bytes / memory[baseline].saved_bytes:>8.1%}{times[key] / 1e3:>11.1f}"
            f"{times[key] / times[baseline]:>9.2f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({**conditions(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
