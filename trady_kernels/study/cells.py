"""Cells of a study: one training run each, in one file that an interrupted study goes on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from trady_kernels.atomic_write import write_atomically
from trady_kernels.training.settings import Settings

_FORMAT = "trady-study-cells"
_VERSION = 2


class NothingFinished(ValueError):
    """A file has no cell that a report could be made of."""


class Cell(Protocol):
    """What names one training run: a frozen dataclass of plain values.

    Attributes:
        task: name of its recipe.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def task(self) -> str: ...


class Outcome(Protocol):
    """What came of a run: a frozen dataclass of plain values, lists and dicts.

    Attributes:
        provenance: index of what it was made with in the file's list.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def provenance(self) -> int: ...


CellT = TypeVar("CellT", bound=Cell)
OutcomeT = TypeVar("OutcomeT", bound=Outcome)


class CellFile(Generic[CellT, OutcomeT]):
    """The outcomes of a study's cells, on the disk after each one.

    Args:
        path: JSON file; made by the first :meth:`add`.
        kinds: classes of its cells and outcomes.
        recipes: settings of each task, which those in the file must equal; None takes whatever tasks the file has.

    Raises:
        FileNotFoundError: without recipes, there is no file.
        ValueError: the file is damaged, of another version or study, or has a task of other settings.
    """

    def __init__(
        self,
        path: Path,
        kinds: tuple[type[CellT], type[OutcomeT]],
        recipes: Mapping[str, Settings] | None = None,
    ) -> None:
        self.path = path
        self.recipes: dict[str, Settings] = {}
        self.provenance: list[dict[str, Any]] = []
        self._kinds = kinds
        self._outcomes: dict[CellT, OutcomeT] = {}
        if recipes is None and not path.exists():
            raise FileNotFoundError(f"cells: {path} does not exist, expected a file that a study wrote")
        self.recipes = {name: _without_own(recipe) for name, recipe in (recipes or {}).items()}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = _content(self.path)
        cell, outcome = self._kinds
        for name, recipe in content["recipes"].items():
            theirs = Settings.from_json(recipe)
            if (differing := self.recipes.setdefault(name, theirs).difference(theirs)) is not None:
                raise ValueError(
                    f"cells: {self.path} has {name} with {differing} {getattr(theirs, differing)!r}, expected "
                    f"{getattr(self.recipes[name], differing)!r}; give another file, or the settings that it was started with"
                )
        self.provenance = content["provenance"]
        try:
            self._outcomes = {cell(**row["cell"]): outcome(**row["outcome"]) for row in content["cells"]}
        except TypeError as error:
            raise ValueError(
                f"cells: {self.path} is of another study ({error}); give another file"
            ) from error

    def _sorted(self) -> list[CellT]:
        return sorted(self._outcomes, key=dataclasses.astuple)

    def __contains__(self, cell: object) -> bool:
        return cell in self._outcomes

    def __getitem__(self, cell: CellT) -> OutcomeT:
        return self._outcomes[cell]

    def __iter__(self) -> Iterator[CellT]:
        return iter(self._sorted())

    def __len__(self) -> int:
        return len(self._outcomes)

    def begin(self, provenance: dict[str, Any]) -> None:
        """Cells from now on are made with this."""
        self.provenance.append(provenance)

    def add(self, cell: CellT, outcome: OutcomeT) -> None:
        """Keep an outcome; the file is the old one or the new one, whenever the process dies."""
        self._outcomes[cell] = dataclasses.replace(outcome, provenance=len(self.provenance) - 1)
        # Where a value has no number it is null: NaN is none of JSON's.
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "recipes": {name: recipe.to_json() for name, recipe in self.recipes.items()},
            "provenance": self.provenance,
        }
        # A line a cell: some hold thousands of numbers.
        rows = ",\n".join(
            json.dumps(
                {"cell": dataclasses.asdict(cell), "outcome": dataclasses.asdict(self._outcomes[cell])},
                allow_nan=False,
            )
            for cell in self._sorted()
        )
        text = json.dumps(head, indent=2)[: -len("\n}")] + f',\n  "cells": [\n{rows}\n  ]\n}}\n'
        write_atomically(self.path, lambda file: file.write(text.encode()))


def _without_own(recipe: Settings) -> Settings:
    """A recipe with what each cell has of its own at fixed values."""
    return dataclasses.replace(recipe, schemes=("trady",), learning_rate=None, seed=0, validation_share=0.0)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
        if (content["format"], content["version"]) == (_FORMAT, _VERSION):
            return content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cells: {path} is damaged ({error}); give another file") from error
    raise ValueError(f"cells: {path} was not written by this version of trady study; give another file")


def made_with(cells: CellFile[Any, Any]) -> list[str]:
    """Commands, commits and versions that a file's cells come from: the head of a report."""
    used = sorted({cells[cell].provenance for cell in cells})
    commands = dict.fromkeys(cells.provenance[index]["command"] for index in used)
    commits = dict.fromkeys(_short(cells.provenance[index]["commit"]) for index in used)
    made = dict.fromkeys(_environment(cells.provenance[index]) for index in used)
    runs = "1 run" if len(cells) == 1 else f"{len(cells)} runs"
    return [
        "Generated from the runs of:",
        "",
        *(f"    {command}" for command in commands),
        "",
        f"{runs}; commits {', '.join(commits)}; {'; '.join(made)}.",
    ]


def _environment(provenance: Mapping[str, Any]) -> str:
    """Machine and versions."""
    versions, machine = provenance["versions"], provenance["machine"]
    kind = f"{machine['name']}, {machine.get('instruction_set', machine['device'])}"
    return f"{kind}, Python {versions['python']}, torch {versions['torch']}"


def _short(commit: str | None) -> str:
    """Ten digits, and the + of a tree that differs from its commit; a copy outside git has none."""
    return "unknown" if commit is None else commit[:10] + commit[40:]


class Plan(Protocol[CellT, OutcomeT]):
    """Which cells a study has.

    Attributes:
        recipes: settings of each task.
        kinds: classes of the cells and their outcomes.
        train: runs one cell; a function of a module, which another process can import.
    """

    @property
    def recipes(self) -> Mapping[str, Settings]: ...

    @property
    def kinds(self) -> tuple[type[CellT], type[OutcomeT]]: ...

    @property
    def train(self) -> Callable[[CellT, Settings], OutcomeT]: ...

    @property
    def size(self) -> int:
        """How many cells there are."""

    def ready(self, cells: CellFile[CellT, OutcomeT]) -> Iterator[CellT]:
        """Every cell that is done or may begin, in the order of importance."""

    @property
    def words(self) -> Callable[[CellT, OutcomeT], str]:
        """A cell and its outcome in a line."""


@dataclass(frozen=True)
class Listed(Generic[CellT, OutcomeT]):
    """A plan whose cells are known from the start.

    Attributes:
        recipes: settings of each task.
        cells: in the order of importance.
        kinds: classes of the cells and their outcomes.
        train: runs one cell; a function of a module, which another process can import.
        words: a cell and its outcome in a line.
    """

    recipes: Mapping[str, Settings]
    cells: tuple[CellT, ...]
    kinds: tuple[type[CellT], type[OutcomeT]]
    train: Callable[[CellT, Settings], OutcomeT]
    words: Callable[[CellT, OutcomeT], str]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.cells)

    def ready(self, cells: CellFile[CellT, OutcomeT]) -> Iterator[CellT]:
        """Every cell."""
        yield from self.cells


def run_cells(
    plan: Plan[CellT, OutcomeT],
    cells: CellFile[CellT, OutcomeT],
    executor: Executor,
    workers: int,
    on_cell: Callable[[CellT, OutcomeT, bool], None],
) -> None:
    """Run what is missing of a plan into ``cells``.

    Args:
        plan: what to run.
        cells: where outcomes are kept, and which cells are done already.
        executor: runs the trainings.
        workers: how many at a time.
        on_cell: called after each cell with its outcome and whether it ran now, and was not there already.

    Raises:
        OSError: the file could not be written; it is whole, without the last cell.
        ValueError, FileNotFoundError, ModuleNotFoundError: a task's data or network is not to be had. Cells that ran beside
            the one that failed are kept.
    """
    told: set[CellT] = set()
    running: dict[Future[OutcomeT], CellT] = {}

    def tell(cell: CellT, fresh: bool) -> None:
        if cell not in told:  # a cell may be of use to several rows
            told.add(cell)
            on_cell(cell, cells[cell], fresh)

    def keep(future: Future[OutcomeT]) -> None:
        cell = running.pop(future)
        cells.add(cell, future.result())
        tell(cell, fresh=True)

    try:
        while True:
            for cell in plan.ready(cells):
                if cell in cells:
                    tell(cell, fresh=False)
                elif len(running) < workers and cell not in running.values():
                    running[executor.submit(plan.train, cell, plan.recipes[cell.task])] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                keep(future)
    except BaseException as error:
        waiting = [future for future in running if not future.cancel()]
        if isinstance(error, Exception):  # not where somebody waits for the end
            for future in wait(waiting).done:
                if future.exception() is None:
                    keep(future)
        raise
