"""``trady bench``: the operators beside what one would otherwise run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import track

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark import (
    LAYERS,
    LINEARS,
    SELECTED,
    ConvLayer,
    Row,
    calm_malloc,
    conv2d_rows,
    distinct,
    gather_rows,
    linear_rows,
    report,
    table,
)
from trady_kernels.cli import BadUsage
from trady_kernels.cli.console import check_writable, make_console

_DESCRIPTION = """\
Time the operators on the layers of real networks, each beside ATen on the already compact input (gathering is in
nobody's time) and beside the dense call. All contenders of a row run interleaved in rotating order; medians. On a
shared machine only the ratios mean anything."""

_EPILOG = """\
examples:
  trady bench
  trady bench --operator conv2d_channel_grad --network resnet18 --selected 1,4,16
  trady bench --format channels_last --threads 1 --json bench.json"""

_NETWORKS = tuple(dict.fromkeys(layer.network for layer in LAYERS))


#: Benchmarks of one layer at a time, by operator.
_BY_LAYER: dict[str, Callable[..., Iterator[Row]]] = {
    "conv2d_channel_grad": conv2d_rows,
    "gather_channels": gather_rows,
}
FORMATS = ("contiguous", "channels_last")
_OPERATORS = (*_BY_LAYER, "linear_channel_grad")


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers of channels such as 1,4,16")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--operator", choices=_OPERATORS, help="this operator only (default: all)")
    parser.add_argument(
        "--network", choices=_NETWORKS, help="this network's layers only (default: mobilenet_v2 and resnet18)"
    )
    parser.add_argument(
        "--selected",
        type=_counts,
        default=SELECTED,
        metavar="K[,K]",
        help="numbers of selected channels beside C/4 (default: 1,4,16)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="memory format of the convolutions' tensors (default: both)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="calls of each contender (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Time and print."""
    for name in ("batch_size", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise BadUsage(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if args.json is not None:
        check_writable("json", args.json)
    calm_malloc()
    torch.set_num_threads(args.threads)
    console = make_console()
    networks = (args.network,) if args.network else ("mobilenet_v2", "resnet18")
    layers = distinct(layer for layer in LAYERS if layer.network in networks)
    rows: list[Row] = []
    for operator in (args.operator,) if args.operator else _OPERATORS:
        for memory_format in (args.format,) if args.format else FORMATS:
            steps = _steps(operator, memory_format, layers, args)
            found = [
                row
                for step in track(
                    steps, f"{operator}, {memory_format}", console=console, disable=not console.is_terminal
                )
                for row in step
            ]
            if found:
                about = f"{operator}, {memory_format}, batch {args.batch_size}, {args.threads} threads"
                console.print(f"{about}\n{table(found)}\n", soft_wrap=True, markup=False)
            rows += found
    if args.json is not None:
        write_json(args.json, report(rows))
    return 0


def _steps(
    operator: str, memory_format: str, layers: list[ConvLayer], args: argparse.Namespace
) -> list[Iterator[Row]]:
    """The rows of one operator, a layer at a time, so that a progress bar can count them."""
    if operator in _BY_LAYER:
        return [
            _BY_LAYER[operator](
                [layer],
                args.selected,
                batch=args.batch_size,
                memory_format=memory_format,
                rounds=args.rounds,
            )
            for layer in layers
        ]
    if memory_format != FORMATS[0]:  # a linear layer has but one
        return []
    return [linear_rows([size], args.selected, rounds=args.rounds) for size in LINEARS]
