"""Every study by name: which runs it has, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_atomically
from trady_kernels.study.budgets import (
    budget_section,
    budgets_plan,
    efficiency_section,
    plot_budget,
    plot_efficiency,
)
from trady_kernels.study.cells import CellFile, NothingFinished, Plan, made_with
from trady_kernels.study.draws import (
    plot_resampling,
    plot_sensitivity,
    resampling_plan,
    resampling_section,
    sensitivity_plan,
    sensitivity_section,
)
from trady_kernels.study.gradients import Gradients, Look, gradient_plan
from trady_kernels.study.importance import (
    Importance,
    Watch,
    importance_plan,
    importance_section,
    plot_importance,
)
from trady_kernels.study.layers import (
    ablation_plan,
    ablation_section,
    plot_ablation,
    plot_pool,
    pool_plan,
    pool_section,
)
from trady_kernels.study.plot import figure_files
from trady_kernels.study.ranks import channels_section, plot_channels, plot_ranks, ranks_section
from trady_kernels.study.recipes import recipes_of
from trady_kernels.study.report import write_report
from trady_kernels.study.results import Request, middle_rate, results_matrix
from trady_kernels.study.steps import (
    STEPS,
    StepTimes,
    Timing,
    plot_steps,
    step_plan,
    steps_section,
)
from trady_kernels.study.tails import histograms_section, plot_histograms, plot_tails, tails_section
from trady_kernels.study.trainings import KINDS, Training
from trady_kernels.study.verdicts import overview
from trady_kernels.training.settings import Settings

#: Cells of the results table, and a link to what is made of them.
RESULTS, _RESULTS_REPORT = "results.json", "[results.md](results.md)"
#: The document that all studies but the results table write their sections of.
DOCUMENT = "study.md"

#: Of the steps that are timed, by size.
_ROUNDS = {"quick": 3, "usual": 9, "full": 21}


def _own_rate(cell: Training, recipe: Settings) -> float:
    return cell.learning_rate


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        name: how users call it.
        words: what it finds out.
        cells: name of the file of its cells, which studies of the same runs share.
        kinds: classes of the cells and their outcomes.
        plan: which cells there are.
        section: lines of its part of the document.
        plot: draws it into files, as :func:`write_figure` takes them; the studies with a section have one.
        write: makes the files of its report, where that is not a section of the document.
        takes_schemes: whether a user may name schemes.
        alone: whether its cells are timed, so that only one may run at a time.
        rate: peak learning rate of a cell with the settings of its task; None where nothing is trained.
        beside: names of other files that its section is made of.
    """

    name: str
    words: str
    cells: str
    kinds: tuple[type[Any], type[Any]]
    plan: Callable[[Request], Plan[Any, Any]]
    section: Callable[[CellFile[Any, Any]], list[str]] | None = None
    plot: Callable[[Path, CellFile[Any, Any]], None] | None = None
    write: Callable[[CellFile[Any, Any], Path], list[Path]] | None = None
    takes_schemes: bool = False
    alone: bool = False
    rate: Callable[[Any, Settings], float] | None = _own_rate
    beside: tuple[str, ...] = ()

    def load(self, folder: Path) -> CellFile[Any, Any]:
        """The cells in a folder, of whatever tasks.

        Raises:
            FileNotFoundError: there are none.
            ValueError: the file is damaged, of another version or study.
        """
        return CellFile(folder / self.cells, self.kinds)

    def report(self, folder: Path) -> list[Path]:
        """Write the report from the cells in a folder.

        Returns:
            The files.

        Raises:
            FileNotFoundError, ValueError: there are no finished cells.
            ModuleNotFoundError: scipy or matplotlib is not installed.
        """
        return Reports(folder).write(self)


def _gradient_study(name: str, words: str, section: Any, plot: Any) -> Study:
    return Study(
        name,
        words,
        "gradients.json",
        (Look, Gradients),
        gradient_plan,
        section,
        plot,
        rate=lambda cell, recipe: recipe.learning_rate_of("full"),
    )


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "results",
            "every scheme on every task with several seeds, each learning rate tuned first on held-out samples: "
            "accuracy beside measured bytes, with paired tests",
            RESULTS,
            KINDS,
            results_matrix,
            write=write_report,
            takes_schemes=True,
        ),
        _gradient_study(
            "tails",
            "how heavy the tails of stochastic gradients are, by epoch: the index alpha of all of them and of each layer's",
            tails_section,
            plot_tails,
        ),
        _gradient_study(
            "histograms",
            "how far from zero gradients come, layer by layer, beside a Gaussian of the same variance",
            histograms_section,
            plot_histograms,
        ),
        _gradient_study(
            "ranks",
            "whether tasks, seeds and epochs agree on which layers have the most gradient, and how soon",
            ranks_section,
            plot_ranks,
        ),
        _gradient_study(
            "channels",
            "whether tasks and seeds agree on which channels have the most gradient",
            channels_section,
            plot_channels,
        ),
        Study(
            "pool",
            "accuracy by how many top layers channels are drawn from, and how much of the gradient these have",
            "pool.json",
            KINDS,
            pool_plan,
            pool_section,
            plot_pool,
        ),
        Study(
            "ablation",
            "what training one layer alone brings, and what freezing it costs, beside its score in the rankings",
            "ablation.json",
            KINDS,
            ablation_plan,
            ablation_section,
            plot_ablation,
        ),
        Study(
            "importance",
            "whether channels with much gradient go on having it, and how much of the whole gradient selections have",
            "importance.json",
            (Watch, Importance),
            importance_plan,
            importance_section,
            plot_importance,
            takes_schemes=True,
            rate=lambda cell, recipe: middle_rate(recipe),
        ),
        Study(
            "resampling",
            "accuracy and loss by when channels are drawn again: once, every few epochs, epoch or steps, or by a criterion",
            "resampling.json",
            KINDS,
            resampling_plan,
            resampling_section,
            plot_resampling,
            takes_schemes=True,
        ),
        Study(
            "steps",
            "how long a training step of every row of results takes, all of them turn by turn; nothing else should run",
            STEPS,
            (Timing, StepTimes),
            lambda request: step_plan(budgets_plan(request), _ROUNDS[request.size]),
            steps_section,
            plot_steps,
            alone=True,
            rate=None,
        ),
        Study(
            "budget",
            "accuracy against measured bytes, from the runs of results",
            RESULTS,
            KINDS,
            budgets_plan,
            budget_section,
            plot_budget,
        ),
        Study(
            "efficiency",
            "sparsity, FLOPs, bytes and step time of every scheme, epoch by epoch, from the runs of results",
            RESULTS,
            KINDS,
            budgets_plan,
            efficiency_section,
            plot_efficiency,
            beside=(STEPS,),
        ),
        Study(
            "sensitivity",
            "how much learning rate, budget and frequency matter together",
            "sensitivity.json",
            KINDS,
            sensitivity_plan,
            sensitivity_section,
            plot_sensitivity,
            takes_schemes=True,
        ),
    )
}


def document(folder: Path) -> str:
    """The document of all studies, made from the JSON files in a folder.

    Raises:
        ValueError: a file is damaged or of another version.
        ModuleNotFoundError: scipy is not installed.
    """
    return Reports(folder).document()


class Reports:
    """The reports of the studies in a folder; a section is made anew when the files that it is made of have changed.

    Args:
        folder: with the cells of the studies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sections: dict[str, tuple[Any, list[str] | None]] = {}

    def write(self, study: Study) -> list[Path]:
        """Write a study's plots, and the document or whatever else its report is.

        Returns:
            The files.

        Raises:
            FileNotFoundError, ValueError: there are no finished cells.
            ModuleNotFoundError: scipy or matplotlib is not installed.
        """
        cells = study.load(self._folder)
        if study.write is not None:
            return study.write(cells, self._folder)
        assert study.plot is not None
        written, text = self._folder / DOCUMENT, self.document()
        write_atomically(written, lambda file: file.write(text.encode()))
        plots = self._folder / f"study-{study.name}"
        study.plot(plots, cells)
        return [written, *figure_files(plots)]

    def document(self) -> str:
        """What every study has found, or how to run it, below an overview of all claims.

        Raises:
            ValueError: a file is damaged or of another version.
            ModuleNotFoundError: scipy is not installed.
        """
        sections = {study.name: self._section(study) for study in STUDIES.values() if study.section}
        lines = [
            "# The study behind the method",
            "",
            "Generated from the JSON files beside it, the rankings that ship and what scipy computes; no figure was typed. "
            "Networks train with SGD; the learning rate rises to its peak over the warm-up epochs and falls to 0 along a cosine.",
            "",
        ]
        if claims := overview({name: section or () for name, section in sections.items()}):
            lines += ["## Claims", "", *claims, ""]
        if (self._folder / RESULTS).exists():
            lines += [
                f"Claims about schemes, each at its own tuned rate, are tested in {_RESULTS_REPORT}.",
                "",
            ]
        for name in dict.fromkeys(STUDIES[name].cells for name in sections):
            here = {study: section for study, section in sections.items() if STUDIES[study].cells == name}
            lines += [f"## From {name}", ""]
            if any(section is not None for section in here.values()):
                lines += self._making(STUDIES[next(iter(here))])
            for study, section in here.items():
                lines += _with_head(STUDIES[study], section)
        return "\n".join(lines).rstrip() + "\n"

    def _section(self, study: Study) -> list[str] | None:
        """Lines of its section; None where nothing is finished yet."""
        state = [_state(self._folder / name) for name in (study.cells, *study.beside)]
        if study.name not in self._sections or self._sections[study.name][0] != state:
            self._sections[study.name] = (state, self._made(study) if state[0] else None)
        return self._sections[study.name][1]

    def _made(self, study: Study) -> list[str] | None:
        assert study.section is not None
        try:
            return study.section(study.load(self._folder))
        except NothingFinished:
            return None

    def _making(self, study: Study) -> list[str]:
        """What made a file of cells: commands, commits and recipes."""
        cells = study.load(self._folder)
        recipes = [] if study.rate is None else [*recipes_of(cells, study.rate), ""]
        return [*made_with(cells), "", *recipes]


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is written; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _with_head(study: Study, section: list[str] | None) -> list[str]:
    """A section as it stands in the document; of a study without runs, how to run it."""
    lines = [f"### `trady study {study.name}`", "", f"{study.words[0].upper()}{study.words[1:]}.", ""]
    if section is None:
        return [*lines, f"Not run yet: `trady study {study.name} --output FOLDER`.", ""]
    return [*lines, *section, "", f"![{study.name}](study-{study.name}.png)", ""]
