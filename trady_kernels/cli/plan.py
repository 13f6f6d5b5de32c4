"""``trady plan``: what channels cost, layer by layer, and what a budget buys."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from trady_kernels.atomic_write import write_json
from trady_kernels.cli.console import check_writable, make_console
from trady_kernels.cli.network import (
    add_network_arguments,
    add_selection_arguments,
    make_batch,
    make_network,
    make_sampler,
)

_DESCRIPTION = """\
Show, for every layer, its input channels, what training one of them costs, its place in the layer ranking, and how
many of them a budget buys in one draw. Nothing is trained and no weights are needed."""

_EPILOG = """\
examples:
  trady plan --model efficientnet_lite0 --budget 28000
  trady plan --budget 256KiB --batch-size 8 --image-size 224
  trady plan --model torchvision:resnet18 --budget 5% --scheme d-full-random --json plan.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_network_arguments(parser, batch_size=32, image_size=64)
    add_selection_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.json is not None:
        check_writable("json", args.json)
    model, batch = make_network(args), make_batch(args)
    sampler = make_sampler(model, batch, args)
    console = make_console()
    console.print(f"{args.model}, {args.batch_size} images of {args.image_size}x{args.image_size}\n")
    console.print(sampler.report(), soft_wrap=True, markup=False)
    if args.json is not None:
        layers = [dataclasses.asdict(layer) for layer in sampler.layer_selections()]
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        totals = {"full_cost": sampler.full_cost, "cost": sampler.cost}
        write_json(
            args.json,
            {
                "settings": settings,
                **{
                    name: {**dataclasses.asdict(cost), "elements": cost.elements}
                    for name, cost in totals.items()
                },
                "layers": layers,
            },
        )
    return 0
