"""``trady search``: find which share of each layer to train inside a budget, once for the network."""

from __future__ import annotations

import argparse

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trady_kernels.cli import usage_errors
from trady_kernels.cli.console import budget_argument, check_writable, make_console
from trady_kernels.cli.network import DEFAULT_BUDGET
from trady_kernels.cli.short_training import add_training_arguments, sizes_of
from trady_kernels.data import load_data
from trady_kernels.provenance import describe
from trady_kernels.training.run import check_device
from trady_kernels.training.search import Found, search_fractions

_DESCRIPTION = """\
Find the share of each layer's channels (0, 1/8, 1/4, 1/2 or all) that the scheme sparse-update trains inside a budget:
each layer trains alone for some steps, and what lowers the validation loss most for its cost is taken first."""

_EPILOG = """\
example:
  trady search --model efficientnet_lite0 --data fashion-mnist --budget 28000 --output fractions.json
  trady finetune --scheme sparse-update --layer-fractions fractions.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_training_arguments(
        parser, data="a fifth of its training samples validates", lr=0.1, lr_words="learning rate at first"
    )
    parser.add_argument(
        "--budget",
        type=budget_argument,
        default=DEFAULT_BUDGET,
        help="as in trady finetune (default: %(default)s, elements of one sample)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="of SGD for each layer and share (default: %(default)s)"
    )
    parser.add_argument(
        "--head-steps", type=int, default=100, help="of the head alone, before (default: %(default)s)"
    )
    parser.add_argument(
        "--validation-samples", type=int, default=512, help="samples that validate (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Search, show what each layer contributes, write the file."""
    console = make_console()
    check_writable("output", args.output)
    with usage_errors():
        check_device(args.device)
    provenance = describe(torch.device(args.device))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        usage_errors(),
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("layers and shares", total=None)
        found = search_fractions(
            args.model,
            load_data(args.data, image_size=args.image_size, validation_share=0.2),
            budget=args.budget,
            steps=args.steps,
            head_steps=args.head_steps,
            batch_size=args.batch_size,
            validation_samples=args.validation_samples,
            learning_rate=args.lr,
            seed=args.seed,
            device=args.device,
            sizes=sizes_of(args),
            on_count=lambda count: progress.update(task, total=count),
            on_candidate=lambda: progress.advance(task),
        )
    console.print(_table(found))
    found.fractions.save(args.output, elements=found.elements, provenance=provenance)
    console.print(
        f"written to {args.output}; use it with: trady finetune --scheme sparse-update --layer-fractions {args.output}"
    )
    return 0


def _table(found: Found) -> Table:
    fractions = found.fractions
    table = Table(title=f"{found.elements:,} elements for a budget of {fractions.budget}")
    table.add_column("layer")
    table.add_column("trains", justify="right")
    table.add_column("lower validation loss, by share trained alone")
    for name, gains in found.contributions.items():
        trains = fractions.layers.get(name, 0)
        table.add_row(
            name,
            f"{trains:g}" if trains else "-",
            ", ".join(f"{fraction:g}: {gain:+.4f}" for fraction, gain in sorted(gains.items())),
        )
    return table
