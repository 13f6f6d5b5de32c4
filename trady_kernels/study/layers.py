"""Studies of single layers: how many of a ranking to draw from, and what training or freezing one alone does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady_kernels.selection import LayerRanking
from trady_kernels.selection.ranking import METRICS
from trady_kernels.study.cells import Listed
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.matrix import FACTORS, rounded
from trady_kernels.study.plot import draw_means, panels, style, write_figure
from trady_kernels.study.results import FULL, Request, Size, middle_rate, study_recipes
from trady_kernels.study.statistics import p_words, paired_test, verdict
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, listed, top1_words
from trady_kernels.training.regimes import find_ranking
from trady_kernels.training.settings import Settings

#: Inside a pool: channels by chance, or those with most gradient for what they cost.
INSIDE = {"trady": "random", "d-det-rgn": "deterministic"}
#: Rate of each, as a multiple of the middle one of the results table, which finds the lowest of those tried best for the
#: oracle (docs/results.md).
_FACTORS = {"trady": 1.0, "d-det-rgn": FACTORS[0]}
BUDGET = "2.2%"
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
#: One task a network.
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
    """The runs of the study of pools, at the rate that the results table found for random channels, and for the oracle.

    Raises:
        ValueError: no such size or task, or a network without a ranking.
    """
    recipes = _recipes(request, _SIZES)
    cells = [
        _training(
            task,
            recipe,
            scheme,
            BUDGET,
            rounded(middle_rate(recipe) * _FACTORS[scheme]),
            seed,
            _pool(rankings, count, metric),
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


def _training(
    task: str, recipe: Settings, scheme: str, budget: str, rate: float, seed: int, pool: str
) -> Training:
    return Training(task, scheme, budget, rate, seed, False, "epoch", pool)


#: By metric and scheme, then by the number of layers.
Pooled = dict[tuple[str, str], dict[int, list[TrainingOutcome]]]


def _pooled(cells: Trainings, task: str, rankings: Mapping[str, LayerRanking]) -> Pooled:
    """Outcomes of a task, seed by seed."""
    found: Pooled = {}
    outcomes: dict[tuple[str, str], list[TrainingOutcome]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):  # runs end in any order
        if cell.task == task:
            outcomes.setdefault((cell.scheme, cell.pool), []).append(cells[cell])
    for metric in rankings:
        for scheme in INSIDE:
            by_count = {
                count: outcomes[key]
                for count in counts_of(rankings)
                if (key := (scheme, _pool(rankings, count, metric))) in outcomes
            }
            if by_count:
                found[metric, scheme] = by_count
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
        f"Top-1 at {BUDGET}, mean and standard deviation over seeds, by how many first layers of a ranking channels are drawn "
        "from: at random (`trady`), or those with most gradient for what they cost (`d-det-rgn`, an oracle).",
    ]
    sentences: list[str] = []
    for task, recipe in cells.recipes.items():
        rankings = rankings_of(recipe)
        found = _pooled(cells, task, rankings)
        counts = sorted({count for by_count in found.values() for count in by_count})
        rows = [
            [metric, INSIDE[scheme], *(top1_words(by_count.get(count, [])) for count in counts)]
            for (metric, scheme), by_count in found.items()
        ]
        lines += ["", f"{task}, {recipe.model}:", ""]
        lines += markdown(["ranking", "inside", *(f"K = {count}" for count in counts)], rows)
        sentences += _pool_verdicts(task, rankings, found)
    for model, rankings in {r.model: rankings_of(r) for r in cells.recipes.values()}.items():
        shares = held_by(next(iter(rankings.values())))
        half = 1 + next(place for place, share in enumerate(shares) if share >= 0.5)
        held = "holds" if half < len(shares) / 4 else "does not hold"
        sentences += [
            "",
            f"*Half of the cumulative {next(iter(rankings)).upper()} sits in under a quarter of the layers (TraDy)*, {model}: "
            f"{held}, in {half} of {len(shares)}; {PUBLISHED_POOL:.0%} sit in {published_count(rankings)}.",
        ]
    return [*lines, *sentences]


def _pool_verdicts(task: str, rankings: Mapping[str, LayerRanking], found: Pooled) -> list[str]:
    """What the papers say of pools, each by a paired test over seeds, and over pools where they do not matter."""
    first, count, whole = next(iter(rankings)), published_count(rankings), counts_of(rankings)[-1]
    random = {metric: found.get((metric, "trady"), {}) for metric in rankings}
    picked = {metric: found.get((metric, "d-det-rgn"), {}) for metric in rankings}
    compared = [
        (
            f"Drawing from the first {count} layers, which hold {PUBLISHED_POOL:.0%} of the {first.upper()}, is better than from all "
            f"{whole} (TraDy)",
            _by_seed({"": random[first].get(count, [])}),
            _by_seed({"": random[first].get(whole, [])}),
        ),
        (
            "Inside a pool random channels beat those of the largest gradient (TraDy), which learn at a third of the rate",
            _by_seed({(m, k): runs for m, by_count in random.items() for k, runs in by_count.items()}),
            _by_seed({(m, k): runs for m, by_count in picked.items() for k, runs in by_count.items()}),
        ),
        (
            "Pools by LaRa are better than pools by RGN (MeDyate)",
            _by_seed({k: runs for k, runs in random.get("lara", {}).items() if k != whole}),
            _by_seed({k: runs for k, runs in random.get("rgn", {}).items() if k != whole}),
        ),
    ]
    lines = []
    for sentence, better, worse in compared:
        if better.keys() & worse.keys():
            test = paired_test(better, worse)
            lines += [
                "",
                f"*{sentence}*, {task}: {test.verdict}, {test.words}, {test.wins} of {test.pairs} won.",
            ]
    return lines


def _by_seed(runs: Mapping[Any, Sequence[TrainingOutcome]]) -> dict[Any, float]:
    return {
        (key, seed): 100 * outcome.top1
        for key, outcomes in runs.items()
        for seed, outcome in enumerate(outcomes)
    }


def plot_pool(path: Path, cells: Trainings) -> None:
    """Draw accuracy by the number of layers, a panel a task, and the score that they hold, a panel a network."""
    networks = {recipe.model: rankings_of(recipe) for recipe in cells.recipes.values()}
    figure, axes_of = panels(len(cells.recipes) + len(networks))
    for axes, (task, recipe) in zip(axes_of, cells.recipes.items(), strict=False):
        for place, ((metric, scheme), by_count) in enumerate(
            _pooled(cells, task, networks[recipe.model]).items()
        ):
            points = {float(count): [100 * o.top1 for o in runs] for count, runs in by_count.items()}
            draw_means(axes, points, label=f"{metric}, {INSIDE[scheme]}", **style(place))
        axes.set_title(task)
        axes.set_ylabel("top-1 accuracy (%)")
    for axes, (model, rankings) in zip(axes_of[len(cells.recipes) :], networks.items(), strict=True):
        for place, (metric, ranking) in enumerate(rankings.items()):
            shares = held_by(ranking)
            look = style(place) | {"marker": "", "linestyle": ("-", "--", ":")[place]}
            axes.plot(range(1, 1 + len(shares)), [100 * s for s in shares], label=f"score, {metric}", **look)
        axes.axhline(100 * PUBLISHED_POOL, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(model)
        axes.set_ylabel("cumulative score (%)")
    for axes in axes_of:
        axes.set_xlabel("layers K")
        axes.grid(alpha=0.3)
    write_figure(path, figure)


#: What an ablation trains: the pool of a layer by its name.
ALONE, FROZEN = "only {}", "without {}"


def ablation_plan(request: Request) -> Listed[Training, TrainingOutcome]:
    """The runs that train one layer whole beside the head, or all but one, at the rate of full fine-tuning.

    Raises:
        ValueError: no such size or task, or a network without a ranking.
    """
    recipes = _recipes(request, _ABLATION_SIZES)
    cells = []
    for seed in range(_ABLATION_SIZES[request.size].seeds):
        for task, recipe in recipes.items():
            rate = middle_rate(recipe, "full")
            cells.append(_training(task, recipe, "head-only", "", rate, seed, ""))
            pools = [
                pool.format(name)
                for name in list(next(iter(rankings_of(recipe).values())))[:: _EVERY[request.size]]
                for pool in (ALONE, FROZEN)
            ]
            cells += [_training(task, recipe, "trady", "100%", rate, seed, pool) for pool in ("100%", *pools)]
    return listed(recipes, cells)


def _changes(cells: Trainings, task: str) -> dict[str, dict[str, list[float]]]:
    """By "alone" and "frozen", then by layer: points of accuracy that training it alone brings, and that freezing it costs."""
    top1 = {
        (cell.pool or cell.scheme, cell.seed): 100 * cells[cell].top1 for cell in cells if cell.task == task
    }
    changes: dict[str, dict[str, list[float]]] = {"alone": {}, "frozen": {}}
    for (pool, seed), value in top1.items():
        kind, _, name = pool.partition(" ")
        if kind == "only" and ("head-only", seed) in top1:
            changes["alone"].setdefault(name, []).append(value - top1["head-only", seed])
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
    """For each kind and metric.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import spearmanr

    for kind, by_layer in changes.items():
        for metric, scores in rankings.items():
            pairs = [(scores[name], statistics.fmean(found)) for name, found in by_layer.items()]
            if len(pairs) > 2 and len({brought for _, brought in pairs}) > 1:
                test = spearmanr(*zip(*pairs, strict=True))
                yield Agreement(kind, metric, float(test.statistic), float(test.pvalue))


def ablation_section(cells: Trainings) -> list[str]:
    """What each layer brings alone and costs when frozen, beside its scores in the rankings."""
    lines = [
        "Points of top-1 that training one layer beside the head adds to the head alone, and that freezing one layer takes from "
        "training all: all of the layer's channels, the rate of full fine-tuning, mean and standard deviation over seeds. Scores "
        "are shares of the ranking's sum, in percent; layers in the order of the first.",
    ]
    sentences: list[str] = []
    for task, recipe in cells.recipes.items():
        changes, rankings = _changes(cells, task), rankings_of(recipe)
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
        lines += ["", f"{task}, {recipe.model}:", ""]
        lines += markdown(["layer", *rankings, "alone", "frozen costs"], rows)
        for kind, words in (("alone", "brings alone"), ("frozen", "costs when frozen")):
            found = [agreement for agreement in _agreements(changes, rankings) if agreement.kind == kind]
            if found:
                sentences += [
                    "",
                    f"*A layer's score tells what it {words} (TraDy)*, {task}: {verdict(found[0].p, found[0].correlation)}, Spearman's correlation of layers is "
                    + ", ".join(f"{a.correlation:.2f} by {a.metric} ({p_words(a.p)})" for a in found)
                    + ".",
                ]
    return [*lines, *sentences]


def plot_ablation(path: Path, cells: Trainings) -> None:
    """Draw what layers bring against their places in the first ranking, a panel a task and kind."""
    figure, axes_of = panels(2 * len(cells.recipes))
    for place, (task, recipe) in enumerate(cells.recipes.items()):
        metric, ranking = next(iter(rankings_of(recipe).items()))
        order = list(ranking)
        for number, (kind, by_layer) in enumerate(_changes(cells, task).items()):
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
            axes.set_title(f"{task}, {kind}")
            axes.set_xlabel(f"layer's place by {metric}")
            axes.set_ylabel("points above the head alone" if kind == "alone" else "points lost when frozen")
            axes.grid(alpha=0.3, axis="y")
    write_figure(path, figure)
