"""``trady study``: experiments over many training runs, resumable run by run."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trady_kernels.atomic_write import alone_in
from trady_kernels.cli import INTERRUPTED, usage_errors
from trady_kernels.cli.console import in_time, make_console
from trady_kernels.provenance import describe
from trady_kernels.study.cells import CellFile, NothingFinished, Plan, run_cells
from trady_kernels.study.results import RECIPES, SIZES, Request
from trady_kernels.study.studies import STUDIES, Reports, Study
from trady_kernels.training.run import check_device

_EPILOG = """\
examples:
  trady study results --size quick --task mnist --scheme trady,head-only --output runs/quick
  trady study results --output runs/results
  trady study tails --quick --output runs/study
  trady study all --quick --output runs/study
  trady study resampling --task 'mobilenet_v2_w035 on digits' --scheme trady,medyate --output runs/mine
  trady study results --output docs --report-only

The folder gets the runs of each study as JSON (with settings, versions and commit), results.md or study.md, and plots as
PNG and SVG. tails, histograms, ranks and channels look at the same runs, which are made once; budget and efficiency at those
of results."""


def _description() -> str:
    lines = [
        "Experiments over many training runs. Every run is kept as it ends: the same command goes on after an interruption.",
        "",
    ]
    width = 2 + max(map(len, STUDIES))
    for study in STUDIES.values():
        lines += textwrap.wrap(f"{study.name:{width}}{study.words}", 118, subsequent_indent=" " * width)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _description(), _EPILOG
    parser.add_argument("name", choices=[*STUDIES, "all"], help="which study, or all of them in turn")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where its files are, or will be"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size",
        choices=list(SIZES),
        default="usual",
        help="how many samples, epochs and seeds (%(default)s)",
    )
    for size in ("quick", "full"):
        sizes.add_argument(
            f"--{size}", action="store_const", const=size, dest="size", help=f"short for --size {size}"
        )
    parser.add_argument(
        "--task",
        type=_names,
        default=(),
        metavar="NAME[,NAME]",
        help=f"some of {', '.join(RECIPES)}, or any network and data: 'mobilenet_v2 on digits'",
    )
    parser.add_argument(
        "--scheme",
        type=_names,
        default=(),
        metavar="NAME[,NAME]",
        help=f"of {_taking_schemes()}: which, such as trady,medyate; of results also frugal@5.2%%,full+checkpoint",
    )
    parser.add_argument(
        "--ranking", metavar="FILE", help="layer ranking of the network, instead of the one that ships"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="trainings at a time (default: one a core, here %(default)s); of steps, which are timed, always one",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the report from the runs that are there"
    )


def _taking_schemes() -> str:
    return ", ".join(study.name for study in STUDIES.values() if study.takes_schemes)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run(args: argparse.Namespace) -> int:
    """Run what is missing of each study, and write its report."""
    console, started = make_console(), time.monotonic()
    with usage_errors():
        if args.jobs < 1:
            raise ValueError(f"jobs: got {args.jobs}, expected at least 1")
        check_device(args.device)
        _check_installed()
        studies = _asked_for(args.name)
        if args.scheme and not (len(studies) == 1 and studies[0].takes_schemes):
            raise ValueError(
                f"scheme: got {','.join(args.scheme)}, expected none but for {_taking_schemes()}: {args.name} has its own"
            )
        plans = {} if args.report_only else _plans(studies, args, console)
        reports = Reports(args.output)
        for study in studies:
            if study.name in plans:
                console.print(f"{study.name}: {study.words}")
                try:
                    _run_missing(study, plans[study.name], args, console)
                except KeyboardInterrupt:
                    console.print("interrupted; the same command goes on with what is missing")
                    return INTERRUPTED
            _report(study, reports, args, console)
    console.print(f"{args.name}: done in {in_time(time.monotonic() - started)}")
    return 0


def _check_installed() -> None:
    """What reports need, before hours of trainings that end in one.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    for name, extra in (("scipy", "study"), ("matplotlib", "cli")):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name} is not installed, which reports of studies need: pip install 'trady-kernels[{extra}]'"
            )


def _asked_for(name: str) -> list[Study]:
    """The studies in the order in which they run: with all of them results comes last, whose runs budget has."""
    if name != "all":
        return [STUDIES[name]]
    return [*(study for study in STUDIES.values() if study.name != "results"), STUDIES["results"]]


def _plans(studies: list[Study], args: argparse.Namespace, console: Console) -> dict[str, Plan[Any, Any]]:
    """What to run of each study, before anything runs; of several, those that cannot run are told of and left out.

    Raises:
        OSError, ValueError: no study can run, or a file of cells has other settings.
    """
    request = Request(args.size, args.task, args.scheme, args.ranking, args.device)
    plans: dict[str, Plan[Any, Any]] = {}
    refused: dict[str, Exception] = {}
    for study in studies:
        if study.name == "results" and args.name == "all":
            continue  # budget has its runs; where it has to be quick, some of them
        try:
            plans[study.name] = study.plan(request)
        except (OSError, ValueError) as error:
            refused[study.name] = error
    if not plans:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        console.print(f"{name}: left out: {reason}", markup=False)
    for name, plan in plans.items():
        CellFile(
            args.output / STUDIES[name].cells, STUDIES[name].kinds, plan.recipes
        )  # raises if it cannot go on
    return plans


def _report(study: Study, reports: Reports, args: argparse.Namespace, console: Console) -> None:
    """Write a study's report; where all were asked for, one that has nothing to report is passed over."""
    if args.name == "all" and not (args.output / study.cells).exists():
        return
    try:
        files = reports.write(study)
    except NothingFinished as error:
        if args.name != "all":
            raise
        console.print(f"{study.name}: {error}", markup=False)
        return
    for file in files:
        console.print(f"written to {file}", markup=False)


def _run_missing(study: Study, plan: Plan[Any, Any], args: argparse.Namespace, console: Console) -> None:
    jobs = 1 if study.alone else args.jobs
    args.output.mkdir(parents=True, exist_ok=True)
    with alone_in(args.output):
        cells = CellFile(args.output / study.cells, study.kinds, plan.recipes)
        cells.begin(describe(torch.device(args.device)))
        # Forks of a process whose libraries have threads may hang.
        workers = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
        with workers, _Progress(console, plan) as progress:
            run_cells(plan, cells, workers, jobs, progress.on_cell)


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, for nobody."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Progress:
    """A bar of runs on a terminal, and a line a run."""

    def __init__(self, console: Console, plan: Plan[Any, Any]) -> None:
        self._console = console
        self._plan = plan
        self._total = total = plan.size
        self._done = self._fresh = 0
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("trainings", total=total, left="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_cell(self, cell: Any, outcome: Any, fresh: bool) -> None:
        self._done += 1
        self._total = max(self._total, self._done)  # a plan may grow: learning rates that move on
        left = ""
        if fresh:
            self._fresh += 1
            pace = (time.monotonic() - self._started) / self._fresh
            left = f"{in_time(pace * (self._total - self._done))} left"
            self._console.print(f"{self._done} of {self._total}: {self._plan.words(cell, outcome)}, {left}")
        self._bar.update(self._task, completed=self._done, total=self._total, left=left)
