"""What the commands share on the terminal: tables, progress of a training, figures in words."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trady_kernels.cli import BadUsage
from trady_kernels.training.observer import Observer
from trady_kernels.training.results import EpochFigures, SchemeResult

#: Suffixes of the files that plots can be.
PLOT_FORMATS = ("png", "svg", "pdf")

#: Width of tables where the output is a file or a pipe: wide enough that none of ours wraps.
_FILE_WIDTH = 160


def make_console() -> Console:
    """A console on standard output that neither wraps nor colours what goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def in_bytes(count: int) -> str:
    """A byte count as people read it: ``12.3 MiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def in_time(seconds: float) -> str:
    """A duration as people read it: ``3 min 20 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02} s"


def budget_argument(text: str) -> int | str:
    """What the text of a budget means to the library: digits alone are a number of elements."""
    return int(text) if text.isdecimal() else text


def seed_argument(text: str) -> int:
    """A seed, which random generators take 63 bits of."""
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 2^63 - 1")
    return int(text)


def check_writable(argument: str, path: Path) -> None:
    """Refuse an output file that cannot be written, before any work.

    Raises:
        BadUsage: the file's folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise BadUsage(f"{argument}: {path} is a folder, expected a file to write")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadUsage(f"{argument}: {path.parent} is no folder that can be written to; give another file")


def check_plottable(path: Path) -> None:
    """Refuse a plot that cannot be drawn or written, before any work.

    Raises:
        BadUsage: no such format, the file cannot be written, or matplotlib is not installed.
    """
    if path.suffix[1:].lower() not in PLOT_FORMATS:
        raise BadUsage(f"plot: got {path}, expected a name that ends in .{', .'.join(PLOT_FORMATS)}")
    check_writable("plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise BadUsage("plot: drawing needs matplotlib; install it with: pip install 'trady-kernels[cli]'")


class TrainingProgress(Observer):
    """Progress of several schemes' training: a bar on a terminal, a line for each epoch elsewhere.

    Args:
        console: where to show it.
        schemes: how many there will be.
        epochs: of each.
    """

    def __init__(self, console: Console, schemes: int, epochs: int) -> None:
        self._console = console
        self._schemes = schemes
        self._epochs = epochs
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(
                "{task.percentage:>3.0f}%  loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"
            ),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, loss="-", accuracy="-")
        self._scheme = ""
        self._index = -1
        self._steps_per_epoch = 0
        self._steps_done = 0  # of all schemes, earlier sessions included
        self._steps_here = 0  # in this session
        self._started = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        """A scheme starts, or goes on after the epochs it has."""
        self._scheme = scheme
        self._index += 1
        self._steps_per_epoch = steps_per_epoch
        self._steps_done = (self._index * self._epochs + len(result.epochs)) * steps_per_epoch
        self._bar.update(
            self._task,
            total=self._schemes * self._epochs * steps_per_epoch,
            completed=self._steps_done,
            description=self._description(),
        )
        if result.epochs:
            self._console.print(f"{scheme}: {len(result.epochs)} of {self._epochs} epochs are done already")

    def on_step(self, loss: float, accuracy: float) -> None:
        """A step is done."""
        self._steps_done += 1
        self._steps_here += 1
        self._bar.update(
            self._task,
            completed=self._steps_done,
            description=self._description(),
            loss=f"{loss:.3f}",
            accuracy=f"{accuracy:.1%}",
        )

    def on_epoch(self, figures: EpochFigures) -> None:
        """An epoch is done."""
        total = self._schemes * self._epochs * self._steps_per_epoch
        pace = (time.perf_counter() - self._started) / max(self._steps_here, 1)
        self._console.print(
            f"{self._scheme} epoch {figures.epoch}/{self._epochs}: loss {figures.train_loss:.3f}, "
            f"accuracy {figures.train_accuracy:.1%}, "
            + ("" if figures.top1 is None else f"test {figures.top1:.1%}, ")
            + f"{in_bytes(figures.saved_bytes)} saved for backward, {in_time(figures.seconds)}, "
            f"{in_time(pace * (total - self._steps_done))} left"
        )

    def _description(self) -> str:
        epoch = min(self._steps_done // self._steps_per_epoch - self._index * self._epochs + 1, self._epochs)
        return f"{self._scheme} epoch {epoch}/{self._epochs}"
