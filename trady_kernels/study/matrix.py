"""The experiment matrix of the results table: tasks, schemes, budgets and seeds, each learning rate tuned on held-out samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from trady_kernels.study.statistics import significant
from trady_kernels.study.trainings import KINDS, Training, TrainingOutcome, Trainings, train
from trady_kernels.training.ingredients import Spec, tuned_as
from trady_kernels.training.settings import Settings

#: Trials of a learning rate, as multiples of the scheme's middle one: as many for every scheme.
FACTORS = (1 / 3, 1.0, 3.0)
#: How often a scheme's three rates move on by one because the best of them is at an end.
MOST_MOVES = 2


#: Schemes by network and budget.
Schemes = Mapping[str, Mapping[str, tuple[str, ...]]]


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
        recipes: settings of each task, of those too that only learning rates are tuned on.
        schemes: by the network, of each budget, at each of which a scheme's learning rate is tuned anew.
        rates: by the network, the middle one of the learning rates tried, of a scheme by name; "" for all others.
            With momentum m it is 1 - m times that.
        seeds: how many.
        moves: how often the three rates of a scheme move on at most.
        tasks, asked: the part of ``recipes`` and ``schemes`` that is to be run. A row's learning rate is the same whichever
            part it is run with.
    """

    recipes: Mapping[str, Settings]
    schemes: Schemes
    rates: Mapping[str, Mapping[str, float]]
    seeds: int
    moves: int
    tasks: tuple[str, ...]
    asked: Schemes

    def rows(self) -> Iterator[Row]:
        """The table's rows: scheme by scheme, so that what is there after an interruption can be compared."""
        rows = (
            Row(task, scheme, budget if Spec.parse(scheme).budgeted else "")
            for budget in dict.fromkeys(budget for rows in self.asked.values() for budget in rows)
            for scheme in dict.fromkeys(s for rows in self.asked.values() for s in rows.get(budget, ()))
            for task in self.tasks
            if scheme in self.asked[self.recipes[task].model].get(budget, ())
        )
        return iter(dict.fromkeys(rows))

    def trials(self, row: Row, cells: Mapping[Training, TrainingOutcome] | Trainings) -> list[Training]:
        """The runs that choose a row's learning rate, one for the tasks of a network.

        Three rates are tried; where the best of them is the lowest or the highest, the three move on by one, so that what is
        chosen has a worse one on either side. On a single task the best rate is often the one that luck did not spoil.

        Args:
            row: of the table.
            cells: those that are done.
        """
        move, trials = 0, self._trials(row, 0)
        while abs(move) < self.moves and all(cell in cells for cell in trials):
            rates, best = {cell.learning_rate for cell in trials}, best_rate(cells, trials)
            if min(rates) < best < max(rates):
                break
            move += 1 if best == max(rates) else -1
            trials = self._trials(row, move)
        return trials

    def _trials(self, row: Row, move: int) -> list[Training]:
        model = self.recipes[row.task].model
        scheme, budget = self._tuned_at(row)
        rates, spec = self.rates[model], Spec.parse(scheme)
        middle = rates.get(spec.scheme, rates[""]) * (1 - spec.momentum)
        return [
            Training(task, scheme, budget, rounded(middle * factor * FACTORS[-1] ** move), 0, True)
            for factor in FACTORS
            for task, recipe in self.recipes.items()
            if recipe.model == model
        ]

    def _tuned_at(self, row: Row) -> tuple[str, str]:
        """Scheme and budget whose trials serve for a row: its own, or those of the scheme with another budget of its own."""
        scheme = tuned_as(row.scheme)
        if not row.budget:
            return scheme, ""
        budgets = self.schemes[self.recipes[row.task].model]
        for budget in dict.fromkeys((row.budget, *budgets)):
            schemes = budgets.get(budget, ())
            if row.scheme in schemes:
                return scheme, budget
            if alike := [other for other in schemes if _without_budget(other) == _without_budget(row.scheme)]:
                return tuned_as(alike[0]), budget
        raise AssertionError(f"{row} is no row of this table")

    def finals(self, row: Row, learning_rate: float) -> list[Training]:
        """The runs that a row is the mean of, the only ones that see the test samples."""
        return [
            Training(row.task, row.scheme, row.budget, learning_rate, seed, False)
            for seed in range(self.seeds)
        ]

    def ready(self, cells: Trainings) -> Iterator[Training]:
        """Every cell that is done or may begin: final runs wait for the trials that choose their learning rate.

        Raises:
            ValueError: the file has final runs of a row at another learning rate.
        """
        ran_at = final_rates(cells)
        for row in self.rows():
            trials = self.trials(row, cells)
            yield from trials
            if all(cell in cells for cell in trials):
                rate = best_rate(cells, trials)
                _check_rate(row, ran_at.get(row, rate), rate)
                yield from self.finals(row, rate)

    @property
    def kinds(self) -> tuple[type[Training], type[TrainingOutcome]]:
        """Classes of the cells and their outcomes."""
        return KINDS

    @property
    def train(self) -> Callable[[Training, Settings], TrainingOutcome]:
        """Runs one cell."""
        return train

    @property
    def words(self) -> Callable[[Training, TrainingOutcome], str]:
        """A cell and its outcome in a line."""
        return Training.words

    @property
    def size(self) -> int:
        """How many runs there are where no scheme's rates move on."""
        rows = list(self.rows())
        trials = {cell for row in rows for cell in self.trials(row, {})}
        return len(trials) + len(rows) * self.seeds


def best_rate(cells: Mapping[Training, TrainingOutcome] | Trainings, trials: list[Training]) -> float:
    """The learning rate with the highest mean accuracy; the lowest of equals, which moves the weights least."""
    accuracies: dict[float, list[float]] = defaultdict(list)
    for cell in trials:
        accuracies[cell.learning_rate].append(cells[cell].top1)
    return max(accuracies, key=lambda rate: (statistics.fmean(accuracies[rate]), -rate))


def final_rates(cells: Iterable[Training]) -> dict[Row, float]:
    """The learning rate of every row's final runs.

    Raises:
        ValueError: those of a row have several, and their mean would be one of nothing.
    """
    rates: dict[Row, float] = {}
    for cell in cells:
        if not cell.held_out:
            row = Row(cell.task, cell.scheme, cell.budget)
            _check_rate(row, rates.setdefault(row, cell.learning_rate), cell.learning_rate)
    return rates


def _check_rate(row: Row, one: float, other: float) -> None:
    if one != other:
        raise ValueError(
            f"results: got runs of {row.scheme} on {row.task} at the learning rates {one:g} and {other:g}, expected one for "
            "all; give another folder, or take those of one rate out of the file"
        )


def _without_budget(scheme: str) -> str:
    return scheme.partition("@")[0]


def rounded(rate: float) -> float:
    """Two digits: a rate is part of what names a cell, and is read by people."""
    return significant(rate, 2)
