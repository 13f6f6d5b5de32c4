"""How long a training step of every scheme takes, all of them in one run, turn by turn."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from trady_kernels.study.cells import CellFile, Listed
from trady_kernels.study.markdown import markdown
from trady_kernels.study.matrix import Matrix
from trady_kernels.study.plot import logarithmic, panels, style, write_figure
from trady_kernels.study.statistics import Quartiles
from trady_kernels.study.trainings import Trainings, load_samples
from trady_kernels.training.loop import Prepared, prepare
from trady_kernels.training.settings import Settings

#: File of the cells.
STEPS = "steps.json"
#: What all others are divided by.
WHOLE = "full"
#: Leaves the weights about where they are.
_RATE = 1e-4
#: Of a row in the plot.
_INCHES = 0.13


@dataclass(frozen=True)
class Timing:
    """All rows of a network, timed in one process.

    Attributes:
        task: whose samples the steps train on.
        rows: schemes and budgets, as ``"trady at 2.2%"`` or ``"full"``.
        rounds: steps of each row that count; one more comes before them.
    """

    task: str
    rows: tuple[str, ...]
    rounds: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))  # a list, from JSON

    def words(self, outcome: StepTimes) -> str:
        """The run in a line."""
        return f"{self.task}: a step of {len(self.rows)} rows, {self.rounds} times each"


@dataclass(frozen=True)
class StepTimes:
    """What was timed.

    Attributes:
        milliseconds: by row, of every round's step.
        provenance: index of what it was made with in the file's list.
    """

    milliseconds: Mapping[str, list[float]] = field(default_factory=dict)
    provenance: int = 0


Timings = CellFile[Timing, StepTimes]


def row_of(scheme: str, budget: str) -> str:
    """Name of a row."""
    return f"{scheme} at {budget}" if budget else scheme


def _label(row: str) -> str:
    """A row as it is printed: the table's budget is not that of a scheme which has its own."""
    scheme, _, budget = row.partition(" at ")
    return scheme if "@" in scheme else row_of(scheme, budget)


def step_plan(matrix: Matrix, rounds: int) -> Listed[Timing, StepTimes]:
    """The rows of a results table, on the first task of each network."""
    first: dict[str, str] = {}
    for task, recipe in matrix.recipes.items():
        first.setdefault(recipe.model, task)
    timings = (
        Timing(
            task, tuple(row_of(row.scheme, row.budget) for row in matrix.rows() if row.task == task), rounds
        )
        for task in first.values()
    )
    recipes = {task: matrix.recipes[task] for task in first.values()}
    return Listed(recipes, tuple(timings), (Timing, StepTimes), time_steps, Timing.words)


def time_steps(cell: Timing, recipe: Settings) -> StepTimes:
    """Time steps of all rows turn by turn, another row first in each round, channels drawn anew for each.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    torch.set_num_threads(recipe.threads)
    settings = replace(recipe, learning_rate=_RATE, seed=0)
    data = load_samples(cell.task, recipe, held_out=False)
    rows = {}
    for row in cell.rows:
        scheme, _, budget = row.partition(" at ")
        own = replace(settings, schemes=(scheme,), budget=budget or settings.budget)
        training = prepare(scheme, own, data)
        rows[row] = _Row(training, training.optimizer(_RATE), torch.arange(settings.batch_size))
    found: dict[str, list[float]] = {row: [] for row in rows}
    names = list(rows)
    for number in range(cell.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            milliseconds = rows[name].step()
            if number:  # the first one fills caches
                found[name].append(round(milliseconds, 2))
    return StepTimes(found)


@dataclass(frozen=True)
class _Row:
    training: Prepared
    optimizer: torch.optim.Optimizer
    indices: torch.Tensor

    def step(self) -> float:
        """Draw channels, then take a step; milliseconds of the step alone."""
        regime = self.training.regime
        regime.resample(self.optimizer)
        regime.train_mode()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.training.gradients(self.indices)
        self.optimizer.step()
        loss.item()  # on a GPU it waits for the step to end
        return 1e3 * (time.perf_counter() - started)


@dataclass(frozen=True)
class StepTime:
    """A row's step.

    Attributes:
        milliseconds: over the rounds.
        of_full: of the rounds' ratios to full fine-tuning's step; None where that was not timed.
    """

    milliseconds: Quartiles
    of_full: Quartiles | None


def step_times(timings: Timings) -> dict[tuple[str, str], StepTime]:
    """By network and row, of each network's latest run: times of two runs are not to be compared."""
    latest: dict[str, Timing] = {}
    for cell in sorted(timings, key=lambda cell: timings[cell].provenance):
        latest[timings.recipes[cell.task].model] = cell
    found = {}
    for cell in latest.values():
        rounds = timings[cell].milliseconds
        for row, values in rounds.items():
            ratios = [v / whole for v, whole in zip(values, rounds.get(WHOLE, []), strict=False)]
            found[timings.recipes[cell.task].model, row] = StepTime(
                Quartiles.of(values), Quartiles.of(ratios) if ratios else None
            )
    return found


def timings_beside(cells: Trainings) -> Timings | None:
    """The file of step times in the folder of these cells; None where there is none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = cells.path.parent / STEPS
    return CellFile(path, (Timing, StepTimes)) if path.exists() else None


def times_beside(cells: Trainings) -> dict[tuple[str, str], StepTime]:
    """By network and row, from the file of step times in the folder of these cells; empty where there is none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    timings = timings_beside(cells)
    return {} if timings is None else step_times(timings)


def _ordered(timings: Timings) -> dict[str, list[tuple[str, StepTime]]]:
    """Rows by network, the shortest of full fine-tuning's first; those without a ratio by their milliseconds, last."""
    networks: dict[str, list[tuple[str, StepTime]]] = {}
    for (network, row), found in step_times(timings).items():
        networks.setdefault(network, []).append((row, found))

    def place(item: tuple[str, StepTime]) -> tuple[float, float]:
        ratio = item[1].of_full
        return (math.inf if ratio is None else ratio.median, item[1].milliseconds.median)

    return {network: sorted(networks[network], key=place) for network in sorted(networks)}


def steps_section(timings: Timings) -> list[str]:
    """A step's time of every row, beside full fine-tuning's."""
    rows = [
        [
            network,
            _label(row),
            found.milliseconds.words(0),
            "" if found.of_full is None else found.of_full.words(2),
        ]
        for network, times in _ordered(timings).items()
        for row, found in times
    ]
    batches = ", ".join(
        f"{timings.recipes[task].batch_size} samples of {task}"
        for task in dict.fromkeys(cell.task for cell in timings)
    )
    rounds = {cell.rounds for cell in timings}
    threads = {recipe.threads for recipe in timings.recipes.values()}
    return [
        f"Forward, backward and the optimiser's step on a batch of {batches}, {_listed(threads)} thread(s): median and quartiles "
        f"of {_listed(rounds)} rounds in which every row had its turn; of full: those of the rounds' ratios. Rows whose quartiles "
        "overlap are not told apart.",
        "",
        *markdown(["network", "scheme", "ms a step", "of full"], rows),
    ]


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def plot_steps(path: Path, timings: Timings) -> None:
    """Draw the ratios to full fine-tuning's step from quartile to quartile, a panel a network, in the order of the table."""
    shown = {
        network: [(row, time.of_full) for row, time in times if time.of_full is not None]
        for network, times in _ordered(timings).items()
    }
    figure, axes_of = panels(
        len(shown), height=1.0, columns=1, ratios=[0.6 + _INCHES * len(rows) for rows in shown.values()]
    )
    for axes, (network, rows) in zip(axes_of, shown.items(), strict=True):
        for place, (_, ratio) in enumerate(rows):
            bar = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axes.errorbar(ratio.median, place, xerr=bar, capsize=1.5, **style(0))
        logarithmic(axes, "x")
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [_label(row) for row, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(network)
        axes.set_xlabel("step time, of full fine-tuning's")
    write_figure(path, figure)
