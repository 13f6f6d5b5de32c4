"""Reports of how heavy the tails of stochastic gradients are: the tail index, and histograms beside a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from trady_kernels.study.gradients import BINS_PER_OCTAVE, BLOCKS, OCTAVES, Gradients, Looks, finished
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import draw_means, panels, style, write_figure
from trady_kernels.study.tail_index import on_known_draws

#: Of the draws that show what the estimate is worth.
KNOWN = (1.2, 1.4, 1.6, 1.8, 2.0)
#: What TraDy reports of every network, task and epoch.
PUBLISHED = (1.3, 2.0)
#: Standard deviations of the estimate that a Gaussian's may be above 2.
_MARGIN = 3
#: Standard deviations beyond which elements are counted.
BEYOND = (3.0, 10.0)


def tails_section(looks: Looks) -> list[str]:
    """Tables of the tail index, and whether it is where TraDy finds it."""
    found = finished(looks)
    rows = []
    for task in looks.recipes:
        runs = [run for cell, run in found.items() if cell.task == task]
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
                f"{min(layers):.2f} to {max(layers):.2f}" if layers else "",
                spread([100 * run.top1 for run in runs]),
            ]
        )
    heads = ["task", *(f"{when} epoch, sums of {block}" for block in BLOCKS for when in ("first", "last"))]
    return [
        "The index alpha of all gradients of an epoch (mean and standard deviation over seeds), 2 for a Gaussian; of single "
        "layers the range over epochs and seeds, with sums of 16. A sum's samples are elements of one step's gradient of one "
        "parameter, in an order of chance. Drawn from all parameters together, whose gradients are of different size, they "
        "would be a mixture, whose index is lower.",
        "",
        *markdown([*heads, "single layers", "top-1"], rows),
        "",
        _verdict([alpha for run in found.values() for alpha in run.alphas[str(BLOCKS[0])]]),
        "",
        *_estimator(),
    ]


def _verdict(alphas: Sequence[float | None]) -> str:
    """Of runs and epochs; None is an estimate that is infinite, which is outside."""
    low, high = PUBLISHED
    above = _MARGIN * on_known_draws(high, BLOCKS[0]).deviation
    inside = sum(alpha is not None and low <= alpha <= high + above for alpha in alphas)
    verdict = "holds" if inside == len(alphas) else "does not hold" if not inside else "holds in part"
    finite = [alpha for alpha in alphas if alpha is not None]
    values = f", which are from {min(finite):.2f} to {max(finite):.2f}" if finite else ""
    return (
        f"*The gradients' tail index is between {low:g} and {high:g} (TraDy)*: {verdict}, in {inside} of {len(alphas)} runs and "
        f"epochs{values} with sums of {BLOCKS[0]} ({_MARGIN} standard deviations of the estimate, {above:.2f}, are allowed above "
        f"{high:g})."
    )


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
    found = finished(looks)
    tasks = list(dict.fromkeys(cell.task for cell in found))
    figure, axes_of = panels(len(tasks))
    for axes, task in zip(axes_of, tasks, strict=True):
        runs = [run for cell, run in found.items() if cell.task == task]
        epochs = range(1, 1 + len(runs[0].alphas[str(BLOCKS[0])]))
        for place, block in enumerate(BLOCKS):
            points = {float(epoch): _all(runs, block, epoch - 1) for epoch in epochs}
            draw_means(axes, points, label=f"all, sums of {block}", **style(place))
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
        axes.set_title(task)
        axes.set_xlabel("epoch")
        axes.set_ylabel("tail index alpha")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    write_figure(path, figure)


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values).quantile(share)) if values else math.nan


def exceeding(run: Gradients, layer: str) -> tuple[list[float], list[float]]:
    """Magnitudes in standard deviations, and the share of a layer's gradient elements above each."""
    counts = torch.tensor(run.histograms[layer], dtype=torch.float64)
    above = counts.flip(0).cumsum(0).flip(0) / run.elements[layer]
    return _edges(run, layer), above.tolist()


def _edges(run: Gradients, layer: str) -> list[float]:
    """Lower ends of the bins, in standard deviations."""
    return [
        2.0 ** (OCTAVES[0] + place / BINS_PER_OCTAVE) / run.deviations[layer]
        for place in range(len(run.histograms[layer]))
    ]


def share_beyond(run: Gradients, layer: str, deviations: float) -> float:
    """Share of a layer's gradient elements further from zero than that, between two edges as if evenly spread by logarithm."""
    edges, above = exceeding(run, layer)
    place = sum(edge <= deviations for edge in edges) - 1
    if place < 0:
        return above[0]
    here, after = above[place], above[place + 1] if place + 1 < len(above) else 0.0
    passed = math.log2(deviations / edges[place]) * BINS_PER_OCTAVE
    return here + (after - here) * min(passed, 1.0)


def density(run: Gradients, layer: str) -> tuple[list[float], list[float]]:
    """Middles of the bins that have elements, in standard deviations, and the density of magnitudes there."""
    edges, width = _edges(run, layer), 2 ** (1 / BINS_PER_OCTAVE)
    points = [
        (edge * width**0.5, count / run.elements[layer] / (edge * (width - 1)))
        for edge, count in zip(edges, run.histograms[layer], strict=True)
        if count
    ]
    return [middle for middle, _ in points], [value for _, value in points]


def gaussian_exceeding(deviations: float) -> float:
    """Share of a Gaussian's samples that are further from zero than so many standard deviations."""
    return math.erfc(deviations / math.sqrt(2))


def gaussian_density(deviations: float) -> float:
    """Density of the magnitude of a Gaussian's samples."""
    return math.sqrt(2 / math.pi) * math.exp(-(deviations**2) / 2)


def _shown(run: Gradients) -> dict[str, str]:
    """Layers to tell of, and what they are: the first, the last, those of the lightest and the heaviest tails."""
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


def _of_first_seed(looks: Looks) -> dict[str, Gradients]:
    return {cell.task: run for cell, run in finished(looks).items() if cell.seed == 0}


def histograms_section(looks: Looks) -> list[str]:
    """How much more often gradients are far from zero than a Gaussian of the same variance."""
    rows = []
    layers = heavier = 0
    for task, run in _of_first_seed(looks).items():
        for layer, words in _shown(run).items():
            rows.append([task, layer, words, *(f"{share_beyond(run, layer, d):.1e}" for d in BEYOND)])
        named = [name for name, deviation in run.deviations.items() if deviation]
        layers += len(named)
        heavier += sum(share_beyond(run, name, BEYOND[0]) > gaussian_exceeding(BEYOND[0]) for name in named)
    rows.append(["Gaussian", "", "", *(f"{gaussian_exceeding(d):.1e}" for d in BEYOND)])
    verdict = "holds" if heavier == layers else "holds in part" if heavier else "does not hold"
    return [
        "Share of a layer's gradient elements further than so many standard deviations from zero, over a run (seed 0). In the "
        "picture, densities of all layers (grey), and of the layers in the table.",
        "",
        *markdown(["task", "layer", "which", *(f"beyond {deviations:g}" for deviations in BEYOND)], rows),
        "",
        f"*Gradients have heavier tails than a Gaussian (TraDy)*: {verdict}, in {heavier} of {layers} layers of all tasks more of "
        f"them are beyond {BEYOND[0]:g} standard deviations.",
    ]


def plot_histograms(path: Path, looks: Looks) -> None:
    """Draw the density of gradient elements' magnitudes, layer by layer, beside a Gaussian's, a panel a task."""
    runs = _of_first_seed(looks)
    figure, axes_of = panels(len(runs))
    for axes, (task, run) in zip(axes_of, runs.items(), strict=True):
        for layer in run.histograms:
            if run.deviations.get(layer):
                axes.plot(*density(run, layer), color="lightgrey", linewidth=0.5, zorder=0)
        for place, (layer, words) in enumerate(_shown(run).items()):
            axes.plot(*density(run, layer), label=words, **{**style(place), "markersize": 0})
        grid = [10 ** (exponent / 20) for exponent in range(-40, 41)]
        axes.plot(
            grid,
            [gaussian_density(x) for x in grid],
            color="black",
            linestyle=":",
            label="Gaussian",
            zorder=3,
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1e-2, 1e2)
        axes.set_ylim(1e-8, 1e2)
        axes.set_title(task)
        axes.set_xlabel("magnitude (standard deviations)")
        axes.set_ylabel("density")
        axes.grid(alpha=0.3)
    write_figure(path, figure)
