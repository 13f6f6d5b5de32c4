"""``trady memory``: what a training step keeps for backward, dense beside sparse."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from trady_kernels import resident
from trady_kernels.atomic_write import write_json
from trady_kernels.cli import BadUsage, Failed
from trady_kernels.cli.console import PLOT_FORMATS, check_plottable, check_writable, in_bytes, make_console
from trady_kernels.cli.memory_plot import plot_memory
from trady_kernels.cli.network import (
    add_network_arguments,
    add_selection_arguments,
    in_autocast,
    make_batch,
    make_network,
    make_sampler,
    make_selection,
)
from trady_kernels.convert import conversion_report, sparse_layers
from trady_kernels.memory import KINDS, MemoryReport, measure_memory
from trady_kernels.resident import ResidentReport, in_fresh_process, measure_resident

_DESCRIPTION = """\
Run one training step of the dense network and one with the channels that a budget buys, and show the bytes that
each keeps between forward and backward, by kind and by module; the allocator's high-water mark; and what the whole
process grows by, each step in a process of its own."""

_EPILOG = """\
examples:
  trady memory --model efficientnet_lite0 --budget 28000
  trady memory --budget 1MiB --batch-size 8 --image-size 224 --modules 20 --plot memory.png
  trady memory --model timm:resnet18 --budget 5% --autocast bfloat16 --json memory.json"""


@dataclass(frozen=True)
class _Measured:
    """One step: what torch counts, and what the system sees (None where it does not tell)."""

    counted: MemoryReport
    resident: ResidentReport | None

    def to_dict(self) -> dict[str, Any]:
        return self.counted.to_dict() | {"resident": self.resident.to_dict() if self.resident else None}


@dataclass(frozen=True)
class _Selected:
    """Measured bytes of what the budget counts: inputs that the sparse layers keep, gradients of their rows."""

    inputs: int
    weight_gradients: int

    @property
    def together(self) -> int:
        return self.inputs + self.weight_gradients


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
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw the bytes by kind here ({', '.join(PLOT_FORMATS)})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace) -> int:
    """Measure both steps and print the tables."""
    _check_files(args)
    console = make_console()
    loaded = make_network(args)
    dense_model, batch = loaded.model, make_batch(loaded, args)
    sparse_model = copy.deepcopy(dense_model)
    sampler = make_sampler(sparse_model, batch, args)
    no_resident = resident.unavailable()
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=2 if no_resident else 4)

        def stage(text: str, measure: Callable[[], Any]) -> Any:
            progress.update(task, description=text)
            result = measure()
            progress.advance(task)
            return result

        def measured(name: str, model: Any) -> _Measured:
            with in_autocast(args):
                try:
                    counted = stage(
                        f"{name} step",
                        lambda: measure_memory(model, (batch.input, batch.labels), F.cross_entropy),
                    )
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise BadUsage(
                        f"--batch-size: got {args.batch_size}, of which a batch norm that trains sees one value a channel, "
                        "expected at least 2, or a larger --image-size"
                    ) from error
            if no_resident:
                return _Measured(counted, None)
            return _Measured(
                counted,
                stage(f"{name} step in a process of its own", lambda: _measure_apart(args, name == "sparse")),
            )

        dense, sparse = measured("dense", dense_model), measured("sparse", sparse_model)

    cost, selected = sampler.cost, _selected(sparse_model, sparse.counted)
    budget = sampler.budget if sampler.budget is not None else "no budget"
    console.print(f"{args.model}, {batch}, {dense.counted.device}")
    biases = conversion_report(sparse_model).biases
    console.print(
        f"dense: all parameters train; sparse: {sampler.scheme} at {budget}, {cost.elements:,} elements of one sample"
        + (f", and {len(biases)} biases, {sum(biases.values()):,} elements" if biases else "")
        + "\n"
    )
    console.print(_comparison(dense, sparse))
    if no_resident:
        console.print(no_resident)
    console.print(
        f"what the budget counts, selected inputs and weight gradients: {in_bytes(cost.bytes)} counted, "
        f"{in_bytes(selected.together)} measured ({in_bytes(selected.inputs)} and "
        f"{in_bytes(selected.weight_gradients)})"
    )
    if cost.bytes:
        console.print(
            f"the sparse step keeps {in_bytes(sparse.counted.saved_bytes)} in all, "
            f"{sparse.counted.saved_bytes / cost.bytes:.3g} times what is counted"
        )
    if args.modules > 0:
        console.print(_modules(dense.counted, sparse.counted, args.modules))
    if args.plot is not None:
        given = "" if sampler.budget is None else f", budget {make_selection(args).budget}"
        plot_memory(args.plot, dense.counted, sparse.counted, f"{args.model}, {batch}{given}")
        console.print(f"drawn in {args.plot}")
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot")}
        write_json(
            args.json,
            {
                "settings": settings,
                "counted": {**dataclasses.asdict(cost), "elements": cost.elements},
                "measured": dataclasses.asdict(selected) | {"together": selected.together},
                "dense": dense.to_dict(),
                "sparse": sparse.to_dict(),
            },
        )
    return 0


def _check_files(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_writable("json", args.json)
    if args.plot is not None:
        check_plottable(args.plot)


def _measure_apart(args: argparse.Namespace, sparse: bool) -> ResidentReport:
    try:
        return in_fresh_process(_resident, args, sparse)
    except RuntimeError as error:
        raise Failed(str(error)) from error


def _resident(args: argparse.Namespace, sparse: bool) -> ResidentReport:
    loaded = make_network(args)
    batch = make_batch(loaded, args)
    if sparse:
        make_sampler(loaded.model, batch, args)
    with in_autocast(args):
        return measure_resident(loaded.model, (batch.input, batch.labels), F.cross_entropy)


def _selected(model: Any, report: MemoryReport) -> _Selected:
    names = sparse_layers(model)
    return _Selected(
        sum(report.by_module.get(name, 0) for name in names),
        sum(report.gradients.get(f"{name}.channel_weight", 0) for name in names),
    )


def _table(heading: str) -> Table:
    table = Table()
    table.add_column(heading, no_wrap=True)
    for column in ("dense", "sparse", "of dense"):
        table.add_column(column, justify="right")
    return table


def _add(table: Table, name: str, dense: int, sparse: int) -> None:
    table.add_row(name, in_bytes(dense), in_bytes(sparse), f"{sparse / dense:.1%}" if dense else "-")


def _comparison(dense: _Measured, sparse: _Measured) -> Table:
    table = _table("kept for backward")
    both = dense.counted, sparse.counted
    for kind in KINDS:
        if any(kind in report.by_kind for report in both):
            _add(table, kind, *(report.by_kind.get(kind, 0) for report in both))
    table.add_section()
    _add(table, "together", *(report.saved_bytes for report in both))
    table.add_row("parameters referenced", *(in_bytes(report.parameter_bytes) for report in both), "")
    table.add_section()
    _add(table, "gradients", *(report.gradient_bytes for report in both))
    _add(table, "allocator's peak in the step", *(report.peak_bytes for report in both))
    if dense.resident and sparse.resident:
        _add(table, "process, graph alive", dense.resident.graph_bytes, sparse.resident.graph_bytes)
        _add(table, "process, peak in the step", dense.resident.peak_bytes, sparse.resident.peak_bytes)
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
