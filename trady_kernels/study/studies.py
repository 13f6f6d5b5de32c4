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
from trady_kernels.study.ranks import channels_section, plot_channels, plot_ranks, ranks_section
from trady_kernels.study.report import write_report
from trady_kernels.study.results import Request, results_matrix
from trady_kernels.study.steps import (
    STEPS,
    StepTimes,
    Timing,
    plot_steps,
    step_plan,
    steps_section,
)
from trady_kernels.study.tails import histograms_section, plot_histograms, plot_tails, tails_section
from trady_kernels.study.trainings import Training, TrainingOutcome

#: The document that all studies but the results table write their sections of.
DOCUMENT = "study.md"

#: Of the steps that are timed, by size.
_ROUNDS = {"quick": 3, "usual": 9, "full": 21}


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
        plot: draws it into a file; the studies with a section have one.
        write: makes the files of its report, where that is not a section of the document.
        takes_schemes: whether a user may name schemes.
        alone: whether its cells are timed, so that only one may run at a time.
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
        cells = self.load(folder)
        if self.write is not None:
            return self.write(cells, folder)
        assert self.plot is not None
        text = document(folder)
        write_atomically(folder / DOCUMENT, lambda file: file.write(text.encode()))
        plots = [folder / f"study-{self.name}.{kind}" for kind in ("png", "svg")]
        for path in plots:
            self.plot(path, cells)
        return [folder / DOCUMENT, *plots]


def _gradient_study(name: str, words: str, section: Any, plot: Any) -> Study:
    return Study(
        name,
        words,
        "gradients.json",
        (Look, Gradients),
        gradient_plan,
        section,
        plot,
    )


STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "results",
            "every scheme on every task with several seeds, each learning rate tuned first on held-out samples: "
            "accuracy beside measured bytes, with paired tests",
            "results.json",
            (Training, TrainingOutcome),
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
            (Training, TrainingOutcome),
            pool_plan,
            pool_section,
            plot_pool,
        ),
        Study(
            "ablation",
            "what training one layer alone brings, and what freezing it costs, beside its score in the rankings",
            "ablation.json",
            (Training, TrainingOutcome),
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
        ),
        Study(
            "resampling",
            "accuracy and loss by when channels are drawn again: once, every few epochs, epoch or steps, or by a criterion",
            "resampling.json",
            (Training, TrainingOutcome),
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
        ),
        Study(
            "budget",
            "accuracy against measured bytes, from the runs of results",
            "results.json",
            (Training, TrainingOutcome),
            budgets_plan,
            budget_section,
            plot_budget,
        ),
        Study(
            "efficiency",
            "sparsity, FLOPs, bytes and step time of every scheme, epoch by epoch, from the runs of results",
            "results.json",
            (Training, TrainingOutcome),
            budgets_plan,
            efficiency_section,
            plot_efficiency,
        ),
        Study(
            "sensitivity",
            "how much learning rate, budget and frequency matter together",
            "sensitivity.json",
            (Training, TrainingOutcome),
            sensitivity_plan,
            sensitivity_section,
            plot_sensitivity,
            takes_schemes=True,
        ),
    )
}


def document(folder: Path) -> str:
    """The document of all studies that a folder has finished cells of, made from its JSON files.

    Raises:
        ValueError: a file is damaged or of another version.
        ModuleNotFoundError: scipy is not installed.
    """
    lines = ["# The study behind the method", ""]
    made: set[str] = set()
    for study in STUDIES.values():
        if study.section is None or not (folder / study.cells).exists():
            continue
        cells = study.load(folder)
        try:
            section = study.section(cells)
        except NothingFinished:
            continue
        if study.cells not in made:
            lines += [f"## From {study.cells}", "", *made_with(cells), ""]
            made.add(study.cells)
        picture = f"![{study.name}](study-{study.name}.png)"
        sentence = study.words[0].upper() + study.words[1:]
        lines += [
            f"### `trady study {study.name}`",
            "",
            f"{sentence}.",
            "",
            *section,
            "",
            picture,
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"
