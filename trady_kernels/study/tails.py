"""Reports of how heavy the tails of stochastic gradients are: the tail index, and histograms beside a Gaussian."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from trady_kernels.study.gradients import BINS_PER_OCTAVE, BLOCKS, OCTAVES, Gradients, Look, Looks
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import panels, style, write_figure
from trady_kernels.study.tail_index import on_known_draws

#: Of the draws that show what the estimate is worth.
KNOWN = (1.2, 1.4, 1.6, 1.8, 2.0)
#: What TraDy reports of every network, task and epoch.
PUBLISHED = (1.3, 2.0)


def tails_section(looks: Looks) -> list[str]:
    """Tables of the tail index, and whether it is where TraDy finds it."""
    rows = []
    for task in looks.recipes:
        runs = [looks[cell] for cell in looks if cell.task == task]
        if not runs:
            continue
        layers = [
            alpha
            for run in runs
            for alphas in run.layer_alphas.values()
            for alpha in alphas
            if alpha is not None
        ]
        rows.append(
            [
                task,
                *(spread(_all(runs, block, place), 2) for block in BLOCKS for place in (0, -1)),
                f"{min(layers):.2f} to {max(layers):.2f}",
                spread([100 * run.top1 for run in runs]),
            ]
        )
    heads = ["task", *(f"{when} epoch, sums of {block}" for block in BLOCKS for when in ("first", "last"))]
    values = [
        alpha
        for cell in looks
        for alphas in looks[cell].alphas.values()
        for alpha in alphas
        if alpha is not None
    ]
    inside = sum(PUBLISHED[0] <= alpha <= PUBLISHED[1] for alpha in values)
    verdict = "holds" if inside == len(values) else "does not hold" if not inside else "holds in part"
    return [
        "The index alpha of all gradients of an epoch (mean and standard deviation over seeds), 2 for a Gaussian; of single "
        "layers the range over epochs and seeds, with sums of 16.",
        "",
        *markdown([*heads, "single layers", "top-1"], rows),
        "",
        f"*The gradients' tail index is between 1.3 and 2.0 (TraDy)*: {verdict}, {inside} of {len(values)} values are, from "
        f"{min(values):.2f} to {max(values):.2f}.",
        "",
        *_estimator(),
    ]


def _estimator() -> list[str]:
    """What the estimate is worth, on draws of a known index."""
    rows = []
    for block in BLOCKS:
        found = [(alpha, on_known_draws(alpha, block)) for alpha in KNOWN]
        rows.append(
            [f"sums of {block}", *(f"{s.mean - alpha:+.3f} ± {s.deviation:.3f}" for alpha, s in found)]
        )
    return [
        "Bias and spread of the estimate on ten times 64,000 symmetric alpha-stable draws (scipy's `levy_stable`):",
        "",
        *markdown(["alpha", *(f"{alpha:g}" for alpha in KNOWN)], rows),
    ]


def _all(runs: Sequence[Gradients], block: int, epoch: int) -> list[float]:
    return [alpha for run in runs if (alpha := run.alphas[str(block)][epoch]) is not None]


def plot_tails(path: Path, looks: Looks) -> None:
    """Draw the tail index by epoch, all gradients and the middle half of the layers, a panel a task."""
    tasks = list(dict.fromkeys(cell.task for cell in looks))
    figure, axes_of = panels(len(tasks))
    for axes, task in zip(axes_of, tasks, strict=True):
        runs = [looks[cell] for cell in looks if cell.task == task]
        epochs = range(1, 1 + len(runs[0].alphas[str(BLOCKS[0])]))
        for place, block in enumerate(BLOCKS):
            means = [_mean(_all(runs, block, epoch - 1)) for epoch in epochs]
            axes.plot(list(epochs), means, label=f"all, sums of {block}", **style(place))
        of_layers = [
            [
                a
                for run in runs
                for alphas in run.layer_alphas.values()
                if (a := alphas[epoch - 1]) is not None
            ]
            for epoch in epochs
        ]
        low, high = ([_quantile(alphas, share) for alphas in of_layers] for share in (0.25, 0.75))
        axes.fill_between(list(epochs), low, high, alpha=0.2, color="grey", label="middle half of the layers")
        axes.axhline(2.0, color="black", linewidth=0.8, linestyle=":", label="Gaussian")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    axes_of[0].set_ylabel("tail index alpha")
    write_figure(path, figure)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values).quantile(share)) if values else math.nan


def exceeding(run: Gradients, layer: str) -> tuple[list[float], list[float]]:
    """Magnitudes in standard deviations, and the share of a layer's gradient elements above each, zeros not counted."""
    counts = torch.tensor(run.histograms[layer], dtype=torch.float64)
    edges = [
        2.0 ** (OCTAVES[0] + place / BINS_PER_OCTAVE) / run.deviations[layer] for place in range(len(counts))
    ]
    above = counts.flip(0).cumsum(0).flip(0) / counts.sum()
    return edges, above.tolist()


def gaussian_exceeding(deviations: float) -> float:
    """Share of a Gaussian's samples that are further from zero than so many standard deviations."""
    return math.erfc(deviations / math.sqrt(2))


def _shown(run: Gradients) -> dict[str, str]:
    """Layers to draw, and what they are: the first, the last, those of the lightest and the heaviest tails."""
    means = {
        name: sum(a or 2.0 for a in alphas) / len(alphas)
        for name, alphas in run.layer_alphas.items()
        if run.deviations.get(name)
    }
    names = list(means)
    picked = {
        names[0]: "first layer",
        names[-1]: "last layer",
        max(means, key=means.__getitem__): "lightest tails",
        min(means, key=means.__getitem__): "heaviest tails",
    }
    return dict(picked)


def histograms_section(looks: Looks) -> list[str]:
    """How much more often gradients are far from zero than a Gaussian of the same variance."""
    rows = []
    for task in looks.recipes:
        cell = Look(task, 0)
        if cell not in looks:
            continue
        run = looks[cell]
        for layer, words in _shown(run).items():
            edges, above = exceeding(run, layer)
            shares = []
            for deviations in (3.0, 10.0):
                place = next((i for i, edge in enumerate(edges) if edge >= deviations), len(edges) - 1)
                shares.append(f"{above[place]:.1e} ({gaussian_exceeding(edges[place]):.0e})")
            rows.append([task, layer, words, *shares])
    return [
        "Share of a layer's gradient elements beyond so many standard deviations, over a run, and in brackets that of a "
        "Gaussian (seed 0; the nearest bin above).",
        "",
        *markdown(["task", "layer", "which", "beyond 3", "beyond 10"], rows),
    ]


def plot_histograms(path: Path, looks: Looks) -> None:
    """Draw the share of gradient elements beyond each magnitude beside a Gaussian's, a panel a task."""
    cells = [cell for cell in looks if cell.seed == 0]
    figure, axes_of = panels(len(cells))
    for axes, cell in zip(axes_of, cells, strict=True):
        run = looks[cell]
        for place, (layer, words) in enumerate(_shown(run).items()):
            edges, above = exceeding(run, layer)
            axes.plot(edges, above, label=words, **{**style(place), "markersize": 0})
        grid = [10 ** (exponent / 20) for exponent in range(-40, 41)]
        axes.plot(grid, [gaussian_exceeding(x) for x in grid], color="black", linestyle=":", label="Gaussian")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1e-2, 1e2)
        axes.set_ylim(1e-7, 1.5)
        axes.set_title(cell.task, fontsize=10)
        axes.set_xlabel("standard deviations")
        axes.grid(alpha=0.3)
    axes_of[0].set_ylabel("share of elements beyond")
    write_figure(path, figure)
