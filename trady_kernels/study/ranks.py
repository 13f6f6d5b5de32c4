"""Reports of what runs agree on: which layers have the most gradient, and which channels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch

from trady_kernels.selection import LayerRanking
from trady_kernels.study.gradients import Gradients, Look, Looks, finished
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.permutation import GroupTest, group_test
from trady_kernels.study.plot import LETTERS, heat_maps, write_figure
from trady_kernels.study.statistics import held, p_words, verdict
from trady_kernels.study.verdicts import Verdict

#: Spearman's correlation between any two of TraDy's tasks and seeds.
PUBLISHED_AGREEMENT = 0.8
#: Of a ranking with the one at the end of the run, from which on it counts as stable.
STABLE = 0.95
#: Accuracy below the best run of the task from which on a training counts as failed.
FAR_BELOW = 0.1

#: Inches that a scale of colours is high, with its numbers and words.
_BAR = 0.5

Pair = tuple[Look, Look]
_Found = TypeVar("_Found")


def _by_network(looks: Looks) -> dict[str, list[Look]]:
    """Finished runs, task by task in the order of the file's recipes."""
    networks: dict[str, list[Look]] = {}
    tasks = list(looks.recipes)
    for cell in sorted(finished(looks), key=lambda cell: (tasks.index(cell.task), cell.seed)):
        networks.setdefault(looks.recipes[cell.task].model, []).append(cell)
    return networks


def far_below(looks: Looks, cells: Sequence[Look]) -> list[Look]:
    """The runs that end more than ``FAR_BELOW`` under the best one of their task."""
    best: dict[str, float] = {}
    for cell in cells:
        best[cell.task] = max(best.get(cell.task, 0.0), looks[cell].top1)
    return [cell for cell in cells if looks[cell].top1 < best[cell.task] - FAR_BELOW]


def layer_agreement(first: Gradients, second: Gradients, place: int = -1, other: int = -1) -> float:
    """Spearman's correlation of two runs' cumulated layer norms, at a place of each one's ``steps``."""
    scores = [
        {name: norms[at] for name, norms in run.layer_norms.items()}
        for run, at in ((first, place), (second, other))
    ]
    return LayerRanking(scores[0]).agreement(scores[1])


def _ends(run: Gradients, epochs: int) -> list[int]:
    """Places in ``steps`` of the last step of every epoch."""
    steps = run.steps[-1] // epochs
    return [run.steps.index(steps * epoch) for epoch in range(1, 1 + epochs)]


def _between(run: Gradients, start: int | None, end: int) -> LayerRanking:
    """Layers by their norms between two places in ``steps``; None is before the first step."""
    return LayerRanking(
        {
            name: max(norms[end] - (norms[start] if start is not None else 0.0), 0.0)
            for name, norms in run.layer_norms.items()
        }
    )


def epoch_agreements(run: Gradients, epochs: int) -> list[float]:
    """Spearman's correlation of the layer norms of any two epochs of a run, each added up over its own steps alone."""
    ends = _ends(run, epochs)
    rankings = [_between(run, before, end) for before, end in zip([None, *ends[:-1]], ends, strict=True)]
    return [a.agreement(b) for a, b in combinations(rankings, 2)]


def later_agreements(run: Gradients, epochs: int) -> list[float]:
    """Spearman's correlation of the layer norms up to the end of each epoch but the last, with those of all later steps."""
    *ends, last = _ends(run, epochs)
    return [_between(run, None, end).agreement(_between(run, end, last)) for end in ends]


def channel_agreement(first: Gradients, second: Gradients) -> float:
    """Spearman's correlation of two runs' cumulated channel norms inside a layer, the mean over layers.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import spearmanr

    found = []
    for name, norms in first.channel_norms.items():
        others = second.channel_norms[name]
        if len(set(norms)) > 1 and len(set(others)) > 1:
            found.append(float(spearmanr(norms, others).statistic))
    return math.fsum(found) / len(found) if found else math.nan


def channel_test(first: Gradients, second: Gradients) -> tuple[float, float]:
    """Student's t and p of a paired t-test of two runs' cumulated channel norms, over all channels of all layers.

    It tells whether one run's gradients are larger in all, not whether other channels have them. Both are NaN where all
    differences are equal.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import ttest_1samp

    norms, others = (
        torch.cat([torch.tensor(norms, dtype=torch.float64) for norms in run.channel_norms.values()])
        for run in (first, second)
    )
    differences = norms - others
    if (differences == differences[0]).all():
        return math.nan, math.nan
    test = ttest_1samp(differences.numpy(), 0.0)
    return float(test.statistic), float(test.pvalue)


def topology(run: Gradients) -> torch.Tensor:
    """Channels' norms over the mean of their layer's, all layers in a row: which channels have it, whatever its size."""
    parts = [torch.tensor(norms, dtype=torch.float64) for norms in run.channel_norms.values()]
    return torch.cat([norms / norms.mean() if norms.any() else norms for norms in parts])


def share_apart(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Share of channels that Welch's t-test tells apart at 5% between two groups of runs, of at least two topologies each.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import ttest_ind

    groups = [torch.stack(list(group)) for group in (first, second)]
    moving = torch.cat(groups).std(0) > 0
    with warnings.catch_warnings():
        # Of a channel that is the same in all runs of a group; three digits of a norm are kept.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        test = ttest_ind(*(group[:, moving].numpy() for group in groups), equal_var=False)
    return float((torch.from_numpy(test.pvalue) < 0.05).double().sum() / len(moving))


def _compare(
    looks: Looks, cells: list[Look], measure: Callable[[Gradients, Gradients], _Found]
) -> dict[Pair, _Found]:
    return {(a, b): measure(looks[a], looks[b]) for a, b in combinations(cells, 2)}


def tasks_apart(looks: Looks, cells: list[Look]) -> list[float]:
    """``share_apart`` of every two tasks that have two runs each."""
    groups: dict[str, list[torch.Tensor]] = {}
    for cell in cells:
        groups.setdefault(cell.task, []).append(topology(looks[cell]))
    several = [group for group in groups.values() if len(group) > 1]
    return [share_apart(a, b) for a, b in combinations(several, 2)]


def tasks_test(agreements: dict[Pair, float], cells: list[Look]) -> GroupTest | None:
    """Whether runs of a task agree more than runs of different tasks; None where there are too few.

    One less the correlation is, but for a factor, the squared distance of ranks.
    """
    squares = [[1 - value for value in row] for row in _matrix(agreements, cells, 1.0)]
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    return group_test(squares, [tasks.index(cell.task) for cell in cells])


def _kinds(values: Mapping[Pair, _Found]) -> tuple[list[_Found], list[_Found]]:
    """Between seeds of a task, and between tasks."""
    seeds = [value for (a, b), value in values.items() if a.task == b.task]
    return seeds, [value for (a, b), value in values.items() if a.task != b.task]


def _range(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    return f"{spread(values, digits)} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ranks_section(looks: Looks) -> list[str]:
    """Whether tasks, seeds and epochs agree on the layers with the most gradient, and after how many steps."""
    rows, sentences = [], []
    for network, cells in _by_network(looks).items():
        agreements = _compare(looks, cells, layer_agreement)
        if not agreements:
            continue
        epochs = [
            agreement
            for cell in cells
            for agreement in epoch_agreements(looks[cell], looks.recipes[cell.task].epochs)
        ]
        stable = [stable_from(looks[cell]) for cell in cells]
        steps = max(looks[cell].steps[-1] for cell in cells)
        rows.append(
            [
                network,
                str(len(cells)),
                *(_range(found) for found in (*_kinds(agreements), epochs)),
                f"{min(stable)} to {max(stable)} of {steps}",
            ]
        )
        claim = f"ranks agree across tasks and seeds, at least {PUBLISHED_AGREEMENT} (TraDy)"
        sentences += ["", Verdict.of(claim, network, *_agree(looks, agreements))]
        if failed := far_below(looks, cells):
            others = {pair: value for pair, value in agreements.items() if not set(failed) & set(pair)}
            names = ", ".join(_run(looks, cell) for cell in failed)
            if others:
                where = f"{network}, without {names}"
                sentences += ["", Verdict.of(claim, where, *_agree(looks, others))]
        if early := _early(looks, cells, stable):
            sentences += ["", Verdict.of("a few epochs suffice for a ranking (TraDy)", network, *early)]
    heads = [
        *("network", "runs", "between seeds", "between tasks", "between epochs"),
        f"steps to {STABLE} with the end",
    ]
    return [
        "Spearman's correlation of the layers' gradient norms: between runs, added up over a run; between epochs of a run, each "
        "epoch's own. Mean and standard deviation over pairs, and range. Norms were noted after 1, 2, 4, 8, ... steps and at the "
        f"end of every epoch: the steps are the first of these from which on the norms so far rank layers as those of the whole "
        f"run do, with a correlation of {STABLE} or more. The whole run contains the steps so far, so that late ones agree with it "
        "in any case.",
        "",
        f"Beside runs stands their top-1. A training more than {100 * FAR_BELOW:g} points below the best of its task counts as "
        "failed; where there is one, the verdict is given without it too.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _agree(looks: Looks, agreements: dict[Pair, float]) -> tuple[str, str]:
    """Whether all pairs agree as TraDy's do, and which do least."""
    worst = min(agreements, key=agreements.__getitem__)
    runs = " and ".join(_run(looks, cell) for cell in worst)
    return held(agreements[worst] >= PUBLISHED_AGREEMENT, 1), f"worst is {agreements[worst]:.2f}, of {runs}"


def _run(looks: Looks, cell: Look) -> str:
    return f"{cell.task}, seed {cell.seed} ({100 * looks[cell].top1:.1f}%)"


def _early(looks: Looks, cells: list[Look], stable: list[int]) -> tuple[str, str] | None:
    """Whether the ranking is stable before the last epoch, and how it is after the first; of one epoch None."""
    last = min(looks.recipes[cell.task].epochs for cell in cells) - 1
    if last < 1:
        return None
    soon, alike = {}, {}
    for epoch in dict.fromkeys((last, 1)):
        ends = [
            looks[cell].steps[_ends(looks[cell], looks.recipes[cell.task].epochs)[epoch - 1]]
            for cell in cells
        ]
        later = [later_agreements(looks[cell], looks.recipes[cell.task].epochs)[epoch - 1] for cell in cells]
        soon[epoch] = sum(found <= end for found, end in zip(stable, ends, strict=True))
        alike[epoch] = f"{min(later):.2f} to {max(later):.2f}"
    first = last > 1
    found = (
        f"after epoch {last} of {last + 1} the ranking agrees with the whole run's by {STABLE} or more in {soon[last]} of "
        f"{len(cells)} runs{f' (after epoch 1 in {soon[1]})' * first}; with that of the epochs after it alone its correlation is "
        f"{alike[last]}{f' (after epoch 1 {alike[1]})' * first}"
    )
    return held(soon[last], len(cells)), found


def stable_from(run: Gradients) -> int:
    """The first noted step from which on the ranking agrees with the last one's by at least ``STABLE``."""
    found = run.steps[-1]
    for place in reversed(range(len(run.steps))):
        if layer_agreement(run, run, place) < STABLE:
            break
        found = run.steps[place]
    return found


def channels_section(looks: Looks) -> list[str]:
    """Whether tasks differ in the channels with the most gradient."""
    rows, sentences = [], []
    for network, cells in _by_network(looks).items():
        if len(cells) < 2:
            continue
        agreements = _compare(looks, cells, channel_agreement)
        tests = _compare(looks, cells, channel_test)
        larger = [
            f"{sum(p < 0.05 for _, p in group)} of {len(group)}" if group else "" for group in _kinds(tests)
        ]
        apart = _range([100 * share for share in tasks_apart(looks, cells)], 1)
        rows.append([network, *map(_range, _kinds(agreements)), apart, *larger])
        if (test := tasks_test(agreements, cells)) is not None:
            claim = "channels differ between tasks (TraDy)"
            sentences += ["", Verdict.of(claim, network, verdict(test.p, 1.0), _differ(test, len(cells)))]
    heads = ["network", "ranks, seeds", "ranks, tasks", "apart (%)", "larger, seeds", "larger, tasks"]
    return [
        "Norms of the channels' gradients, added up over a run. Ranks: Spearman's correlation inside a layer, the mean over "
        "layers, between two runs of a task and of different ones. Apart: share of channels whose norms, over the mean of their "
        "layer, Welch's t-test tells apart at 5% between the seeds of one task and those of another, the mean over pairs of tasks; "
        "chance alone would tell 5% apart, and of so few seeds fewer. Larger: pairs of runs that a paired t-test over all channels "
        "tells apart at 5%, which it does where one run's gradients are larger in all, so that it says nothing of which channels "
        "have them. The picture has the ranks of every two runs below the diagonal, and that test's |t| above it: 2 is the level "
        "of 5%.",
        "",
        *markdown(heads, rows),
        "",
        "Whether tasks differ is one permutation test a network: F is how much further apart, by one less the correlation of "
        "ranks, runs of different tasks are than runs of one, and p the share of all divisions of the runs into groups of the "
        "same sizes, the tasks among them, whose F is at least as large.",
        *sentences,
    ]


def _differ(test: GroupTest, runs: int) -> str:
    least = f"; p cannot be below {1 / test.divisions:.3f}" if test.divisions < 20 else ""
    return (
        f"F is {test.statistic:.1f} ({p_words(test.p)}, of {test.divisions} divisions of {runs} runs{least})"
    )


def _matrix(values: dict[Pair, float], cells: list[Look], diagonal: float) -> list[list[float]]:
    return [
        [diagonal if a == b else values[(a, b) if (a, b) in values else (b, a)] for b in cells] for a in cells
    ]


def plot_ranks(path: Path, looks: Looks) -> None:
    """Draw the matrix of rank correlations of layers, a panel a network."""
    matrices = {}
    for network, cells in _by_network(looks).items():
        names = _names(looks, cells)
        matrices[network] = (_matrix(_compare(looks, cells, layer_agreement), cells, 1.0), names, names)
    write_figure(path, _heat_maps(matrices, "Spearman's correlation of layers"))


def plot_channels(path: Path, looks: Looks) -> None:
    """Draw the matrix of rank correlations of channels below the diagonal and of t-tests above it, a panel a network."""
    matrices, above = {}, []
    for network, cells in _by_network(looks).items():
        names = _names(looks, cells)
        agreements = _matrix(_compare(looks, cells, channel_agreement), cells, math.nan)
        tests = {pair: abs(t) for pair, (t, _) in _compare(looks, cells, channel_test).items()}
        matrices[network] = (_triangle(agreements, below=True), names, names)
        above.append(_triangle(_matrix(tests, cells, math.nan), below=False))
    figure = _heat_maps(matrices, "Spearman's correlation (below the diagonal)")
    _draw_above(figure, above, "|t| of paired t-tests (above the diagonal)")
    write_figure(path, figure)


def _names(looks: Looks, cells: list[Look]) -> list[str]:
    failed = far_below(looks, cells)
    return [f"{cell.task} {cell.seed}{'*' * (cell in failed)}" for cell in cells]


def _triangle(matrix: list[list[float]], *, below: bool) -> list[list[float]]:
    """The part of a matrix on one side of its diagonal; NaN elsewhere."""
    return [
        [
            value if column != row and (column < row) == below else math.nan
            for column, value in enumerate(values)
        ]
        for row, values in enumerate(matrix)
    ]


def _heat_maps(matrices: Mapping[str, tuple[list[list[float]], list[str], list[str]]], words: str) -> Any:
    """Of correlations, colours from the tenth below the lowest one to 1."""
    found = [value for matrix, _, _ in matrices.values() for row in matrix for value in row if value == value]
    low = math.floor(10 * min(found, default=0.0) - 1e-9) / 10
    failed = any(name.endswith("*") for _, names, _ in matrices.values() for name in names)
    note = f" (* over {100 * FAR_BELOW:g} points below its task's best)" * failed
    return heat_maps(matrices, words=words, low=low, high=1.0, axes_words=("", f"task, seed{note}"))


def _draw_above(figure: Any, matrices: list[list[list[float]]], words: str) -> None:
    """Draw into the empty cells of a figure's heat maps others, in other colours with a scale of their own."""
    panels = figure.axes[: len(matrices)]
    most = max(
        (value for matrix in matrices for row in matrix for value in row if value == value), default=1.0
    )
    for axes, matrix in zip(panels, matrices, strict=True):
        image = axes.imshow(matrix, cmap="Purples", vmin=0.0, vmax=most, aspect=axes.get_aspect())
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if value == value:
                    ink = "white" if value > most / 2 else "black"
                    axes.text(
                        column,
                        row,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=LETTERS["cells"],
                        color=ink,
                    )
    figure.set_figheight(figure.get_figheight() + _BAR)
    bar = figure.colorbar(
        image, ax=panels, location="bottom", fraction=0.02, pad=0.02, aspect=30, label=words
    )
    bar.ax.tick_params(labelsize=LETTERS["ticks"])
    bar.ax.xaxis.label.set_fontsize(LETTERS["label"])
