"""A study of whether a channel that matters goes on to matter, and of how much of the gradient a selection has."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels import selection
from trady_kernels.batch import Example, loss_of
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_layers
from trady_kernels.selection import channel_norms
from trady_kernels.study.cells import CellFile, Listed
from trady_kernels.study.expectation import expected_update
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import panels, style, write_figure
from trady_kernels.study.results import FULL, RATES, RECIPES, Size, study_recipes
from trady_kernels.study.statistics import significant
from trady_kernels.study.trainings import load_samples
from trady_kernels.training.loop import train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.settings import Settings

#: What draws the channels: by chance, by norms seen so far, by an oracle.
SCHEMES = ("trady", "medyate", "d-det-rgn")
BUDGET = "2.2%"
#: That an expected update is the mean of.
DRAWS = 100

Norms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Watch:
    """One run whose channels' gradients are measured before every epoch, and after the last one.

    Attributes:
        task: name of its recipe.
        scheme: how channels are drawn.
        seed: of the run.
    """

    task: str
    scheme: str
    seed: int

    def words(self, outcome: Importance) -> str:
        """The run and its outcome in a line."""
        return f"{self.task}, {self.scheme}, seed {self.seed}: test {outcome.top1:.1%}"


@dataclass(frozen=True)
class Importance:
    """What was found in a run. A channel's norm is that of its weight gradient, the mean over a few training batches, always
    the same ones.

    Attributes:
        top1: accuracy after the last epoch.
        all_channels: by lag in epochs, from 1: Spearman's correlation between the norms of all channels now and then, the
            mean over epochs; None where it has no value.
        selected: the same over the channels that an epoch selects: norms at its start and later.
        held: of every epoch, at its start and its end: share of the gradient's norm that the selected channels have.
        holdable: of every epoch, at its start: the share of those channels that have most of it for what they cost, up to
            the same counted cost.
        bias, variance: of the update, over draws after the last epoch, see :func:`expected_update`.
        provenance: index of what it was made with in the file's list.
    """

    top1: float
    all_channels: list[float | None] = field(default_factory=list)
    selected: list[float | None] = field(default_factory=list)
    held: list[list[float]] = field(default_factory=list)
    holdable: list[float] = field(default_factory=list)
    bias: float = 0.0
    variance: float = 0.0
    provenance: int = 0


Watched = CellFile[Watch, Importance]


_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 128, "test_samples": 100, "epochs": 2, "warmup_epochs": 0.1}),
    "usual": Size(3),
    "full": Size(3, FULL),
}


def importance_plan(size: str, tasks: tuple[str, ...] = (), device: str = "cpu") -> Listed[Watch, Importance]:
    """The runs of the study, at the rate that is the middle one of the results table.

    Args:
        size: "quick", "usual" or "full".
        tasks: some of those of the results table; all by default, one where it has to be quick.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    recipes = study_recipes(size, tasks, ("digits",) if size == "quick" else RECIPES, _SIZES, device)
    seeds = range(_SIZES[size].seeds)
    cells = (Watch(task, scheme, seed) for seed in seeds for task in recipes for scheme in SCHEMES)
    return Listed(recipes, tuple(cells), (Watch, Importance), watch, Watch.words)


def watch(cell: Watch, recipe: Settings) -> Importance:
    """Fine-tune with a scheme and measure all channels' gradients before every epoch.

    Raises:
        Diverged: the loss became infinite or NaN.
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    rate = RATES[recipe.model][""]
    settings = replace(recipe, schemes=(cell.scheme,), budget=BUDGET, learning_rate=rate, seed=cell.seed)
    torch.set_num_threads(settings.threads)
    data = load_samples(cell.task, recipe, held_out=False)
    # An oracle draws the same channels again.
    watching = Watching(2 if selection.SCHEMES[cell.scheme].needs_gradients else DRAWS)
    with tempfile.TemporaryDirectory() as folder:
        result = train_scheme(cell.scheme, settings, data, Path(folder, "checkpoint.pt"), watching)
    return watching.found(result.top1)


class Watching(Observer):
    """Measures the gradients of all channels before every epoch.

    Args:
        draws: how many an expected update is the mean of.
    """

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._norms: list[Norms] = []
        self._selections: list[Norms] = []
        self._holdable: list[float] = []

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        self._regime, self._batches = regime, batches
        self._selections.append(_selected(regime))
        self._norms.append(channel_norms(regime.model, batches(), F.cross_entropy))
        self._holdable.append(
            _holdable(regime, next(iter(batches()))[0], self._norms[-1], self._selections[-1])
        )

    def found(self, top1: float) -> Importance:
        """Everything, as plain values; draws channels anew for it."""
        norms = [*self._norms, channel_norms(self._regime.model, self._batches(), F.cross_entropy)]
        held = [
            [_short(share_of(norms[at], chosen)) for at in (epoch, epoch + 1)]
            for epoch, chosen in enumerate(self._selections)
        ]
        lags = range(1, len(norms))
        everything: Norms = {name: torch.arange(len(found)) for name, found in norms[0].items()}
        update = expected_update(
            channel_norms(self._regime.model, [next(iter(self._batches()))], F.cross_entropy), self._draw()
        )
        return Importance(
            top1,
            [_lagged(norms, [everything] * len(self._selections), lag) for lag in lags],
            [_lagged(norms, self._selections, lag) for lag in lags],
            held,
            self._holdable,
            _short(update.bias),
            _short(update.variance),
        )

    def _draw(self) -> Iterator[Norms]:
        """Selections as training draws them, the weights standing still; a scheme may look at gradients between draws."""
        optimizer = torch.optim.SGD(self._regime.parameters(), lr=0.0)
        batch = next(iter(self._batches()))
        self._regime.train_mode()
        for _ in range(self._draws):
            loss_of(self._regime.model, batch, F.cross_entropy).backward()
            optimizer.zero_grad()
            self._regime.resample(optimizer)
            yield _selected(self._regime)


def _selected(regime: Regime) -> Norms:
    return {name: layer.channels.cpu().clone() for name, layer in sparse_layers(regime.model).items()}


def share_of(norms: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor]) -> float:
    """Share of the norm of the whole gradient that chosen channels have, from 0 to 1; NaN where there is no gradient."""
    part = sum(float(norms[name][channels].square().sum()) for name, channels in chosen.items())
    whole = sum(float(found.square().sum()) for found in norms.values())
    return math.sqrt(part / whole) if whole else math.nan


def _holdable(regime: Regime, input: Example, norms: Norms, chosen: Norms) -> float:
    costs = {name: layer.channel.elements for name, layer in measure_layers(regime.model, input).items()}
    return _short(most_held(norms, costs, sum(costs[name] * len(found) for name, found in chosen.items())))


def most_held(norms: Mapping[str, torch.Tensor], costs: Mapping[str, int], limit: int) -> float:
    """Share of the gradient's norm of the channels with most squared norm for what they cost, those that fit a limit."""
    names = list(norms)
    squares = torch.cat([norms[name].square() for name in names])
    prices = torch.cat([torch.full((len(norms[name]),), float(costs[name])).double() for name in names])
    order = (squares / prices).argsort(descending=True)
    held, left = 0.0, float(limit)
    for square, price in zip(squares[order].tolist(), prices[order].tolist(), strict=True):
        if price <= left:
            held, left = held + square, left - price
    whole = float(squares.sum())
    return math.sqrt(held / whole) if whole else math.nan


def _lagged(norms: list[Norms], chosen: list[Norms], lag: int) -> float | None:
    """Mean over epochs of the correlation between the chosen channels' norms and those some epochs later."""
    found = []
    for epoch in range(len(norms) - lag):
        now, later = (
            torch.cat([norms[at][name][channels] for name, channels in chosen[epoch].items()])
            for at in (epoch, epoch + lag)
        )
        correlation = rank_correlation(now, later)
        if math.isfinite(correlation):
            found.append(correlation)
    return _short(statistics.fmean(found)) if found else None


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's; NaN of fewer than two values, or where all are tied.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    from scipy.stats import spearmanr

    if len(first) < 2 or not bool((first != first[0]).any()) or not bool((second != second[0]).any()):
        return math.nan
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def _short(value: float) -> float:
    return significant(value, 4)


def _groups(cells: Watched) -> dict[tuple[str, str], list[Importance]]:
    """Outcomes by network and scheme."""
    groups: dict[tuple[str, str], list[Importance]] = {}
    for cell in cells:
        groups.setdefault((cells.recipes[cell.task].model, cell.scheme), []).append(cells[cell])
    return groups


def _at(lists: Iterable[list[Any]], place: int) -> list[Any]:
    return [values[place] for values in lists if len(values) > place and values[place] is not None]


def importance_section(cells: Watched) -> list[str]:
    """How long a channel's norm says something, and what selections have of the gradient."""
    rows, sentences = [], []
    for (network, scheme), runs in sorted(_groups(cells).items()):
        lags = max(len(run.all_channels) for run in runs)
        starts = [100 * pair[0] for run in runs for pair in run.held]
        ends = [100 * pair[1] for run in runs for pair in run.held]
        most = [100 * share for run in runs for share in run.holdable]
        correlations = (
            spread(_at((getattr(run, kind) for run in runs), lag), 2)
            for kind in ("all_channels", "selected")
            for lag in (0, lags - 1)
        )
        update = (spread([getattr(run, name) for run in runs], 2) for name in ("bias", "variance"))
        rows.append(
            [network, scheme, *(spread(shares) for shares in (starts, ends, most)), *correlations, *update]
        )
    for network in dict.fromkeys(network for network, _ in _groups(cells)):
        sentences += _verdicts(network, {s: runs for (n, s), runs in _groups(cells).items() if n == network})
    heads = [
        *("network", "scheme", "held at start (%)", "at end (%)", "holdable (%)"),
        *("lag 1, all", "last lag, all", "lag 1, selected", "last lag, selected", "bias", "variance"),
    ]
    return [
        f"Norms of all channels' gradients, measured before every epoch and after the last, at {BUDGET}. Held: share of the whole "
        "gradient's norm that the selected channels have; holdable: of those with most of it for what they cost. Lags: "
        "Spearman's correlation of channels' norms with those one epoch later, and from the first epoch to the end. Bias and "
        "variance: of the update over draws, against the full gradient and relative to the mean update (1 is orthogonal). Mean "
        "and standard deviation over tasks, seeds and epochs.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


def _verdicts(network: str, runs: Mapping[str, list[Importance]]) -> list[str]:
    lines = []
    if {"trady", "medyate"} <= runs.keys():
        held = {
            scheme: statistics.fmean([pair[0] for run in runs[scheme] for pair in run.held[1:]] or [math.nan])
            for scheme in ("medyate", "trady")
        }
        verdict = "holds" if held["medyate"] > held["trady"] else "does not hold"
        lines += [
            "",
            f"*Drawing by the norms seen so far holds more of the gradient than drawing evenly (MeDyate)*, {network}: {verdict}, "
            f"{held['medyate']:.1%} of its norm against {held['trady']:.1%} from the second epoch on.",
        ]
    return lines


def plot_importance(path: Path, cells: Watched) -> None:
    """Draw what selections hold by epoch, and correlations by lag, two panels a network."""
    groups = _groups(cells)
    networks = list(dict.fromkeys(network for network, _ in groups))
    figure, axes_of = panels(2 * len(networks))
    for place, network in enumerate(networks):
        held, lagged = axes_of[2 * place : 2 * place + 2]
        for number, scheme in enumerate(SCHEMES):
            runs = groups.get((network, scheme), [])
            epochs = range(min((len(run.held) for run in runs), default=0))
            for words, share, line in (
                (scheme, lambda run, epoch: run.held[epoch][0], "-"),
                (f"{scheme}, holdable", lambda run, epoch: run.holdable[epoch], ":"),
            ):
                means = [100 * statistics.fmean(share(run, epoch) for run in runs) for epoch in epochs]
                held.plot([1 + e for e in epochs], means, label=words, **style(number) | {"linestyle": line})
            lags = range(min((len(run.all_channels) for run in runs), default=0))
            for words, kind, line in (
                (f"{scheme}", "all_channels", "-"),
                (f"{scheme}, selected", "selected", "--"),
            ):
                found = [_at((getattr(run, kind) for run in runs), lag) for lag in lags]
                points = [(1 + lag, statistics.fmean(values)) for lag, values in enumerate(found) if values]
                lagged.plot(*zip(*points, strict=True), label=words, **style(number) | {"linestyle": line})
        held.set_ylabel("share of the gradient's norm (%)")
        held.set_xlabel("epoch")
        lagged.set_ylabel("correlation of channels' norms")
        lagged.set_xlabel("epochs between")
        for axes in (held, lagged):
            axes.set_title(network, fontsize=10)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
    write_figure(path, figure)
