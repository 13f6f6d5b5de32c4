"""Bytes that whole networks keep for backward: full fine-tuning, 5% of every layer's channels, a 1 MiB budget.

Beside each sparse figure stands the floor, the least that such a step can keep (benchmarks/floor.py says what is
counted), and what the figures must reach. Networks are at random values: bytes depend on shapes alone. For the
gradient error of 8 bits affines and layer scales are around one and batch norms hold the batch's statistics.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from floor import Floor, floor
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from whole_networks import BUDGET, FRACTION, NETWORKS, Network, loss

import trady_kernels as tk
from trady_kernels.atomic_write import write_atomically, write_json
from trady_kernels.benchmark.report import conditions
from trady_kernels.cli import BadUsage
from trady_kernels.cli.console import check_writable, make_console
from trady_kernels.cli.memory_plot import look
from trady_kernels.convert import sparse_layers
from trady_kernels.memory import KINDS
from trady_kernels.resident import in_fresh_process, measure_resident

EPILOG = """\
examples:
  python benchmarks/saved_memory.py --json benchmarks/results/saved_memory.json --plot saved_memory.png
  python benchmarks/saved_memory.py --autocast bfloat16
  python benchmarks/saved_memory.py --network ResNet-18 --network BERT
  python benchmarks/saved_memory.py --resident"""

MIB = 2**20
#: Arguments of ``sparsify``.
EIGHT_BIT: dict[str | None, dict[str, Any]] = {
    None: {},
    "others": {"lean": "8bit"},
    "all": {"lean": "8bit", "stored": "8bit"},
}
#: The most that a step may keep, as a multiple of its floor: bits and channels exactly, and other operations
#: exactly and in 8 bits.
OF_FLOOR = {"relu-like": 1.15, "exact": 1.1, "8 bit": 0.4}
#: Growth of the process beside the counted bytes, and the sparse step's high-water mark beside the dense one's.
RESIDENT_ERROR, RESIDENT_PEAK = 0.1, 0.3


@dataclass(frozen=True)
class Settings:
    """What every measurement of a run has in common."""

    batch_size: int
    seeds: int
    autocast: str | None
    threads: int

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", getattr(torch, self.autocast)) if self.autocast else nullcontext()


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        selection: "5%" of every layer's channels, or a budget; None for full fine-tuning.
        eight_bit: what is kept in 8 bits: nothing, what "others" keep, or "all" of it, selected channels too.
    """

    selection: str | None = None
    eight_bit: str | None = None

    @property
    def name(self) -> str:
        if self.selection is None:
            return "full"
        suffix = {None: "", "others": ", 8 bit", "all": ", all 8 bit"}
        return f"{self.selection}{suffix[self.eight_bit]}"

    def seeds(self, settings: Settings) -> int:
        """How many draws change what is kept."""
        return settings.seeds if self.selection == BUDGET else 1

    def build(
        self, network: Network, example: Any, seed: int, prepare: Callable[[nn.Module], object] | None = None
    ) -> nn.Module:
        """The network, ready for its first step; ``prepare`` sees it before it is converted."""
        model = network.make()
        if prepare is not None:
            prepare(model)
        if self.selection is None:
            return model
        tk.sparsify(model, example, **EIGHT_BIT[self.eight_bit])
        if self.selection == FRACTION:
            tk.select_fraction(model, float(FRACTION.rstrip("%")) / 100, seed)
        else:
            tk.ChannelSampler(model, example, budget=self.selection, scheme="d-full-random", seed=seed)
        return model


def contenders(network: Network) -> Iterator[Contender]:
    yield Contender()
    for selection in (FRACTION, BUDGET):
        yield Contender(selection)
        if not network.relu_like:
            yield Contender(selection, "others")
    yield Contender(FRACTION, "all")


@dataclass(frozen=True)
class Draw:
    """What one step keeps: bytes."""

    saved: int
    by_kind: dict[str, int]
    peak: int
    floor: Floor | None = None
    cosine: float | None = None
    relative_error: float | None = None

    @property
    def of_floor(self) -> float | None:
        return self.saved / self.floor.bytes if self.floor else None


@dataclass(frozen=True)
class Row:
    """One network trained in one way: a draw for each seed."""

    network: str
    contender: Contender
    draws: tuple[Draw, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(draw.saved for draw in self.draws)

    @property
    def worst(self) -> Draw:
        return max(self.draws, key=lambda draw: draw.saved)

    @property
    def worst_of_floor(self) -> float | None:
        factors = [draw.of_floor for draw in self.draws if draw.of_floor is not None]
        return max(factors, default=None)


def trained_channels(model: nn.Module) -> dict[str, int]:
    return {name: len(layer.channels) for name, layer in sparse_layers(model).items()}


def run(model: nn.Module, input: Any) -> Any:
    return model(**input) if isinstance(input, dict) else model(input)


def settle(model: nn.Module, input: Any) -> None:
    """Affines and layer scales around one, and the batch's own statistics in batch norms.

    As constructed, ConvNeXt scales its branches by 1e-6, and errors inside them would not count.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [norm.momentum for norm in norms]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and name != "bias":
                    parameter.uniform_(0.5, 1.5)
        for norm in norms:
            norm.momentum = 1.0
        run(model.train(), input)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def gradients(model: nn.Module, batch: Any) -> torch.Tensor:
    """The gradients of all selected channels in one row, from a step with the same dropout each time."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        loss(run(model, batch[0]), batch[1]).backward()
    rows = [layer.channel_weight.grad for layer in sparse_layers(model).values()]
    return torch.cat([row.flatten().double() for row in rows if row is not None])


def gradient_error(network: Network, contender: Contender, batch: Any, seed: int) -> tuple[float, float]:
    """Cosine with the exact gradient, and length of the difference relative to it."""
    exact, coarse = (
        gradients(
            Contender(contender.selection, eight_bit).build(
                network, batch[0], seed, prepare=lambda model: settle(model, batch[0])
            ),
            batch,
        )
        for eight_bit in (None, contender.eight_bit)
    )
    difference = torch.linalg.vector_norm(coarse - exact) / torch.linalg.vector_norm(exact)
    return float(torch.cosine_similarity(coarse, exact, dim=0)), float(difference)


def measure(network: Network, contender: Contender, settings: Settings) -> Iterator[Draw]:
    batch = network.batch(settings.batch_size)
    for seed in range(contender.seeds(settings)):
        with settings.precision():
            model = contender.build(network, batch[0], seed).train()
            report = tk.measure_memory(model, batch, loss)
            kept = report.saved_bytes, dict(report.by_kind), report.peak_bytes
            if contender.selection is None:
                yield Draw(*kept)
                continue
            head = tk.conversion_report(model).head
            trained = trained_channels(model)
            del model
            # The floor counts selected channels as they are.
            least = floor(network.make(), batch[0], trained, head) if contender.eight_bit != "all" else None
            error = gradient_error(network, contender, batch, seed) if contender.eight_bit else ()
            yield Draw(*kept, least, *error)


# -- in fresh processes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """What one process grows by, beside the bytes counted in another: full and sparse of one network."""

    network: str
    contender: str
    counted: int
    graph: int
    peak: int

    @property
    def error(self) -> float:
        return self.graph / self.counted - 1


def resident(network: Network, contender: Contender, settings: Settings) -> Resident:
    """To be called in a process of its own."""
    torch.set_num_threads(settings.threads)
    batch = network.batch(settings.batch_size)
    with settings.precision():
        model = contender.build(network, batch[0], seed=0).train()
        grown = measure_resident(model, batch, loss)
        counted = tk.measure_memory(model, batch, loss)
    return Resident(network.name, contender.name, counted.saved_bytes, grown.graph_bytes, grown.peak_bytes)


# -- tables ----------------------------------------------------------------------------------------


def verdict(value: float, limit: float | None, form: Callable[[float], str]) -> str:
    if limit is None:
        return ""
    return f"<= {form(limit)} {'reached' if value <= limit else 'MISSED'}"


def percent(value: float) -> str:
    return (
        f"{value:.3g}%" if value >= 100 else f"{100 * value:.2f}%" if value < 0.1 else f"{100 * value:.1f}%"
    )


def times(value: float) -> str:
    return f"{value:.2f}"


def of_floor_limit(network: Network, contender: Contender) -> float:
    return OF_FLOOR["8 bit" if contender.eight_bit else "relu-like" if network.relu_like else "exact"]


def aligned(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 1 else "left", no_wrap=True)
    return table


def main_table(rows: Sequence[Row], networks: Sequence[Network], judged: bool) -> Table:
    table = aligned(
        "network", "trains", "saved MiB", "worst", "of full", "must reach", "floor MiB", "over floor",
        "must reach", "peak MiB", "of full",
    )  # fmt: skip
    for network in networks:
        of_network = [row for row in rows if row.network == network.name]
        full = next((row for row in of_network if row.contender.selection is None), None)
        if full is None:
            continue
        for row in of_network:
            worst, factor = row.worst, row.worst_of_floor
            limit = network.shares.get(row.contender.selection or "") if judged else None
            table.add_row(
                network.name if row is full else "",
                row.contender.name,
                f"{row.mean / MIB:.2f}",
                f"{worst.saved / MIB:.2f}" if len(row.draws) > 1 else "",
                percent(row.mean / full.mean),
                verdict(worst.saved / full.mean, limit, percent),
                f"{statistics.fmean(draw.floor.bytes for draw in row.draws if draw.floor) / MIB:.2f}"
                if factor is not None
                else "",
                times(factor) if factor is not None else "",
                verdict(factor, of_floor_limit(network, row.contender), times) if factor and judged else "",
                f"{worst.peak / MIB:.1f}",
                percent(worst.peak / full.worst.peak),
            )
        table.add_section()
    return table


def kind_table(rows: Sequence[Row]) -> Table:
    kinds = [kind for kind in KINDS if any(draw.by_kind.get(kind) for row in rows for draw in row.draws)]
    table = aligned("MiB by kind", "trains", *kinds)
    for row in rows:
        table.add_row(
            row.network if row.contender.selection is None else "",
            row.contender.name,
            *(f"{row.worst.by_kind.get(kind, 0) / MIB:.2f}" for kind in kinds),
        )
    return table


def floor_table(rows: Sequence[Row]) -> Table:
    table = aligned("floor, MiB", "trains", "channels", "bits", "pooled", "others")
    for row in rows:
        if (least := row.worst.floor) is None:
            continue
        others = ", ".join(
            f"{name} {size / MIB:.2f}" for name, size in least.other.items() if size > MIB / 100
        )
        sizes = (f"{size / MIB:.2f}" for size in (least.selected, least.bits, least.pooled))
        table.add_row(row.network, row.contender.name, *sizes, others or "-")
    return table


def error_table(rows: Sequence[Row]) -> Table:
    table = aligned("gradient error of 8 bit", "trains", "cosine", "relative L2")
    for row in rows:
        if row.worst.cosine is not None:
            cosine = min(draw.cosine for draw in row.draws if draw.cosine is not None)
            error = max(draw.relative_error for draw in row.draws if draw.relative_error is not None)
            table.add_row(row.network, row.contender.name, f"{cosine:.6f}", f"{error:.4f}")
    return table


def resident_table(rows: Sequence[Resident]) -> Table:
    table = aligned(
        "network", "trains", "counted MiB", "process grows by MiB", "difference", "must reach",
        "step's high-water mark MiB", "of full", "must reach",
    )  # fmt: skip
    full = {row.network: row for row in rows if row.contender == "full"}
    relu_like = {network.name: network.relu_like for network in NETWORKS}
    for row in rows:
        share = row.peak / full[row.network].peak
        table.add_row(
            row.network if row.contender == "full" else "",
            row.contender,
            f"{row.counted / MIB:.2f}",
            f"{row.graph / MIB:.2f}",
            f"{row.error:+.1%}",
            verdict(abs(row.error), RESIDENT_ERROR, percent),
            f"{row.peak / MIB:.1f}",
            percent(share),
            verdict(share, RESIDENT_PEAK, percent)
            if row.contender != "full" and relu_like[row.network]
            else "",
        )
    return table


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Stacked bars by kind, one panel a network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.network for row in rows))
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.3 * columns, 3.1 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    kinds = [kind for kind in KINDS if any(row.worst.by_kind.get(kind) for row in rows)]
    for panel, name in zip(panels, names, strict=False):
        of_network = [row for row in rows if row.network == name]
        for index, row in enumerate(of_network):
            bottom = 0.0
            for kind in kinds:
                size = row.worst.by_kind.get(kind, 0) / MIB
                panel.bar(index, size, bottom=bottom, label="" if index else kind, **look(kind))
                bottom += size
            panel.annotate(f"{bottom:.3g}", (index, bottom), ha="center", va="bottom", fontsize=8)
        panel.set_xticks(
            range(len(of_network)), [row.contender.name.replace(", ", "\n") for row in of_network]
        )
        panel.tick_params(axis="x", labelsize=8)
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("MiB saved for backward", fontsize=8)
    for panel in list(panels)[len(names) :]:
        panel.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(kinds), 2 * columns), fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network",
        action="append",
        choices=[network.name for network in NETWORKS],
        metavar="NAME",
        help=f"only this one, may be repeated: {', '.join(network.name for network in NETWORKS)}",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the budget (default: %(default)s)")
    parser.add_argument("--autocast", choices=["bfloat16"], help="measure under autocast (default: float32)")
    parser.add_argument(
        "--resident",
        action="store_true",
        help="what a process grows by instead, of the networks whose activations keep bits; on Linux",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw stacked bars by kind into this PNG"
    )
    args = parser.parse_args()
    for name in ("batch_size", "seeds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    for name, path in (("json", args.json), ("plot", args.plot)):
        if path is not None:
            try:
                check_writable(name, path)
            except BadUsage as error:
                parser.error(str(error))
    if args.resident and args.plot:
        parser.error("--plot: got it beside --resident, expected one of them: the plot is of the kinds")
    return args


def main() -> None:
    args = parse()
    settings = Settings(args.batch_size, args.seeds, args.autocast, args.threads)
    torch.set_num_threads(settings.threads)
    console = make_console()
    wanted = [
        n for n in NETWORKS if (n.name in args.network if args.network else n.relu_like or not args.resident)
    ]
    networks = [network for network in wanted if network.missing is None]
    for network in wanted:
        if network.missing is not None:
            console.print(f"{network.name} is left out: {network.missing}")
    work = [(network, contender) for network in networks for contender in contenders(network)]
    rows: list[Row] = []
    residents: list[Resident] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=sum(contender.seeds(settings) for _, contender in work))
        for network, contender in work:
            progress.update(task, description=f"{network.name}, {contender.name}")
            if args.resident:
                residents.append(in_fresh_process(resident, network, contender, settings))
                progress.advance(task, contender.seeds(settings))
                continue
            draws = []
            for draw in measure(network, contender, settings):
                draws.append(draw)
                progress.advance(task)
            rows.append(Row(network.name, contender, tuple(draws)))
    about = f"batch {settings.batch_size}, 224x224 (BERT 128 tokens), {settings.autocast or 'float32'}"
    console.print(f"{about}, trained whole: everything, with batch statistics")
    for network in networks:
        if network.note:
            console.print(f"{network.name}: {network.note}")
    console.print()
    if args.resident:
        console.print(resident_table(residents))
    else:
        if settings.autocast is not None:
            console.print("what must be reached is set for float32: autocast has its own floors")
        console.print(f"{BUDGET}: mean and worst of {settings.seeds} draws from all layers' channels\n")
        for table in (
            main_table(rows, networks, settings.autocast is None),
            kind_table(rows),
            floor_table(rows),
            error_table(rows),
        ):
            if table.row_count:
                console.print(table)
                console.print()
    if args.plot:
        plot(args.plot, rows)
    if args.json:
        figures = {"rows": [asdict(row) for row in rows], "resident": [asdict(row) for row in residents]}
        write_json(args.json, {**conditions(), "settings": asdict(settings), **figures})


if __name__ == "__main__":
    main()
