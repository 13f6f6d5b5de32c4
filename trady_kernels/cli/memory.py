"""``trady memory``: what a training step keeps for backward, dense beside sparse."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import torch.nn.functional as F
from rich.table import Table

from trady_kernels.atomic_write import write_json
from trady_kernels.cli.console import check_writable, in_bytes, make_console
from trady_kernels.cli.network import (
    add_network_arguments,
    add_selection_arguments,
    make_batch,
    make_network,
    make_sampler,
)
from trady_kernels.memory import KINDS, MemoryReport, measure_memory

_DESCRIPTION = """\
Run one training step of the dense network and one with the channels that a budget buys, and show the bytes that
each keeps between forward and backward, by kind and by module, and the allocator's high-water mark."""

_EPILOG = """\
examples:
  trady memory --model efficientnet_lite0 --budget 28000
  trady memory --budget 1MiB --batch-size 8 --image-size 224 --modules 20
  trady memory --model timm:resnet18 --budget 5% --json memory.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_network_arguments(parser, batch_size=8, image_size=224)
    add_selection_arguments(parser)
    parser.add_argument(
        "--modules",
        type=int,
        default=10,
        metavar="N",
        help="modules to list, those that keep most in the dense step first; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Measure both steps and print the tables."""
    if args.json is not None:
        check_writable("json", args.json)
    console = make_console()
    dense_model, batch = make_network(args), make_batch(args)
    sparse_model = copy.deepcopy(dense_model)
    sampler = make_sampler(sparse_model, batch, args)
    with console.status("measuring the dense step"):
        dense = measure_memory(dense_model, (batch.images, batch.labels), F.cross_entropy)
    with console.status("measuring the sparse step"):
        sparse = measure_memory(sparse_model, (batch.images, batch.labels), F.cross_entropy)

    cost = sampler.cost
    console.print(
        f"{args.model}, {args.batch_size} images of {args.image_size}x{args.image_size}, {dense.device}"
    )
    console.print(
        f"dense: all parameters train; sparse: {sampler.scheme} at "
        f"{sampler.budget if sampler.budget is not None else 'no budget'}, {cost.elements:,} elements of one sample\n"
    )
    console.print(_comparison(dense, sparse))
    console.print(
        f"counted: weight gradients and stored inputs of the selected channels take {in_bytes(cost.bytes)} in this "
        f"batch; measured: the sparse step keeps {in_bytes(sparse.saved_bytes)}"
    )
    if args.modules > 0:
        console.print(_modules(dense, sparse, args.modules))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(
            args.json,
            {
                "settings": settings,
                "counted": {**dataclasses.asdict(cost), "elements": cost.elements},
                "dense": dense.to_dict(),
                "sparse": sparse.to_dict(),
            },
        )
    return 0


def _table(heading: str) -> Table:
    table = Table()
    table.add_column(heading, no_wrap=True)
    for column in ("dense", "sparse", "of dense"):
        table.add_column(column, justify="right")
    return table


def _add(table: Table, name: str, dense: int, sparse: int) -> None:
    table.add_row(name, in_bytes(dense), in_bytes(sparse), f"{sparse / dense:.1%}" if dense else "-")


def _comparison(dense: MemoryReport, sparse: MemoryReport) -> Table:
    table = _table("kept for backward")
    for kind in KINDS:
        if kind in dense.by_kind or kind in sparse.by_kind:
            _add(table, kind, dense.by_kind.get(kind, 0), sparse.by_kind.get(kind, 0))
    table.add_section()
    _add(table, "together", dense.saved_bytes, sparse.saved_bytes)
    _add(table, "parameters referenced", dense.parameter_bytes, sparse.parameter_bytes)
    _add(table, "peak of the step", dense.peak_bytes, sparse.peak_bytes)
    return table


def _modules(dense: MemoryReport, sparse: MemoryReport, count: int) -> Table:
    names = dense.by_module.keys() | sparse.by_module.keys()
    largest = sorted(names, key=lambda name: (-dense.by_module.get(name, 0), name))[:count]
    table = _table(f"module ({len(largest)} of {len(names)})")
    for name in largest:
        _add(
            table, name or "(the network itself)", dense.by_module.get(name, 0), sparse.by_module.get(name, 0)
        )
    return table
