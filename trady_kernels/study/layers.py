"""Studies of single layers: how many of a ranking to draw from, and what training or freezing one alone does."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady_kernels.selection import LayerRanking
from trady_kernels.selection.ranking import METRICS
from trady_kernels.study.cells import Listed
from trady_kernels.study.markdown import counted, markdown, spread
from trady_kernels.study.matrix import FACTORS, rounded
from trady_kernels.study.plot import LETTERS, panels, style, write_figure
from trady_kernels.study.results import (
    FULL,
    SMALLEST_BUDGET,
    Request,
    Size,
    middle_rate,
    study_recipes,
)
from trady_kernels.study.statistics import held, p_words, paired_test, verdict
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, listed, top1_words
from trady_kernels.study.verdicts import Verdict
from trady_kernels.training.regimes import find_ranking
from trady_kernels.training.settings import Settings

#: Inside a pool: channels by chance, or those with most gradient for what they cost.
INSIDE = {"trady": "random", "d-det-rgn": "deterministic"}
#: Rate of each, as a multiple of the middle one of the results table: settings of ours, no part of a claim. The oracle learns
#: on images best at the lowest of those that the table tries (docs/results.md).
_FACTORS = {"trady": 1.0, "d-det-rgn": FACTORS[0]}
#: Layers of a pool, as shares of all layers; beside them the pool of the paper, the first layers that hold so much of the RGN.
POOLS, PUBLISHED_POOL = (1 / 8, 1 / 4, 1 / 2, 1.0), 0.97

_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 64, "test_samples": 100, "epochs": 1, "warmup_epochs": 0.1}),
    "usual": Size(3, {"train_samples": 500, "epochs": 3}),
    "full": Size(3, FULL),
}
_ABLATION_SIZES = {**_SIZES, "usual": Size(2, _SIZES["usual"].settings)}
#: Every how manieth layer is looked at alone.
_EVERY: Mapping[str, int] = {"quick": 12, "usual": 1, "full": 1}
#: One task of images and one of texts, each with its network.
_USUAL, _QUICK = ("mnist", "tweets"), ("digits",)


def _recipes(request: Request, sizes: Mapping[str, Size]) -> dict[str, Settings]:
    return study_recipes(request, _QUICK if request.size == "quick" else _USUAL, sizes)


def rankings_of(recipe: Settings) -> dict[str, LayerRanking]:
    """Rankings of a network by their metric: the one of the settings, or those that ship.

    Raises:
        OSError, ValueError: the settings' file is no ranking, or there is none.
    """
    given = {metric: find_ranking(recipe.ranking, recipe.model, metric) for metric in METRICS}
    found = {ranking.metric: ranking for ranking in given.values() if ranking is not None}
    if not found:
        raise ValueError(
            f"ranking: got none for {recipe.model}, expected a file: trady rank --model {recipe.model}"
        )
    return found


def published_count(rankings: Mapping[str, LayerRanking]) -> int:
    """How many layers the pool of the paper has."""
    shares = held_by(next(iter(rankings.values())))
    return 1 + next(place for place, share in enumerate(shares) if share >= PUBLISHED_POOL)


def counts_of(rankings: Mapping[str, LayerRanking]) -> list[int]:
    """How many layers the pools of a network have."""
    layers = len(next(iter(rankings.values())))
    return sorted({published_count(rankings), *(max(round(share * layers), 1) for share in POOLS)})


def _pool(rankings: Mapping[str, LayerRanking], count: int, metric: str) -> str:
    """All layers are the same pool by every metric."""
    return f"{count} layers by {metric if count < counts_of(rankings)[-1] else next(iter(rankings))}"


def pool_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs of the study of pools, random channels and the oracle each at a rate of their own.

    Raises:
        ValueError: no such size or task, or a network without a ranking.
    """
    recipes = _recipes(request, _SIZES)
    cells = [
        Training(
            task,
            scheme,
            SMALLEST_BUDGET,
            rounded(middle_rate(recipe) * _FACTORS[scheme]),
            seed,
            held_out=False,
            pool=_pool(rankings, count, metric),
        )
        for seed in range(_SIZES[request.size].seeds)
        for task, recipe in recipes.items()
        for rankings in [rankings_of(recipe)]
        for count in _thinned(counts_of(rankings), request.size)
        for metric in rankings
        for scheme in INSIDE
    ]
    return listed(recipes, cells)


def _thinned(counts: list[int], size: str) -> list[int]:
    return [counts[0], counts[-1]] if size == "quick" else counts


@dataclass(frozen=True)
class _Way:
    """How the channels of some runs were chosen, but for the number of layers.

    Attributes:
        metric: of the ranking whose first layers are the pool.
        scheme: one of ``INSIDE``.
        rate: at which they train.
    """

    metric: str
    scheme: str
    rate: float


#: By the number of layers, then by seed.
_BySize = dict[int, dict[int, TrainingOutcome]]


def _pooled(cells: Trainings, task: str, rankings: Mapping[str, LayerRanking]) -> dict[_Way, _BySize]:
    """Outcomes of a task; those from all layers are by every metric."""
    found: dict[_Way, _BySize] = {}
    runs = [cell for cell in cells if cell.task == task]
    rates = sorted({cell.learning_rate for cell in runs})
    for way in (_Way(*key) for key in itertools.product(rankings, INSIDE, rates)):
        for count in counts_of(rankings):
            pool = _pool(rankings, count, way.metric)
            for cell in runs:
                if (cell.scheme, cell.learning_rate, cell.pool) == (way.scheme, way.rate, pool):
                    found.setdefault(way, {}).setdefault(count, {})[cell.seed] = cells[cell]
    return found


def held_by(ranking: LayerRanking) -> list[float]:
    """Share of the cumulative score that the first layers of a ranking hold, for 1, 2, ... of them."""
    whole, reached, shares = math.fsum(ranking.values()), 0.0, []
    for score in ranking.values():
        reached += score
        shares.append(reached / whole)
    return shares


def pool_section(cells: Trainings) -> list[str]:
    """Accuracy by the number of layers in the pool, and how much of the score they hold."""
    lines = [
        f"Top-1 at {SMALLEST_BUDGET}, mean and standard deviation over seeds, by the number K of first layers of a ranking that "
        "channels are drawn from: at random (`trady`), or those with most gradient for what they cost (`d-det-rgn`, an oracle). The "
        "learning rates are settings of ours; the papers' claims name none. A seed's runs share samples and first weights, and "
        "pools contain each other: a test over several pools is of each seed's mean over them, that of all layers once. The study "
        f"has one task of images and one of texts, {' and '.join(_USUAL)}. In the picture lines join medians; a run far below all "
        "others is an arrow with its accuracy.",
    ]
    sentences: list[str] = []
    for task, recipe in cells.recipes.items():
        rankings = rankings_of(recipe)
        found = _pooled(cells, task, rankings)
        if not found:
            continue
        counts = sorted({count for sizes in found.values() for count in sizes})
        rows = [
            [
                *(way.metric, INSIDE[way.scheme], f"{way.rate:g}"),
                *(top1_words(list(sizes.get(count, {}).values())) for count in counts),
            ]
            for way, sizes in found.items()
        ]
        lines += ["", f"{task}, {recipe.model}:", ""]
        lines += markdown(["ranking", "inside", "rate", *(f"K = {count}" for count in counts)], rows)
        sentences += _pool_verdicts(task, rankings, found)
    for model, rankings in {r.model: rankings_of(r) for r in cells.recipes.values()}.items():
        shares = held_by(next(iter(rankings.values())))
        half = 1 + next(place for place, share in enumerate(shares) if share >= 0.5)
        sentences += [
            "",
            Verdict.of(
                f"half of the cumulative {next(iter(rankings)).upper()} sits in under a quarter of the layers (TraDy)",
                model,
                held(int(half < len(shares) / 4), 1),
                f"in {half} of {len(shares)}; {PUBLISHED_POOL:.0%} sit in {published_count(rankings)}",
            ),
        ]
    return [*lines, *sentences]


#: Accuracies in percent by a pool's metric and size, then by seed.
_Pools = dict[tuple[str, int], dict[int, float]]


def _pool_verdicts(
    task: str, rankings: Mapping[str, LayerRanking], found: Mapping[_Way, _BySize]
) -> list[str]:
    """What the papers say of pools, each by a paired test over seeds."""
    first, count, whole = next(iter(rankings)), published_count(rankings), counts_of(rankings)[-1]
    rates = {scheme: sorted({way.rate for way in found if way.scheme == scheme}) for scheme in INSIDE}

    def pools(scheme: str, rate: float) -> _Pools:
        return {
            ("" if size == whole else way.metric, size): {seed: 100 * run.top1 for seed, run in runs.items()}
            for way, sizes in found.items()
            if (way.scheme, way.rate) == (scheme, rate)
            for size, runs in sizes.items()
        }

    lines = []
    for rate in rates["trady"]:
        random, where = pools("trady", rate), f"{task}, rate {rate:g}"
        lines += _verdict(
            f"Drawing from the first {count} layers, which hold {PUBLISHED_POOL:.0%} of the {first.upper()}, is better than from all "
            f"{whole} (TraDy)",
            where,
            {("", 0): random.get((first, count), {})},
            {("", 0): random.get(("", whole), {})},
        )
        for other in rates["d-det-rgn"]:
            lines += _verdict(
                "Inside a pool random channels beat those of the largest gradient (TraDy)",
                f"{where} against {other:g}",
                random,
                pools("d-det-rgn", other),
            )
        lara, rgn = (
            {("", size): runs for (metric, size), runs in random.items() if metric == wanted}
            for wanted in ("lara", "rgn")
        )
        lines += _verdict("Pools by LaRa are better than pools by RGN (MeDyate)", where, lara, rgn)
    return lines


def _verdict(claim: str, where: str, better: _Pools, worse: _Pools) -> list[str]:
    """A claim and what its test says; nothing where no pool and seed has both kinds of runs."""
    pools: dict[int, list[tuple[str, int]]] = {}
    for pool in better:
        for seed in better[pool].keys() & worse.get(pool, {}).keys():
            pools.setdefault(seed, []).append(pool)
    if not pools:
        return []
    test = paired_test(
        *(
            {seed: statistics.fmean(runs[pool][seed] for pool in of_seed) for seed, of_seed in pools.items()}
            for runs in (better, worse)
        )
    )
    pairs = sum(map(len, pools.values()))
    over = "" if pairs == len(pools) else f", means over {counted(pairs, 'pair')} of runs"
    return [
        "",
        Verdict.of(
            claim,
            where,
            test.verdict,
            f"{test.words}, {test.wins} of {counted(test.pairs, 'seed')} won{over}",
        ),
    ]


def plot_pool(path: Path, cells: Trainings) -> None:
    """Draw accuracy by the number of layers, a panel a task and way of choosing, and the score that they hold, one a network."""
    networks = {recipe.model: rankings_of(recipe) for recipe in cells.recipes.values()}
    found = {
        task: _pooled(cells, task, networks[recipe.model])
        for task, recipe in cells.recipes.items()
        if any(cell.task == task for cell in cells)
    }
    drawn = [
        (task, *way)
        for task, ways in found.items()
        for way in dict.fromkeys((w.scheme, w.rate) for w in ways)
    ]
    figure, axes_of = panels(len(drawn) + len(networks))
    for axes, (task, scheme, rate) in zip(axes_of, drawn, strict=False):
        by_metric = {
            way.metric: sizes
            for way, sizes in found[task].items()
            if (way.scheme, way.rate) == (scheme, rate)
        }
        layers = len(next(iter(networks[cells.recipes[task].model].values())))
        _draw_accuracies(axes, by_metric, layers, _limits(_top1_of(found[task])))
        several = sum(drawn_at[:2] == (task, scheme) for drawn_at in drawn) > 1
        axes.set_title(f"{task}, {INSIDE[scheme]}" + (f", rate {rate:g}" if several else ""))
    for axes, (model, rankings) in zip(axes_of[len(drawn) :], networks.items(), strict=True):
        _draw_scores(axes, rankings)
        axes.set_title(model)
    for axes in axes_of:
        axes.set_xlabel("layers K")
        axes.grid(alpha=0.3)
    write_figure(path, figure)


def _top1_of(ways: Mapping[_Way, _BySize]) -> list[float]:
    return [
        100 * run.top1 for sizes in ways.values() for by_seed in sizes.values() for run in by_seed.values()
    ]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis for some values, but for those under the lower quartile by over three times the quartiles' distance."""
    low, high = min(values), max(values)
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4)
        low = min(value for value in values if value >= lower - 3 * (upper - lower))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_accuracies(
    axes: Any, by_metric: Mapping[str, _BySize], layers: int, limits: tuple[float, float]
) -> None:
    """Lines through the medians and a dot a run; one under the foot of the axis is an arrow there, with its value."""
    for number, (metric, sizes) in enumerate(by_metric.items()):
        look = style(number)
        aside = 0.7 * (number - 1)  # the metrics' runs beside each other, but for those that they share
        runs = {
            count + aside * (count < layers): [100 * run.top1 for run in by_seed.values()]
            for count, by_seed in sizes.items()
        }
        axes.plot(list(runs), [statistics.median(values) for values in runs.values()], label=metric, **look)
        for place, value in ((place, value) for place, values in runs.items() for value in values):
            if value >= limits[0]:
                axes.plot(place, value, color=look["color"], **_RUN)
            else:
                axes.plot(place, limits[0], color=look["color"], **_RUN_BELOW)
                _note(axes, f"{value:.0f}", (place, limits[0]), look["color"])
    axes.plot([], [], color="0.4", label="a run", **_RUN)
    axes.set_ylim(*limits)
    axes.set_ylabel("top-1 accuracy (%)")


_RUN: Mapping[str, Any] = {"marker": ".", "markersize": 3, "linestyle": "", "alpha": 0.6}
_RUN_BELOW: Mapping[str, Any] = {"marker": "v", "markersize": 4, "linestyle": "", "clip_on": False}


def _note(axes: Any, text: str, place: tuple[float, float], colour: str) -> None:
    axes.annotate(text, place, (3, 2), textcoords="offset points", fontsize=LETTERS["ticks"], color=colour)


def _draw_scores(axes: Any, rankings: Mapping[str, LayerRanking]) -> None:
    for number, (metric, ranking) in enumerate(rankings.items()):
        shares = [100 * share for share in held_by(ranking)]
        axes.plot(range(1, 1 + len(shares)), shares, label=metric, **style(number) | {"marker": ""})
    axes.axhline(
        100 * PUBLISHED_POOL, color="black", linewidth=0.8, linestyle=":", label=f"{PUBLISHED_POOL:.0%}"
    )
    axes.set_ylabel("cumulative score (%)")


#: Of a correlation: with fewer its p, by Student's t, is far too small.
_FEWEST_LAYERS = 10
#: What an ablation trains: the pool of a layer by its name.
ALONE, FROZEN = "only {}", "without {}"


def ablation_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs that train one layer whole beside the head, or all but one, at the lowest rate first tried for full fine-tuning.

    In so few steps the middle one is not stable: a fifth of the runs with a frozen layer learned less than the head alone.

    Raises:
        ValueError: no such size or task, or a network without a ranking.
    """
    recipes = _recipes(request, _ABLATION_SIZES)
    cells = []
    for seed in range(_ABLATION_SIZES[request.size].seeds):
        for task, recipe in recipes.items():
            rate = rounded(middle_rate(recipe, "full") * FACTORS[0])
            cells.append(Training(task, "head-only", "", rate, seed, held_out=False))
            pools = [
                pool.format(name)
                for name in list(next(iter(rankings_of(recipe).values())))[:: _EVERY[request.size]]
                for pool in (ALONE, FROZEN)
            ]
            cells += [
                Training(task, "trady", "100%", rate, seed, held_out=False, pool=pool)
                for pool in ("100%", *pools)
            ]
    return listed(recipes, cells)


def _ablations(cells: Trainings) -> Iterator[tuple[str, float]]:
    """Tasks and the rates that they have runs of."""
    for task in cells.recipes:
        for rate in sorted({cell.learning_rate for cell in cells if cell.task == task}):
            yield task, rate


def _changes(
    cells: Trainings, task: str, rate: float, learned: bool = False
) -> dict[str, dict[str, list[float]]]:
    """By "alone" and "frozen", then by layer: points of accuracy that training it alone brings, and that freezing it costs.

    Args:
        cells: of the study.
        task, rate: which of them.
        learned: leave out the runs with a frozen layer that end below the head alone.
    """
    top1 = {
        (cell.pool or cell.scheme, cell.seed): 100 * cells[cell].top1
        for cell in cells
        if (cell.task, cell.learning_rate) == (task, rate)
    }
    changes: dict[str, dict[str, list[float]]] = {"alone": {}, "frozen": {}}
    for (pool, seed), value in top1.items():
        kind, _, name = pool.partition(" ")
        if kind == "only" and ("head-only", seed) in top1:
            changes["alone"].setdefault(name, []).append(value - top1["head-only", seed])
        elif learned and value < top1.get(("head-only", seed), 0.0):
            continue
        elif kind == "without" and ("100%", seed) in top1:
            changes["frozen"].setdefault(name, []).append(top1["100%", seed] - value)
    return changes


@dataclass(frozen=True)
class Agreement:
    """Between what layers bring, or cost when frozen, and their scores in a ranking.

    Attributes:
        kind: "alone" or "frozen".
        metric: of the ranking.
        correlation: Spearman's, of layers.
        p: of no correlation.
    """

    kind: str
    metric: str
    correlation: float
    p: float


def _agreements(
    changes: Mapping[str, Mapping[str, list[float]]], rankings: Mapping[str, LayerRanking]
) -> Iterator[Agreement]:
    """For each kind and metric, of the layers that have a run of every seed.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import spearmanr

    for kind, by_layer in changes.items():
        # A layer of one seed beside means of two would be compared by the seed.
        seeds = max(map(len, by_layer.values()), default=0)
        complete = {name: found for name, found in by_layer.items() if len(found) == seeds}
        for metric, scores in rankings.items():
            pairs = [(scores[name], statistics.fmean(found)) for name, found in complete.items()]
            if len(pairs) >= _FEWEST_LAYERS and len({brought for _, brought in pairs}) > 1:
                test = spearmanr(*zip(*pairs, strict=True))
                yield Agreement(kind, metric, float(test.statistic), float(test.pvalue))


def ablation_section(cells: Trainings) -> list[str]:
    """What each layer brings alone and costs when frozen, beside its scores in the rankings."""
    lines = [
        "Points of top-1 that training one layer beside the head adds to the head alone, and that freezing one layer takes from "
        "training all: all of the layer's channels, mean and standard deviation over seeds. The study takes the lowest of the rates "
        "first tried for full fine-tuning. "
        "Scores are shares of the ranking's sum, in percent; layers in the order of the first. The study has one task of images and "
        f"one of texts, {' and '.join(_USUAL)}.",
    ]
    sentences: list[str] = []
    for task, rate in _ablations(cells):
        recipe = cells.recipes[task]
        changes, rankings = _changes(cells, task, rate), rankings_of(recipe)
        sums = {metric: math.fsum(ranking.values()) for metric, ranking in rankings.items()}
        rows = [
            [
                name,
                *(f"{100 * ranking[name] / sums[metric]:.2f}" for metric, ranking in rankings.items()),
                *(spread(changes[kind].get(name, [])) for kind in ("alone", "frozen")),
            ]
            for name in next(iter(rankings.values()))
            if any(name in by_layer for by_layer in changes.values())
        ]
        lines += ["", f"{task}, {recipe.model}, rate {rate:g}:", ""]
        lines += markdown(["layer", *rankings, "alone", "frozen costs"], rows)
        for kind, words in (("alone", "brings alone"), ("frozen", "costs when frozen")):
            found = [agreement for agreement in _agreements(changes, rankings) if agreement.kind == kind]
            if found:
                sentences += [
                    "",
                    Verdict.of(
                        f"a layer's score tells what it {words} (TraDy)",
                        f"{task}, rate {rate:g}",
                        verdict(found[0].p, found[0].correlation),
                        f"Spearman's correlation of layers is {_correlations(found)}",
                    ),
                ]
        sentences += _unstable(cells, task, rate, rankings)
    return [*lines, *sentences]


def _correlations(found: Iterable[Agreement]) -> str:
    return ", ".join(f"{a.correlation:.2f} by {a.metric} ({p_words(a.p)})" for a in found)


def _unstable(cells: Trainings, task: str, rate: float, rankings: Mapping[str, LayerRanking]) -> list[str]:
    """How many runs learned less than the head alone does, and what is found without them."""
    counts = []
    for learned in (False, True):
        changes = _changes(cells, task, rate, learned)
        counts.append(sum(map(len, changes["frozen"].values())))
    if counts[0] == counts[1]:
        return []
    found = [agreement for agreement in _agreements(changes, rankings) if agreement.kind == "frozen"]
    return [
        "",
        f"{task}, rate {rate:g}: {counts[0] - counts[1]} of {counts[0]} runs with a frozen layer end below the head alone. At this "
        "rate training all layers is not stable, and what freezing one costs is chance"
        + (
            f"; of the layers without such a run the correlation is {_correlations(found)}." if found else "."
        ),
    ]


def plot_ablation(path: Path, cells: Trainings) -> None:
    """Draw what layers bring against their places in the first ranking, a panel a task and kind."""
    ablations = list(_ablations(cells))
    figure, axes_of = panels(2 * len(ablations))
    for place, (task, rate) in enumerate(ablations):
        metric, ranking = next(iter(rankings_of(cells.recipes[task]).items()))
        order = list(ranking)
        for number, (kind, by_layer) in enumerate(_changes(cells, task, rate).items()):
            axes = axes_of[2 * place + number]
            names = sorted(by_layer, key=order.index)
            axes.bar(
                [1 + order.index(name) for name in names],
                [statistics.fmean(by_layer[name]) for name in names],
                yerr=[statistics.stdev(b) if len(b := by_layer[name]) > 1 else 0.0 for name in names],
                error_kw={"linewidth": 0.5},
                color=style(number)["color"],
            )
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(f"{task}, rate {rate:g}")
            axes.set_xlabel(f"layer's place by {metric}")
            axes.set_ylabel("points gained alone" if kind == "alone" else "points lost when frozen")
            axes.grid(alpha=0.3, axis="y")
    write_figure(path, figure)
