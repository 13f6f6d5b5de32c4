"""Reports of what runs agree on: which layers have the most gradient, and which channels."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from trady_kernels.selection import LayerRanking
from trady_kernels.study.gradients import Gradients, Look, Looks, finished
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import heat_maps, write_figure
from trady_kernels.study.statistics import paired_test

#: Spearman's correlation between any two of TraDy's tasks and seeds.
PUBLISHED_AGREEMENT = 0.8
#: Of a ranking with the one at the end of the run, from which on it counts as stable.
STABLE = 0.95

Pair = tuple[Look, Look]


def _by_network(looks: Looks) -> dict[str, list[Look]]:
    networks: dict[str, list[Look]] = {}
    for cell in finished(looks):
        networks.setdefault(looks.recipes[cell.task].model, []).append(cell)
    return networks


def layer_agreement(first: Gradients, second: Gradients, place: int = -1, other: int = -1) -> float:
    """Spearman's correlation of two runs' cumulated layer norms, at a place of each one's ``steps``."""
    scores = [
        {name: norms[at] for name, norms in run.layer_norms.items()}
        for run, at in ((first, place), (second, other))
    ]
    return LayerRanking(scores[0]).agreement(scores[1])


def epoch_agreements(run: Gradients, epochs: int) -> list[float]:
    """Spearman's correlation of the layer norms of any two epochs of a run, each added up over its own steps alone."""
    steps = run.steps[-1] // epochs
    ends = [run.steps.index(steps * epoch) for epoch in range(1, 1 + epochs)]
    rankings = [
        LayerRanking(
            {
                name: max(norms[end] - (norms[before] if before is not None else 0.0), 0.0)
                for name, norms in run.layer_norms.items()
            }
        )
        for before, end in zip([None, *ends[:-1]], ends, strict=True)
    ]
    return [a.agreement(b) for a, b in combinations(rankings, 2)]


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


def channel_p(first: Gradients, second: Gradients) -> float:
    """The p of a paired t-test of two runs' cumulated channel norms, over all channels of all layers.

    It tells whether one run's gradients are larger in all, not whether other channels have them.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    norms = [
        {
            (name, channel): norm
            for name, values in run.channel_norms.items()
            for channel, norm in enumerate(values)
        }
        for run in (first, second)
    ]
    return paired_test(norms[0], norms[1]).p


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


@dataclass(frozen=True)
class Apart:
    """How far the channels of two tasks differ.

    Attributes:
        share: of channels that a t-test tells apart between the seeds of one task and those of the other.
        mixed: the same between every other two groups of these runs, in which tasks are mixed: what chance makes of it.
    """

    share: float
    mixed: list[float]

    @property
    def differ(self) -> bool:
        """Whether tasks differ more than any groups in which they are mixed."""
        return self.share > max(self.mixed)


def tasks_apart(first: Sequence[Gradients], second: Sequence[Gradients]) -> Apart | None:
    """Compare two tasks by the topologies of their runs; None with fewer than two runs of each.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    count = min(len(first), len(second))
    if count < 2:
        return None
    runs = [topology(run) for run in (*first[:count], *second[:count])]
    tasks = set(range(count))
    mixed = []
    for others in combinations(range(1, 2 * count), count - 1):
        group = {0, *others}  # with the first run, so that no division counts twice
        if group != tasks:
            rest = [runs[at] for at in range(2 * count) if at not in group]
            mixed.append(share_apart([runs[at] for at in sorted(group)], rest))
    return Apart(share_apart(runs[:count], runs[count:]), mixed)


def _compare(
    looks: Looks, cells: list[Look], measure: Callable[[Gradients, Gradients], float]
) -> dict[Pair, float]:
    return {(a, b): measure(looks[a], looks[b]) for a, b in combinations(cells, 2)}


def _of_task(looks: Looks, cells: list[Look], task: str) -> list[Gradients]:
    return [looks[cell] for cell in cells if cell.task == task]


def _all_apart(looks: Looks, cells: list[Look]) -> dict[tuple[str, str], Apart]:
    """Every two tasks that have two runs each."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    found = {
        (a, b): tasks_apart(_of_task(looks, cells, a), _of_task(looks, cells, b))
        for a, b in combinations(tasks, 2)
    }
    return {pair: apart for pair, apart in found.items() if apart is not None}


def _kinds(values: dict[Pair, float]) -> tuple[list[float], list[float]]:
    """Between seeds of a task, and between tasks."""
    seeds = [value for (a, b), value in values.items() if a.task == b.task]
    return seeds, [value for (a, b), value in values.items() if a.task != b.task]


def _words(pair: Pair) -> str:
    return " and ".join(f"{cell.task}, seed {cell.seed}" for cell in pair)


def _range(values: list[float]) -> str:
    return f"{spread(values, 2)} ({min(values):.2f} to {max(values):.2f})" if values else ""


def ranks_section(looks: Looks) -> list[str]:
    """Whether tasks, seeds and epochs agree on the layers with the most gradient, and after how many steps."""
    rows, sentences = [], []
    for network, cells in _by_network(looks).items():
        agreements = _compare(looks, cells, layer_agreement)
        if not agreements:
            continue
        seeds, tasks = _kinds(agreements)
        worst = min(agreements, key=agreements.__getitem__)
        epochs = [
            agreement
            for cell in cells
            for agreement in epoch_agreements(looks[cell], looks.recipes[cell.task].epochs)
        ]
        stable = [stable_from(looks[cell]) for cell in cells]
        first_epochs = [looks[cell].steps[-1] // looks.recipes[cell.task].epochs for cell in cells]
        rows.append(
            [
                network,
                str(len(cells)),
                *(_range(found) for found in (seeds, tasks, epochs)),
                f"{min(stable)} to {max(stable)}",
            ]
        )
        early = sum(found <= steps for found, steps in zip(stable, first_epochs, strict=True))
        sentences += [
            "",
            f"*Ranks agree across tasks and seeds, at least {PUBLISHED_AGREEMENT} (TraDy)*, {network}: "
            f"{_holds(agreements[worst] >= PUBLISHED_AGREEMENT)}, worst is {agreements[worst]:.2f}, of {_words(worst)}.",
            "",
            f"*A few epochs suffice for a ranking (TraDy)*, {network}: {_holds(early == len(cells))}, in {early} of {len(cells)} runs "
            f"the ranking after the first epoch, or one before, agrees with the last by {STABLE} or more.",
        ]
    heads = [
        *("network", "runs", "between seeds", "between tasks", "between epochs"),
        f"steps to {STABLE} with the end",
    ]
    return [
        "Spearman's correlation of the layers' gradient norms: between runs, added up over a run; between epochs of a run, each "
        "epoch's own. Mean and standard deviation over pairs, and range. The steps are those after which the norms so far rank "
        "layers as those of the whole run do.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _holds(claim: bool) -> str:
    return "holds" if claim else "does not hold"


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
        within = _kinds(_compare(looks, cells, channel_agreement))
        paired = _kinds(_compare(looks, cells, channel_p))
        larger = [f"{sum(p < 0.05 for p in group)} of {len(group)}" if group else "" for group in paired]
        apart = _all_apart(looks, cells)
        shares = [100 * found.share for found in apart.values()]
        mixed = [100 * share for found in apart.values() for share in found.mixed]
        rows.append([network, *map(_range, within), spread(shares), spread(mixed), *larger])
        if apart:
            differ = sum(found.differ for found in apart.values())
            verdict = "holds" if differ == len(apart) else "holds in part" if differ else "does not hold"
            sentences += [
                "",
                f"*Channels differ between tasks (TraDy)*, {network}: {verdict}; {differ} of {len(apart)} pairs of tasks have more "
                f"channels apart than any groups that mix them, {statistics.fmean(shares):.1f}% of channels against "
                f"{statistics.fmean(mixed):.1f}%.",
            ]
    heads = [
        *("network", "ranks, seeds", "ranks, tasks", "apart, tasks (%)", "apart, mixed (%)"),
        *("larger, seeds", "larger, tasks"),
    ]
    return [
        "Norms of the channels' gradients, added up over a run. Ranks: Spearman's correlation inside a layer, the mean over "
        "layers, between two runs of a task and of different ones. Apart: share of channels whose norms, over the mean of their "
        "layer, Welch's t-test tells apart at 5% between the seeds of one task and those of another; mixed: between groups of "
        "the same runs that have both tasks in them, which is what chance makes of so few seeds. Larger: pairs of runs that a "
        "paired t-test over all channels tells apart at 5%, which it does where one run's gradients are larger in all, so that it "
        "says nothing of which channels have them.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _matrix(values: dict[Pair, float], cells: list[Look], diagonal: float) -> list[list[float]]:
    return [
        [diagonal if a == b else values[(a, b) if (a, b) in values else (b, a)] for b in cells] for a in cells
    ]


def _plot_runs(
    path: Path, looks: Looks, measure: Callable[[Gradients, Gradients], float], words: str
) -> None:
    matrices = {}
    for network, cells in _by_network(looks).items():
        names = [f"{cell.task} {cell.seed}" for cell in cells]
        matrices[network] = (_matrix(_compare(looks, cells, measure), cells, 1.0), names, names)
    write_figure(path, heat_maps(matrices, words=words, low=0.0, high=1.0, axes_words=("task, seed",) * 2))


def plot_ranks(path: Path, looks: Looks) -> None:
    """Draw the matrix of rank correlations of layers, a panel a network."""
    _plot_runs(path, looks, layer_agreement, "Spearman's correlation of layers")


def plot_channels(path: Path, looks: Looks) -> None:
    """Draw the matrix of rank correlations of channels, a panel a network, and the share that tells two tasks apart."""
    matrices: dict[str, tuple[list[list[float]], list[str], list[str]]] = {}
    for network, cells in _by_network(looks).items():
        names = [f"{cell.task} {cell.seed}" for cell in cells]
        matrices[f"{network}, ranks"] = (
            _matrix(_compare(looks, cells, channel_agreement), cells, 1.0),
            names,
            names,
        )
        tasks = list(dict.fromkeys(cell.task for cell in cells))
        apart = _all_apart(looks, cells)
        matrices[f"{network}, apart"] = (
            [
                [
                    apart[pair].share if (pair := (a, b)) in apart or (pair := (b, a)) in apart else math.nan
                    for b in tasks
                ]
                for a in tasks
            ],
            tasks,
            tasks,
        )
    words = "ranks: Spearman's correlation; apart: share of channels"
    write_figure(path, heat_maps(matrices, words=words, low=0.0, high=1.0, axes_words=("task, seed",) * 2))
