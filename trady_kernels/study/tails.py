"""Reports of how heavy the tails of stochastic gradients are: the tail index, and histograms beside a Gaussian."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from trady_kernels.selection import LayerRanking
from trady_kernels.study.gradients import BINS_PER_OCTAVE, BLOCKS, OCTAVES, Gradients, Looks, by_task
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import draw_means, panels, style, write_figure
from trady_kernels.study.statistics import Spread, held, paired_test
from trady_kernels.study.tail_index import on_known_draws, on_mixed_draws
from trady_kernels.study.verdicts import Verdict

#: Of the draws that show what the estimate is worth.
KNOWN = (1.2, 1.4, 1.6, 1.8, 2.0)
#: Deviation of the logarithm of the scale of Gaussians that are no stable law.
MIXED = 1.5
#: What TraDy reports of every network, task and epoch.
PUBLISHED = (1.3, 2.0)
#: Standard deviations of the estimate that a Gaussian's may be above 2, and below it.
_MARGIN = 3
#: Standard deviations beyond which elements are counted.
BEYOND = (3.0, 10.0)
#: Factor by which norms fall from the first to the last of the Gaussian steps that layers' steps are set beside.
FALL = 10.0


def _by_network(looks: Looks) -> dict[str, list[Gradients]]:
    networks: dict[str, list[Gradients]] = {}
    for task, runs in by_task(looks).items():
        networks.setdefault(looks.recipes[task].model, []).extend(runs)
    return networks


def tails_section(looks: Looks) -> list[str]:
    """Tables of the tail index, whether it is where TraDy finds it, and whether it is one of a stable law."""
    rows, layers = [], []
    for task, runs in by_task(looks).items():
        rows.append(
            [
                task,
                looks.recipes[task].model,
                *(spread(_all(runs, block, place), 2) for block in BLOCKS for place in (0, -1)),
                spread([100 * run.top1 for run in runs]),
            ]
        )
        if means := layer_means(runs):
            ends = (min(means, key=means.__getitem__), max(means, key=means.__getitem__))
            layers.append([task, *(text for name in ends for text in (name, f"{means[name]:.2f}"))])
    heads = ["task", "network"]
    heads += [f"{when} epoch, sums of {block}" for block in BLOCKS for when in ("first", "last")]
    return [
        "The index alpha of all gradients of an epoch (mean and standard deviation over seeds): 2 for a Gaussian, lower for "
        "heavier tails. A sum's samples are elements of one step's gradient of one parameter, in an order of chance. Samples of "
        "different size together have a lower index than each size alone: all parameters together would be such a mixture, and "
        "the channels of a single parameter are one too.",
        "",
        *markdown([*heads, "top-1"], rows),
        "",
        f"Of single layers, with sums of {BLOCKS[0]}, those whose mean over epochs and seeds is lowest and highest. In the picture, "
        "the grey band is the middle half of the layers of all seeds.",
        "",
        *markdown(["task", "lowest", "alpha", "highest", "alpha"], layers),
        "",
        *_verdicts(looks),
        "",
        *_estimator(),
    ]


def _all(runs: Sequence[Gradients], block: int, epoch: int) -> list[float]:
    return [alpha for run in runs if (alpha := run.alphas[str(block)][epoch]) is not None]


def _finite(alphas: Iterable[float | None]) -> list[float]:
    return [alpha for alpha in alphas if alpha is not None]


def layer_means(runs: Sequence[Gradients]) -> dict[str, float]:
    """The mean index over epochs and runs of every layer with gradients other than zero; one that is not finite counts as 2."""
    return {
        name: statistics.fmean(
            2.0 if alpha is None else alpha for run in runs for alpha in run.layer_alphas[name]
        )
        for name in runs[0].layer_alphas
        if any(run.deviations.get(name) for run in runs)
    }


def _allowed(block: int) -> float:
    """How far from 2 a Gaussian's estimate may be."""
    return _MARGIN * on_known_draws(2.0, block).deviation


def _verdicts(looks: Looks) -> list[str]:
    low, high = PUBLISHED
    allowed = ", ".join(f"{_allowed(block):.2f} with sums of {block}" for block in BLOCKS)
    lines = [
        f"In the verdicts, {_MARGIN} standard deviations of the estimate are allowed above {high:g} ({allowed}). An alpha-stable "
        "variable has one alpha for sums of every length, which the last verdicts are on, by a paired t-test over runs."
    ]
    networks = _by_network(looks)
    for network, runs in networks.items():
        for block in BLOCKS:
            alphas = [alpha for run in runs for alpha in run.alphas[str(block)]]
            claim = f"the gradients' tail index is between {low:g} and {high:g} (TraDy)"
            lines += ["", Verdict.of(claim, f"{network}, sums of {block}", *in_published(alphas, block))]
    for network, runs in networks.items():
        if found := _stable(runs):
            claim = "the gradients are alpha-stable: sums of every length give one index (TraDy)"
            lines += ["", Verdict.of(claim, network, *found)]
    return lines


def in_published(alphas: Sequence[float | None], block: int) -> tuple[str, str]:
    """Whether the indices of runs and epochs are in TraDy's range; None is an estimate that is infinite, which is not.

    Returns:
        The verdict, and what was found.
    """
    low, high = PUBLISHED[0], PUBLISHED[1] + _allowed(block)
    inside = sum(alpha is not None and low <= alpha <= high for alpha in alphas)
    finite = _finite(alphas)
    values = f", with indices from {min(finite):.2f} to {max(finite):.2f}" if finite else ""
    return held(inside, len(alphas)), f"in {inside} of {len(alphas)} epochs of all runs{values}"


def _stable(runs: Sequence[Gradients]) -> tuple[str, str] | None:
    """Whether the first and the last of ``BLOCKS`` give runs the same index; None where no run has both."""
    short, long = (
        {
            place: statistics.fmean(alphas)
            for place, run in enumerate(runs)
            if (alphas := _finite(run.alphas[str(block)]))
        }
        for block in (BLOCKS[0], BLOCKS[-1])
    )
    if not set(short) & set(long):
        return None
    test = paired_test(long, short)
    verdict = "does not hold" if test.significant else "not refuted at the level of 5%"
    return (
        verdict,
        f"sums of {BLOCKS[-1]} give {test.words} against sums of {BLOCKS[0]}, more in {test.wins} of {test.pairs} runs",
    )


def _estimator() -> list[str]:
    """What the estimate is worth: on draws of a known index, and on draws that have none."""
    rows = []
    for alpha in KNOWN:
        found = [on_known_draws(alpha, block) for block in BLOCKS]
        cells = [text for spread in found for text in (_words(spread), f"{spread.mean - alpha:+.3f}")]
        rows.append([f"alpha-stable, {alpha:g}", *cells])
    mixed = [text for block in BLOCKS for text in (_words(on_mixed_draws(MIXED, block)), "")]
    rows.append(["Gaussians of lognormal scale", *mixed])
    return [
        "What the estimate gives of ten times 64,000 draws, and its bias: of symmetric alpha-stable ones (scipy's `levy_stable`), "
        f"and of Gaussians whose standard deviation is drawn too, lognormal with {MIXED:g} for the deviation of its logarithm. "
        "These have all moments finite, so that they follow no stable law: their index rises with the length of the sums, "
        "towards 2. An index below 2 shows tails heavier than a Gaussian's, and by itself neither a stable law nor an infinite "
        "variance.",
        "",
        *markdown(["draws", *(text for block in BLOCKS for text in (f"sums of {block}", "bias"))], rows),
    ]


def _words(spread: Spread) -> str:
    return f"{spread.mean:.3f} ± {spread.deviation:.3f}"


def plot_tails(path: Path, looks: Looks) -> None:
    """Draw the tail index by epoch, all gradients and the middle half of the layers, a panel a task, on one scale."""
    found = by_task(looks)
    figure, axes_of = panels(len(found))
    for axes, (task, runs) in zip(axes_of, found.items(), strict=True):
        epochs = range(1, 1 + len(runs[0].alphas[str(BLOCKS[0])]))
        for place, block in enumerate(BLOCKS):
            points = {float(epoch): _all(runs, block, epoch - 1) for epoch in epochs}
            draw_means(axes, points, label=f"all, sums of {block}", **style(place))
        of_layers = [
            _finite(alphas[epoch - 1] for run in runs for alphas in run.layer_alphas.values())
            for epoch in epochs
        ]
        low, high = ([_quantile(alphas, share) for alphas in of_layers] for share in (0.25, 0.75))
        band = f"middle layers, sums of {BLOCKS[0]}"
        axes.fill_between(list(epochs), low, high, alpha=0.2, color="grey", label=band)
        axes.axhline(2.0, color="black", linewidth=0.8, linestyle=":", label="Gaussian")
        axes.axhline(PUBLISHED[0], color="black", linewidth=0.8, linestyle="--", label="TraDy's lowest")
        axes.set_title(task)
        axes.set_xlabel("epoch")
        axes.set_ylabel("tail index alpha")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in axes_of[1:]:
        axes.sharey(axes_of[0])
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


@functools.lru_cache
def falling_exceeding(deviations: float) -> float:
    """The same of Gaussian steps taken together, whose norm falls ``FALL``-fold."""
    return statistics.fmean(gaussian_exceeding(deviations * factor) for factor in _falling())


def falling_density(deviations: float) -> float:
    """Density of the magnitude of such steps' samples."""
    return statistics.fmean(factor * gaussian_density(deviations * factor) for factor in _falling())


@functools.lru_cache
def _falling(steps: int = 1000) -> list[float]:
    """The deviation of all steps over each one's, where norms fall evenly by their logarithm."""
    scales = [FALL ** -(step / (steps - 1)) for step in range(steps)]
    whole = math.sqrt(statistics.fmean(scale**2 for scale in scales))
    return [whole / scale for scale in scales]


def _of_first_seed(looks: Looks) -> dict[str, Gradients]:
    """Each task's first run that has finished."""
    return {task: runs[0] for task, runs in by_task(looks).items()}


def _shown(run: Gradients) -> dict[str, str]:
    """Layers to tell of, and what they are: the first, the last, those of the highest and the lowest index."""
    indices = layer_means([run])
    names = list(indices)
    return {
        names[0]: "first layer",
        names[-1]: "last layer",
        max(indices, key=indices.__getitem__): "highest index",
        min(indices, key=indices.__getitem__): "lowest index",
    }


def histograms_section(looks: Looks) -> list[str]:
    """How much more often gradients are far from zero than a Gaussian of the same variance."""
    rows = []
    for task, run in _of_first_seed(looks).items():
        indices = layer_means([run])
        for layer, words in _shown(run).items():
            shares = (share_beyond(run, layer, deviations) for deviations in BEYOND)
            rows.append([task, layer, words, f"{indices[layer]:.2f}", *(f"{share:.1e}" for share in shares)])
    for words, exceeds in (
        ("Gaussian", gaussian_exceeding),
        (f"Gaussian steps, norm falling {FALL:g}-fold", falling_exceeding),
    ):
        rows.append([words, "", "", "", *(f"{exceeds(deviations):.1e}" for deviations in BEYOND)])
    return [
        "Share of a layer's gradient elements further than so many standard deviations from zero, over a run of each task "
        f"(the first seed), beside the layer's index alpha (mean over epochs, sums of {BLOCKS[0]}). In the picture, densities of "
        "all layers (grey), and of the layers in the table.",
        "",
        "The elements of all steps of a run are counted together. Even Gaussian steps, where their norm falls "
        f"{FALL:g}-fold from the first to the last, thus have {falling_exceeding(BEYOND[0]):.1e} beyond {BEYOND[0]:g} standard "
        "deviations, and a few steps of much larger norm give more. The index takes none of that for heavy tails, as all "
        "elements of a sum are of one step; the verdict is on it.",
        "",
        *markdown(["task", "layer", "which", "alpha", *(f"beyond {d:g}" for d in BEYOND)], rows),
        *_agreement(looks),
        *_heavier(looks),
    ]


def _agreement(looks: Looks) -> list[str]:
    """How the layers' indices go with their shares, by rank, in every task."""
    ranges = []
    for deviations in BEYOND:
        found = []
        for run in _of_first_seed(looks).values():
            indices = layer_means([run])
            shares = {name: share_beyond(run, name, deviations) for name in indices}
            if len(indices) > 2:
                found.append(LayerRanking(indices).agreement(shares))
        found = [value for value in found if not math.isnan(value)]
        if not found:
            return []
        ranges.append(f"{min(found):+.2f} to {max(found):+.2f} beyond {deviations:g}")
    return [
        "",
        f"Spearman's correlation of index and share over the layers of a task: {', '.join(ranges)} standard deviations; below zero where layers of a low index have more elements there.",
    ]


def _heavier(looks: Looks) -> list[str]:
    """Verdicts: in how many layers of each network tails are heavier than a Gaussian's."""
    counts: dict[str, list[bool]] = {}
    for task, run in _of_first_seed(looks).items():
        counts.setdefault(looks.recipes[task].model, []).extend(
            alpha < 2 - _allowed(BLOCKS[0]) for alpha in layer_means([run]).values()
        )
    lines = []
    for network, heavier in counts.items():
        found = (
            f"in {sum(heavier)} of {len(heavier)} layers of its tasks the index is below 2 by more than {_MARGIN} standard "
            f"deviations of the estimate, {_allowed(BLOCKS[0]):.2f}"
        )
        claim = "gradients have heavier tails than a Gaussian (TraDy)"
        lines += ["", Verdict.of(claim, network, held(sum(heavier), len(heavier)), found)]
    return lines


def plot_histograms(path: Path, looks: Looks) -> None:
    """Draw the density of gradient elements' magnitudes, layer by layer, beside a Gaussian's, a panel a task."""
    runs = _of_first_seed(looks)
    figure, axes_of = panels(len(runs))
    grid = [10 ** (exponent / 20) for exponent in range(-40, 41)]
    for axes, (task, run) in zip(axes_of, runs.items(), strict=True):
        for layer in run.histograms:
            if run.deviations.get(layer):
                axes.plot(*density(run, layer), color="lightgrey", linewidth=0.5, zorder=0)
        for place, (layer, words) in enumerate(_shown(run).items()):
            axes.plot(*density(run, layer), label=words, **{**style(place), "markersize": 0})
        for words, line, of in (
            ("Gaussian", ":", gaussian_density),
            (f"Gaussian falling {FALL:g}-fold", "--", falling_density),
        ):
            axes.plot(
                grid, [of(x) for x in grid], color="black", linewidth=1, linestyle=line, label=words, zorder=3
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1e-2, 1e2)
        axes.set_ylim(1e-8, 1e2)
        axes.set_title(task)
        axes.set_xlabel("magnitude (deviations)")
        axes.set_ylabel("density")
        axes.grid(alpha=0.3)
    write_figure(path, figure)
