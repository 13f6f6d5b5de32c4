"""``trady bench``: the operators beside what one would otherwise run, and beside what the machine allows."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.layers import CONVS, LAYERS, LINEARS, NETWORKS, Layer, distinct
from trady_kernels.benchmark.report import (
    conditions,
    goals_table,
    limits_table,
    report,
    rows_table,
    summary_table,
)
from trady_kernels.benchmark.roofline import Roofline
from trady_kernels.benchmark.rows import BENCHMARKS, Row, Setting, measure
from trady_kernels.benchmark.timing import calm_malloc
from trady_kernels.benchmark.tune import Point, fit, key_of, points
from trady_kernels.cli import BadUsage, Failed
from trady_kernels.cli.bench_plot import plot_rows
from trady_kernels.cli.console import PLOT_FORMATS, check_plottable, check_writable, make_console
from trady_kernels.ops import choice
from trady_kernels.ops.backend import unavailable
from trady_kernels.ops.choice import DTYPES
from trady_kernels.ops.layout import FORMATS

_DESCRIPTION = """\
Time the operators on the layers of real networks, for few selected channels and shares of them, in both memory
formats, float32 and bfloat16. Each stands beside

  aten      ATen's call alone on an input that is compact already: gathering that is in nobody's time, gathering a
            depthwise layer's channels of grad_output in both's
  dense     the same call for all channels
  roofline  max(bytes / copy bandwidth, FLOPs / float32 FMA peak), each byte counted once, rates measured in this run

and beside the kernels of ours that were not chosen. On a GPU ATen's call is cuDNN's, also padded to 8 channels or, of
depthwise layers, without cuDNN, the fastest counts; TF32 is off, times are between events. All contenders of a layer run interleaved in a new order each
round; medians, in microseconds. On a shared machine only the ratios mean anything."""

_EPILOG = """\
examples:
  trady bench --threads 1
  trady bench --family 3x3 --format contiguous --dtype float32 --threads 1 --rounds 5
  trady bench --layer '64->64 @56' --selected 1,4,16
  trady bench --network resnet50 --json bench.json --plot bench.png
  trady bench --tune
  trady bench --device cuda --operator conv2d_channel_grad"""

#: What is measured unless one is asked for; float64 has no peer worth measuring, but a choice of its own.
_USUAL_DTYPES = ("float32", "bfloat16")
#: By type of device: images or texts of a batch, and the networks unless one is asked for.
_BATCH = {"cpu": 8, "cuda": 128}
_NETWORKS = {"cpu": None, "cuda": ("mobilenet_v2", "resnet50", "vit_tiny", "bert_base")}
_FAMILIES = tuple(dict.fromkeys(layer.family for layer in LAYERS))


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
    parser.add_argument("--device", choices=choice.DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--operator", choices=BENCHMARKS, help="this operator only (default: all)")
    parser.add_argument(
        "--network", choices=NETWORKS, help="this network's layers only (default: all; on a GPU some)"
    )
    parser.add_argument("--family", choices=_FAMILIES, help="this kind of layer only (default: all)")
    parser.add_argument(
        "--layer", metavar="TEXT", default="", help="layers whose label has this in it, such as '64->64 @56'"
    )
    parser.add_argument(
        "--selected",
        type=_counts,
        metavar="K[,K]",
        help="numbers of selected channels (default: 1, 2, 4, 8, 12, C/16, C/4, C/2 and C)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="memory format of the convolutions' tensors (default: both)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: float32 and bfloat16)")
    parser.add_argument("--batch-size", type=int, help="images or texts (default: 8, on a GPU 128)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="calls of each contender (default: 5 to 100, what fits into about a second)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help=f"draw time against k for each layer here ({', '.join(PLOT_FORMATS)}); a run of several operators, "
        "formats or dtypes makes a file of each, with their names before the suffix",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead measure which kernel is faster where, on one thread and on --threads, and write the table that this "
        f"user's calls are chosen by (now {choice.table_path() or 'switched off by an empty TRADY_CHOICE'})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


@dataclass(frozen=True)
class _Part:
    """An operator with one memory format and dtype, and its layers."""

    operator: str
    layers: Sequence[Layer]
    setting: Setting

    @property
    def title(self) -> str:
        """Which part of the run this is."""
        return f"{self.operator}, {self.setting.memory_format}, {self.setting.dtype}"

    def file(self, path: Path) -> Path:
        """``path`` with the part's name in it."""
        part = f"{self.operator}-{self.setting.memory_format}-{self.setting.dtype}"
        return path.with_name(f"{path.stem}-{part}{path.suffix}")


def run(args: argparse.Namespace) -> int:
    """Time and print."""
    _check(args)
    parts = list(_tuned_parts(args) if args.tune else _parts(args))
    if not parts:
        raise BadUsage(
            f"--operator, --network, --family, --layer{', --dtype' if args.tune else ''}: no layer passes all "
            f"filters (--layer {args.layer!r}), expected some such as {CONVS[-1].label!r}"
        )
    if args.device == "cpu":
        calm_malloc()
    else:
        # The peer is cuDNN's best, and float32 means float32.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(args.threads)
    return (_tune if args.tune else _bench)(args, parts)


def _check(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadUsage("--device: got 'cuda', but torch.cuda.is_available() is False; run trady doctor")
    if args.batch_size is None:
        args.batch_size = _BATCH[args.device]
    for name in ("batch_size", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadUsage(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    if args.json is not None:
        check_writable("json", args.json)
    if args.plot is not None:
        if args.tune:
            raise BadUsage("--plot: --tune draws nothing; leave one of the two out")
        check_plottable(args.plot)
    if args.tune:
        ours = "cpp" if args.device == "cpu" else "triton"
        if unavailable(ours):
            raise BadUsage(f"--tune: there is nothing to choose from: {unavailable(ours)}")
        if choice.table_path(args.device) is None:
            raise BadUsage(
                "--tune: TRADY_CHOICE is empty in the environment; unset it, or give it a file's name"
            )


def _bench(args: argparse.Namespace, parts: Sequence[_Part]) -> int:
    console = make_console()
    roofline = Roofline(args.threads, args.device)
    rows: list[Row] = []
    for part in parts:
        found: list[Row] = []
        for layer in _tracked(part, console):
            try:
                found += measure(part.operator, layer, part.setting, roofline)
            except ArithmeticError as error:
                raise Failed(str(error)) from error
        if found:
            about = f"{part.title}, batch {args.batch_size}, {_where(args)}"
            text = f"{about}\n{rows_table(found)}\n\n{summary_table(found)}\n"
            console.print(text, soft_wrap=True, markup=False)
            if args.plot is not None and not BENCHMARKS[part.operator].whole:
                plot_rows(part.file(args.plot) if len(parts) > 1 else args.plot, found, about)
        rows += found
        if args.json is not None:  # after each part, so that a run that is ended early leaves what it has
            write_json(args.json, report(rows, roofline))
    console.print(goals_table(rows), soft_wrap=True, markup=False)
    return 0


def _tune(args: argparse.Namespace, parts: Sequence[_Part]) -> int:
    """Measure both kernels, fit the limits, write the table."""
    console = make_console()
    measured: dict[choice.Key, list[Point]] = {}
    # A limit holds for any number.
    numbers = sorted({1, args.threads}) if args.device == "cpu" else [args.threads]
    for part in parts:
        for layer in _tracked(part, console):
            key = key_of(part.operator, layer, part.setting)
            if key is None:
                continue
            for threads in numbers:
                torch.set_num_threads(threads)
                measured.setdefault(key, []).extend(points(part.operator, layer, part.setting))
    limits = [limit for key, of in measured.items() for limit in fit(key, of)]
    console.print(limits_table(limits, measured, args.device), soft_wrap=True, markup=False)
    path = choice.table_path(args.device)
    assert path is not None  # checked before the work
    content = choice.render(limits, datetime.date.today().isoformat(), args.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error}") from error
    on = " and ".join(str(threads) for threads in numbers[:-1]) + " and " if len(numbers) > 1 else ""
    console.print(f"{on}{_where(args)}; wrote {path}, in force from the next start", markup=False)
    if args.json is not None:
        shapes = [
            {**row, "points": [asdict(point) for point in measured[limit.key]]}
            for row, limit in zip(content["limits"], limits, strict=True)
        ]
        write_json(args.json, {**conditions(args.device), "limits": shapes})
    return 0


def _tracked(part: _Part, console: Console) -> Iterable[Layer]:
    return track(part.layers, part.title, console=console, disable=not console.is_terminal, transient=True)


def _where(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{args.threads} thread{'s' * (args.threads > 1)}"


def _tuned_parts(args: argparse.Namespace) -> Iterator[_Part]:
    """The parts that there is a choice in, in the dtypes that have one."""
    for dtype in (args.dtype,) if args.dtype else tuple(DTYPES):
        for part in _parts(argparse.Namespace(**{**vars(args), "dtype": dtype})):
            layers = [layer for layer in part.layers if key_of(part.operator, layer, part.setting)]
            if layers:
                yield replace(part, layers=layers)


def _parts(args: argparse.Namespace) -> Iterator[_Part]:
    networks = (args.network,) if args.network else _NETWORKS[args.device]

    def wanted(layer: Layer) -> bool:
        return (
            (networks is None or layer.network in networks)
            and args.family in (None, layer.family)
            and args.layer in layer.label
        )

    convs = distinct(filter(wanted, CONVS))
    linears = distinct(filter(wanted, LINEARS))
    for operator in (args.operator,) if args.operator else BENCHMARKS:
        linear = operator == "linear_channel_grad"
        layers: Sequence[Layer] = linears if linear else convs
        formats = (args.format,) if args.format else tuple(FORMATS)
        for memory_format in formats[:1] if linear else formats:  # a linear layer has but one
            for dtype in (args.dtype,) if args.dtype else _USUAL_DTYPES:
                if layers:
                    setting = Setting(
                        memory_format, dtype, args.batch_size, args.selected, args.rounds, args.device
                    )
                    yield _Part(operator, layers, setting)
