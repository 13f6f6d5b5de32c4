"""``trady plan``: what channels cost, layer by layer, and what a budget or a total of memory buys."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from trady_kernels.atomic_write import write_json
from trady_kernels.batch import Example
from trady_kernels.cli import BadUsage, usage_errors
from trady_kernels.cli.console import check_writable, in_bytes, make_console
from trady_kernels.cli.network import (
    DEFAULT_BUDGET,
    Selection,
    add_network_arguments,
    add_selection_arguments,
    in_autocast,
    make_batch,
    make_network,
    make_sampler,
    make_selection,
    make_sparse,
)
from trady_kernels.cost import Budget
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.total_memory import (
    EVERYTHING,
    NOTHING,
    OPTIMIZERS,
    StepMeter,
    TrainingStep,
    check_scheme,
    fit_total,
)

_DESCRIPTION = """\
Show, for every layer, its input channels, what training one of them costs, its place in the layer ranking, and how
many of them a budget buys in one draw. Nothing is trained and no weights are needed.

With --total: show, for every batch size that fits, the largest budget with which a whole training step (weights,
optimiser state, gradients, what is saved for backward, and what is there for a moment) stays within the total. Every
answer is measured by running the step."""

_EPILOG = """\
examples:
  trady plan --model efficientnet_lite0 --budget 28000
  trady plan --budget 256KiB --batch-size 8 --image-size 224
  trady plan --model torchvision:resnet18 --budget 5% --scheme d-full-random --json plan.json
  trady plan --scheme frugal@5% --image-size 64
  trady plan --total 64MiB --optimizer adam --image-size 64 --batch-size 16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_network_arguments(parser, batch_size=32, image_size=64)
    add_selection_arguments(parser)
    parser.add_argument(
        "--total",
        metavar="SIZE",
        help="bytes for the whole step, such as 256MiB, instead of --budget; --batch-size is then the largest to try",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="whose state is in the total (default: sgd, with momentum where the scheme has it)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.json is not None:
        check_writable("json", args.json)
    return _plan_budget(args) if args.total is None else _plan_total(args)


def _settings(args: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(args).items() if name != "json"}


def _plan_budget(args: argparse.Namespace) -> int:
    loaded = make_network(args)
    batch = make_batch(loaded, args)
    sampler = make_sampler(loaded.model, batch, args)
    console = make_console()
    console.print(f"{args.model}, {batch}\n")
    console.print(sampler.report(), soft_wrap=True, markup=False)
    if args.json is not None:
        layers = [dataclasses.asdict(layer) for layer in sampler.layer_selections()]
        totals = {"full_cost": sampler.full_cost, "cost": sampler.cost}
        backwards = {"full_backward": sampler.full_backward, "backward": sampler.backward}
        write_json(
            args.json,
            {
                "settings": _settings(args),
                **{
                    name: {**dataclasses.asdict(cost), "elements": cost.elements}
                    for name, cost in totals.items()
                },
                **{
                    name: {**dataclasses.asdict(backward), "flops": backward.flops}
                    for name, backward in backwards.items()
                },
                "layers": layers,
            },
        )
    return 0


def _plan_total(args: argparse.Namespace) -> int:
    with usage_errors():
        check_scheme(Spec.parse(args.scheme).scheme)
    selection = make_selection(args)
    total = _total(args, selection)
    optimizer = args.optimizer or ("sgd-momentum" if selection.spec.momentum else "sgd")
    loaded = make_network(args)
    kind = loaded.front.kind
    ranking = make_sparse(loaded.model, make_batch(loaded, args, 1), args, selection)

    def batch_of(size: int) -> tuple[Example, torch.Tensor]:
        batch = make_batch(loaded, args, size)
        return batch.input, batch.labels

    console = make_console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        usage_errors(),
        in_autocast(args),
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        task, numbers = progress.add_task("", total=None), count(1)

        def on_measure(batch_size: int, budget: Budget) -> None:
            words = {EVERYTHING: "every channel", NOTHING: "no channel"}.get(budget, str(budget))
            progress.update(task, description=f"measuring step {next(numbers)}: {kind} {batch_size}, {words}")

        meter = StepMeter(
            loaded.model,
            batch_of,
            F.cross_entropy,
            optimizer,
            selection.spec.scheme,
            ranking,
            args.pool,
            args.seed,
        )
        steps = fit_total(meter, total, args.batch_size, on_measure)

    console.print(
        f"{args.model}, {kind} of {loaded.front.size}, {optimizer}, {args.scheme}: what fits in "
        f"{in_bytes(total)}\n"
    )
    console.print(_steps(steps, kind))
    console.print(
        f"measured: of three draws of channels the one that takes most; total is weights, optimiser state, {kind} and "
        "the peak, which\ncontains saved tensors and gradients; Python and the libraries themselves come on top"
    )
    if steps[-1].batch_size == args.batch_size:
        console.print(f"no batch above {args.batch_size} was tried; --batch-size raises that")
    if args.json is not None:
        write_json(
            args.json,
            {
                "settings": _settings(args) | {"optimizer": optimizer},
                "total_bytes": total,
                "steps": [step.to_dict() for step in steps],
            },
        )
    return 0


def _total(args: argparse.Namespace, selection: Selection) -> int:
    expected = "expected a size in bytes such as 256MiB"
    if selection.budget != DEFAULT_BUDGET:
        raise BadUsage(
            "--budget: got one, or an @ in --scheme, beside --total, expected one of the two: the total decides it"
        )
    try:
        total = Budget.parse(args.total)
    except ValueError as error:
        raise BadUsage(f"--total: got {args.total!r}, {expected}") from error
    if total.kind != "bytes":
        raise BadUsage(f"--total: got {args.total!r}, {expected}")
    return int(total.amount)


def _steps(steps: Sequence[TrainingStep], kind: str) -> Table:
    table = Table()
    headings = (
        kind,
        "--budget",
        "of full cost",
        "channels",
        "weights",
        "optimiser",
        "saved",
        "gradients",
    )
    for heading in (*headings, "peak", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(
            str(step.batch_size),
            step.budget_text or "none: the head alone",
            f"{step.share:.2%}",
            f"{step.channels:,}",
            *map(
                in_bytes,
                (
                    step.model_bytes,
                    step.optimizer_bytes,
                    step.saved_bytes,
                    step.gradient_bytes,
                    step.peak_bytes,
                    step.total_bytes,
                ),
            ),
        )
    return table
