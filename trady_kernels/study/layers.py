"""Studies of single layers: how many of a ranking to draw from, and what training or freezing one alone does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trady_kernels.selection import LayerRanking
from trady_kernels.selection.ranking import METRICS
from trady_kernels.study.cells import Listed
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import panels, style, write_figure
from trady_kernels.study.results import FULL, RATES, Size, study_recipes
from trady_kernels.study.trainings import Training, TrainingOutcome, Trainings, listed
from trady_kernels.training.settings import Settings

#: Inside a pool: channels by chance, or those with most gradient for what they cost.
INSIDE = {"trady": "random", "d-det-rgn": "deterministic"}
BUDGET = "2.2%"
#: Layers of a pool, as shares of all layers.
POOLS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)

_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 64, "test_samples": 100, "epochs": 1, "warmup_epochs": 0.1}),
    "usual": Size(2, {"train_samples": 500, "epochs": 3}),
    "full": Size(3, FULL),
}
#: Every how manieth layer is looked at alone.
_EVERY: Mapping[str, int] = {"quick": 12, "usual": 1, "full": 1}
#: One task a network.
_USUAL, _QUICK = ("mnist", "tweets"), ("digits",)


def _recipes(size: str, tasks: tuple[str, ...], device: str) -> dict[str, Settings]:
    return study_recipes(size, tasks, _QUICK if size == "quick" else _USUAL, _SIZES, device)


def counts_of(model: str) -> list[int]:
    """How many layers the pools of a network have."""
    layers = len(LayerRanking.shipped(model))
    return sorted({max(round(share * layers), 1) for share in POOLS})


def _pool(model: str, count: int, metric: str) -> str:
    """All layers are the same pool by every metric."""
    return f"{count} layers by {metric if count < counts_of(model)[-1] else 'rgn'}"


def pool_plan(
    size: str, tasks: tuple[str, ...] = (), device: str = "cpu"
) -> Listed[Training, TrainingOutcome]:
    """The runs of the study of pools, at the rate that is the middle one of the results table.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; one a network by default.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    recipes = _recipes(size, tasks, device)
    cells = [
        _training(task, recipe, scheme, BUDGET, "", seed, _pool(recipe.model, count, metric))
        for seed in range(_SIZES[size].seeds)
        for task, recipe in recipes.items()
        for count in _thinned(counts_of(recipe.model), size)
        for metric in METRICS
        for scheme in INSIDE
    ]
    return listed(recipes, cells)


def _thinned(counts: list[int], size: str) -> list[int]:
    return [counts[0], counts[-1]] if size == "quick" else counts


def _training(
    task: str, recipe: Settings, scheme: str, budget: str, rate_of: str, seed: int, pool: str
) -> Training:
    return Training(task, scheme, budget, RATES[recipe.model][rate_of], seed, False, "epoch", pool)


def _accuracies(
    cells: Trainings, task: str, model: str
) -> dict[tuple[str, str], dict[int, list[TrainingOutcome]]]:
    """Outcomes of a task by metric and scheme, then by the number of layers."""
    found: dict[tuple[str, str], dict[int, list[TrainingOutcome]]] = {}
    outcomes: dict[tuple[str, str], list[TrainingOutcome]] = {}
    for cell in cells:
        if cell.task == task:
            outcomes.setdefault((cell.scheme, cell.pool), []).append(cells[cell])
    for metric in METRICS:
        for scheme in INSIDE:
            by_count = {
                count: outcomes[key]
                for count in counts_of(model)
                if (key := (scheme, _pool(model, count, metric))) in outcomes
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
        found = _accuracies(cells, task, recipe.model)
        counts = sorted({count for by_count in found.values() for count in by_count})
        rows = [
            [
                metric,
                INSIDE[scheme],
                *(spread([100 * o.top1 for o in by_count.get(count, [])]) for count in counts),
            ]
            for (metric, scheme), by_count in found.items()
        ]
        lines += ["", f"{task}, {recipe.model}:", ""]
        lines += markdown(["ranking", "inside", *(f"K = {count}" for count in counts)], rows)
        if ("rgn", "trady") in found:
            sentences += _pool_verdict(task, recipe.model, found["rgn", "trady"])
    for model in dict.fromkeys(recipe.model for recipe in cells.recipes.values()):
        shares = held_by(LayerRanking.shipped(model))
        half = 1 + next(place for place, share in enumerate(shares) if share >= 0.5)
        verdict = "holds" if half < len(shares) / 4 else "does not hold"
        sentences += [
            "",
            f"*Half of the cumulative RGN sits in under a quarter of the layers (TraDy)*, {model}: {verdict}, in {half} of "
            f"{len(shares)}.",
        ]
    return [*lines, *sentences]


def _pool_verdict(task: str, model: str, by_count: Mapping[int, Sequence[TrainingOutcome]]) -> list[str]:
    means = {count: statistics.fmean(100 * o.top1 for o in found) for count, found in by_count.items()}
    whole = counts_of(model)[-1]
    if whole not in means or len(means) < 2:
        return []
    best = max((count for count in means if count != whole), key=means.__getitem__)
    verdict = "holds" if means[best] > means[whole] else "does not hold"
    return [
        "",
        f"*Drawing from the top layers alone is better than from all of them (TraDy)*, {task}: {verdict}, K = {best} is best with "
        f"{means[best]:.1f}, all {whole} layers have {means[whole]:.1f}.",
    ]


def plot_pool(path: Path, cells: Trainings) -> None:
    """Draw accuracy by the number of layers, a panel a task, and the score that they hold, a panel a network."""
    models = list(dict.fromkeys(recipe.model for recipe in cells.recipes.values()))
    figure, axes_of = panels(len(cells.recipes) + len(models))
    for axes, (task, recipe) in zip(axes_of, cells.recipes.items(), strict=False):
        for place, ((metric, scheme), by_count) in enumerate(_accuracies(cells, task, recipe.model).items()):
            means = [statistics.fmean(100 * o.top1 for o in found) for found in by_count.values()]
            axes.plot(list(by_count), means, label=f"{metric}, {INSIDE[scheme]}", **style(place))
        axes.set_title(task, fontsize=10)
        axes.set_ylabel("top-1 accuracy (%)")
    for axes, model in zip(axes_of[len(cells.recipes) :], models, strict=True):
        for place, metric in enumerate(METRICS):
            shares = held_by(LayerRanking.shipped(model, metric))
            look = style(place) | {"marker": "", "linestyle": ("-", "--", ":")[place]}
            axes.plot(range(1, 1 + len(shares)), [100 * s for s in shares], label=f"score, {metric}", **look)
        axes.set_title(model, fontsize=10)
        axes.set_ylabel("cumulative score (%)")
    for axes in axes_of:
        axes.set_xlabel("layers K")
        axes.grid(alpha=0.3)
    write_figure(path, figure)


#: What an ablation trains: the pool of a layer by its name.
ALONE, FROZEN = "only {}", "without {}"


def ablation_plan(
    size: str, tasks: tuple[str, ...] = (), device: str = "cpu"
) -> Listed[Training, TrainingOutcome]:
    """The runs that train one layer whole beside the head, or all but one, at the rate of full fine-tuning.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; one a network by default.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    recipes = _recipes(size, tasks, device)
    cells = []
    for seed in range(_SIZES[size].seeds):
        for task, recipe in recipes.items():
            cells.append(_training(task, recipe, "head-only", "", "full", seed, ""))
            pools = [
                pool.format(name)
                for name in list(LayerRanking.shipped(recipe.model))[:: _EVERY[size]]
                for pool in (ALONE, FROZEN)
            ]
            cells += [
                _training(task, recipe, "trady", "100%", "full", seed, pool) for pool in ("100%", *pools)
            ]
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


def _agreements(
    changes: Mapping[str, Mapping[str, list[float]]], model: str
) -> Iterator[tuple[str, str, float, float]]:
    """Kind, metric, Spearman's correlation of layers' scores with what they bring, and its p.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import spearmanr

    for kind, by_layer in changes.items():
        for metric in METRICS:
            scores = LayerRanking.shipped(model, metric)
            pairs = [(scores[name], statistics.fmean(found)) for name, found in by_layer.items()]
            if len(pairs) > 2 and len({brought for _, brought in pairs}) > 1:
                test = spearmanr(*zip(*pairs, strict=True))
                yield kind, metric, float(test.statistic), float(test.pvalue)


def ablation_section(cells: Trainings) -> list[str]:
    """What each layer brings alone and costs when frozen, beside its place in the rankings."""
    lines = [
        "Points of top-1 that training one layer beside the head adds to the head alone, and that freezing one layer takes from "
        "training all: all of the layer's channels, the rate of full fine-tuning, mean and standard deviation over seeds. Layers "
        "in the order of RGN, with their places by it and by the other rankings.",
    ]
    sentences: list[str] = []
    for task, recipe in cells.recipes.items():
        changes = _changes(cells, task)
        rankings = {metric: LayerRanking.shipped(recipe.model, metric) for metric in METRICS}
        places = {
            metric: {name: str(1 + at) for at, name in enumerate(found)} for metric, found in rankings.items()
        }
        rows = [
            [
                name,
                *(places[metric][name] for metric in METRICS),
                *(spread(changes[kind].get(name, [])) for kind in ("alone", "frozen")),
            ]
            for name in rankings["rgn"]
            if any(name in by_layer for by_layer in changes.values())
        ]
        lines += ["", f"{task}, {recipe.model}:", ""]
        lines += markdown(["layer", *METRICS, "alone", "frozen costs"], rows)
        found = list(_agreements(changes, recipe.model))
        if found:
            sentences += [
                "",
                f"Spearman's correlation of a layer's score with what it brings, {task}: "
                + "; ".join(
                    f"{kind} {', '.join(f'{m} {r:.2f} (p {p:.3f})' for k, m, r, p in found if k == kind)}"
                    for kind in changes
                )
                + ".",
            ]
    return [*lines, *sentences]


def plot_ablation(path: Path, cells: Trainings) -> None:
    """Draw what layers bring against their places by RGN, a panel a task and kind."""
    figure, axes_of = panels(2 * len(cells.recipes))
    for place, (task, recipe) in enumerate(cells.recipes.items()):
        ranking = list(LayerRanking.shipped(recipe.model))
        for number, (kind, by_layer) in enumerate(_changes(cells, task).items()):
            axes = axes_of[2 * place + number]
            names = sorted(by_layer, key=ranking.index)
            axes.bar(
                [1 + ranking.index(name) for name in names],
                [statistics.fmean(by_layer[name]) for name in names],
                color=style(number)["color"],
            )
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(f"{task}, {kind}", fontsize=10)
            axes.set_xlabel("layer, by RGN")
            axes.set_ylabel("points above the head alone" if kind == "alone" else "points lost when frozen")
            axes.grid(alpha=0.3, axis="y")
    write_figure(path, figure)
