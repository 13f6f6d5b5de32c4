"""The experiment matrix of the results table: tasks, schemes, budgets and seeds, each learning rate tuned on held-out samples."""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trady_kernels.study.cells import Cell, CellFile, Outcome
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.loop import Diverged, train_scheme
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.run import load_task
from trady_kernels.training.settings import Settings

#: Trials of a learning rate, as multiples of the scheme's middle one: as many for every scheme.
FACTORS = (1 / 3, 1.0, 3.0)


@dataclass(frozen=True)
class Row:
    """What is averaged over seeds."""

    task: str
    scheme: str
    budget: str


@dataclass(frozen=True)
class Matrix:
    """Which runs make a results table.

    Attributes:
        recipes: settings of each task.
        schemes: of each budget; at the first one that has it, a scheme's learning rate is tuned.
        rates: by the network, the middle one of the learning rates tried, of a scheme by name; "" for all others.
            With momentum m it is 1 - m times that.
        seeds: how many.
    """

    recipes: Mapping[str, Settings]
    schemes: Mapping[str, tuple[str, ...]]
    rates: Mapping[str, Mapping[str, float]]
    seeds: int

    def rows(self) -> Iterator[Row]:
        """The table's rows: scheme by scheme, so that what is there after an interruption can be compared."""
        rows = (
            Row(task, scheme, budget if Spec.parse(scheme).budgeted else "")
            for budget, schemes in self.schemes.items()
            for scheme in schemes
            for task in self.recipes
        )
        return iter(dict.fromkeys(rows))

    def trials(self, row: Row) -> list[Cell]:
        """The runs that choose a row's learning rate, one for the tasks of a network and for all budgets.

        On a single task the best of three rates is often the one that luck did not spoil.
        """
        model = self.recipes[row.task].model
        rates, spec = self.rates[model], Spec.parse(row.scheme)
        middle = rates.get(spec.scheme, rates[""]) * (1 - spec.momentum)
        first = next(budget for budget, schemes in self.schemes.items() if row.scheme in schemes)
        budget = first if row.budget else ""
        return [
            Cell(task, row.scheme, budget, _rounded(middle * factor), 0, True)
            for factor in FACTORS
            for task, recipe in self.recipes.items()
            if recipe.model == model
        ]

    def finals(self, row: Row, learning_rate: float) -> list[Cell]:
        """The runs that a row is the mean of, the only ones that see the test samples."""
        return [
            Cell(row.task, row.scheme, row.budget, learning_rate, seed, False) for seed in range(self.seeds)
        ]

    @property
    def size(self) -> int:
        """How many runs there are."""
        rows = list(self.rows())
        tuned = {(row.task, row.scheme) for row in rows}
        return len(tuned) * len(FACTORS) + len(rows) * self.seeds


def best_rate(cells: CellFile, trials: list[Cell]) -> float:
    """The learning rate with the highest mean accuracy; the lowest of equals, which moves the weights least."""
    accuracies: dict[float, list[float]] = defaultdict(list)
    for cell in trials:
        accuracies[cell.learning_rate].append(cells[cell].top1)
    return max(accuracies, key=lambda rate: (statistics.fmean(accuracies[rate]), -rate))


def _rounded(rate: float) -> float:
    """Two digits: a rate is part of what names a cell, and is read by people."""
    return float(f"{rate:.2g}")


def run_matrix(
    matrix: Matrix,
    cells: CellFile,
    executor: Executor,
    workers: int,
    on_cell: Callable[[Cell, Outcome, bool], None],
) -> None:
    """Run what is missing of ``matrix``, row by row, into ``cells``.

    Args:
        matrix: what to run.
        cells: where outcomes are kept, and which cells are done already.
        executor: runs the trainings.
        workers: how many at a time.
        on_cell: called after each cell with its outcome and whether it ran now, and was not there already.

    Raises:
        OSError: the file could not be written; it is whole, without the last cell.
        ValueError, FileNotFoundError, ModuleNotFoundError: a task's data or network is not to be had.
    """
    told: set[Cell] = set()
    running: dict[Future[Outcome], Cell] = {}

    def tell(cell: Cell, fresh: bool) -> None:
        if cell not in told:  # the trials of one budget serve all
            told.add(cell)
            on_cell(cell, cells[cell], fresh)

    try:
        while True:
            for cell in _ready(matrix, cells):
                if cell in cells:
                    tell(cell, fresh=False)
                elif len(running) == workers:
                    break
                elif cell not in running.values():
                    running[executor.submit(train_cell, cell, matrix.recipes[cell.task])] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, outcome = running.pop(future), future.result()
                cells.add(cell, replace(outcome, provenance=len(cells.provenance) - 1))
                tell(cell, fresh=True)
    except BaseException:
        for future in running:
            future.cancel()
        raise


def _ready(matrix: Matrix, cells: CellFile) -> Iterator[Cell]:
    """Every cell that is done or may begin: final runs wait for the trials that choose their learning rate."""
    for row in matrix.rows():
        trials = matrix.trials(row)
        yield from trials
        if all(cell in cells for cell in trials):
            yield from matrix.finals(row, best_rate(cells, trials))


def train_cell(cell: Cell, recipe: Settings) -> Outcome:
    """Run one training; one that diverges has an outcome too.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    settings = cell.settings(recipe)
    torch.set_num_threads(settings.threads)
    # Data depend on the task and the held-out share alone.
    data = _load(Cell(cell.task, "trady", "", 1.0, 0, cell.held_out).settings(recipe))
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_scheme(cell.scheme, settings, data, Path(folder, "checkpoint.pt"), _Silent())
        except Diverged as error:
            return Outcome(top1=0.0, diverged=True, notes=[str(error)])
    return Outcome.of(result)


class _Silent:
    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        pass

    def on_step(self, loss: float, accuracy: float) -> None:
        pass

    def on_epoch(self, figures: EpochFigures) -> None:
        pass


_load = functools.lru_cache(maxsize=4)(load_task)
