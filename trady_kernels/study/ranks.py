"""Reports of what runs agree on: which layers have the most gradient, and which channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from trady_kernels.selection import LayerRanking
from trady_kernels.study.gradients import Gradients, Look, Looks
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
    for cell in looks:
        networks.setdefault(looks.recipes[cell.task].model, []).append(cell)
    return networks


def layer_agreement(first: Gradients, second: Gradients, place: int = -1, other: int = -1) -> float:
    """Spearman's correlation of two runs' cumulated layer norms, at a place of each one's ``steps``."""
    scores = [
        {name: norms[at] for name, norms in run.layer_norms.items()}
        for run, at in ((first, place), (second, other))
    ]
    return LayerRanking(scores[0]).agreement(scores[1])


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


def _compare(
    looks: Looks, cells: list[Look], measure: Callable[[Gradients, Gradients], float]
) -> dict[Pair, float]:
    return {(a, b): measure(looks[a], looks[b]) for a, b in combinations(cells, 2)}


def _kinds(values: dict[Pair, float]) -> tuple[list[float], list[float]]:
    """Between seeds of a task, and between tasks."""
    seeds = [value for (a, b), value in values.items() if a.task == b.task]
    return seeds, [value for (a, b), value in values.items() if a.task != b.task]


def _words(pair: Pair) -> str:
    return " and ".join(f"{cell.task}, seed {cell.seed}" for cell in pair)


def _range(values: list[float]) -> str:
    return f"{spread(values, 2)} ({min(values):.2f} to {max(values):.2f})" if values else ""


def ranks_section(looks: Looks) -> list[str]:
    """Whether tasks and seeds agree on the layers with the most gradient, and after how many steps."""
    rows, sentences = [], []
    for network, cells in _by_network(looks).items():
        agreements = _compare(looks, cells, layer_agreement)
        if not agreements:
            continue
        seeds, tasks = _kinds(agreements)
        worst = min(agreements, key=agreements.__getitem__)
        stable = [stable_from(looks[cell]) for cell in cells]
        rows.append(
            [network, str(len(cells)), _range(seeds), _range(tasks), f"{min(stable)} to {max(stable)}"]
        )
        verdict = "holds" if agreements[worst] >= PUBLISHED_AGREEMENT else "does not hold"
        sentences += [
            "",
            f"*Ranks agree across tasks and seeds, at least {PUBLISHED_AGREEMENT} (TraDy)*, {network}: {verdict}, worst is "
            f"{agreements[worst]:.2f}, of {_words(worst)}.",
        ]
    heads = ["network", "runs", "between seeds", "between tasks", f"steps to {STABLE} with the end"]
    return [
        "Spearman's correlation of the layers' gradient norms, added up over a run: mean and standard deviation over pairs of "
        "runs, and range.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


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
        tests = _kinds(_compare(looks, cells, channel_p))
        differ = [f"{sum(p < 0.05 for p in group)} of {len(group)}" if group else "" for group in tests]
        rows.append([network, *(_range(group) for group in within), *differ])
        if tests[1]:
            count = sum(p < 0.05 for p in tests[1])
            verdict = "holds" if count == len(tests[1]) else "holds in part" if count else "does not hold"
            sentences += [
                "",
                f"*Channels differ between tasks (TraDy)*, {network}: {verdict}, the paired test tells {differ[1]} pairs of "
                f"tasks apart at 5%, and {differ[0] or 'none'} pairs of seeds of a task.",
            ]
    heads = ["network", "ranks, seeds", "ranks, tasks", "differ, seeds", "differ, tasks"]
    return [
        "Norms of the channels' gradients, added up over a run. Ranks: Spearman's correlation inside a layer, the mean over "
        "layers; differ: pairs of runs that a paired t-test over all channels tells apart at 5%.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _matrix(values: dict[Pair, float], cells: list[Look], diagonal: float) -> list[list[float]]:
    return [
        [diagonal if a == b else values[(a, b) if (a, b) in values else (b, a)] for b in cells] for a in cells
    ]


def _plot(path: Path, looks: Looks, measure: Callable[[Gradients, Gradients], float], **options: Any) -> None:
    matrices = {}
    for network, cells in _by_network(looks).items():
        names = [f"{cell.task} {cell.seed}" for cell in cells]
        matrices[network] = (_matrix(_compare(looks, cells, measure), cells, 1.0), names, names)
    write_figure(path, heat_maps(matrices, **options))


def plot_ranks(path: Path, looks: Looks) -> None:
    """Draw the matrix of rank correlations of layers, a panel a network."""
    _plot(path, looks, layer_agreement, words="Spearman's correlation of layers", low=0.0, high=1.0)


def plot_channels(path: Path, looks: Looks) -> None:
    """Draw the matrix of p-values between the channels of runs, a panel a network."""
    _plot(path, looks, channel_p, words="p of a paired t-test of channels", low=0.0, high=1.0)
