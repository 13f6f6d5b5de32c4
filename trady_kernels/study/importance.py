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
from trady_kernels.batch import Example
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_layers
from trady_kernels.selection import channel_norms
from trady_kernels.study.cells import CellFile, Listed, NothingFinished
from trady_kernels.study.expectation import NoOverlap, expected_update
from trady_kernels.study.markdown import markdown, spread
from trady_kernels.study.plot import draw_means, panels, style, write_figure
from trady_kernels.study.results import (
    FULL,
    RECIPES,
    Request,
    Size,
    choosing_channels,
    middle_rate,
    study_recipes,
)
from trady_kernels.study.statistics import paired_test, significant
from trady_kernels.study.trainings import load_samples
from trady_kernels.training.loop import Diverged, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.settings import Settings

#: What draws the channels, and from which layers where that is not the scheme's own choice: by chance from the first by RGN,
#: from all, and from those of medyate; by norms seen so far; by an oracle.
DRAWN: Mapping[str, tuple[str, str]] = {
    "trady": ("trady", ""),
    "d-full-random": ("d-full-random", ""),
    "trady, medyate's pool": ("trady", "alpha 20% by lara"),
    "medyate": ("medyate", ""),
    "d-det-rgn": ("d-det-rgn", ""),
}
BUDGET = "2.2%"
#: That an expected update is the mean of.
DRAWS: Mapping[str, int] = {"quick": 100, "usual": 1000, "full": 1000}

Norms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Watch:
    """One run whose channels' gradients are measured before every epoch, and after the last one.

    Attributes:
        task: name of its recipe.
        drawn: how channels are drawn, one of ``DRAWN`` or a scheme.
        seed: of the run.
        draws: that an expected update is the mean of.
    """

    task: str
    drawn: str
    seed: int
    draws: int

    def words(self, outcome: Importance) -> str:
        """The run and its outcome in a line."""
        result = "diverged" if outcome.diverged else f"test {outcome.top1:.1%}"
        return f"{self.task}, {self.drawn}, seed {self.seed}: {result}"


@dataclass(frozen=True)
class Importance:
    """What was found in a run. A channel's norm is that of its weight gradient, the mean over a few training batches, each
    time other ones. Its place is its rank by it among its layer's channels, so that layers of larger gradients do not count.

    Attributes:
        top1: accuracy after the last epoch.
        all_channels: by lag in epochs, from 1: correlation between the places of all channels now and then, the mean over
            epochs; None where it has no value.
        selected: the same over the channels that an epoch selects: places at its start and later.
        held: of every epoch, at its start and its end: share of the gradient's norm that the selected channels have.
        holdable: of every epoch, at its start: the share of those channels that have most of it for what they cost, up to
            the same counted cost.
        bias, variance: of the update, over draws after the last epoch, see :func:`expected_update`; None where no two draws
            have a channel with a gradient in common.
        diverged: whether the loss became infinite or NaN; everything else is empty then.
        provenance: index of what it was made with in the file's list.
    """

    top1: float
    all_channels: list[float | None] = field(default_factory=list)
    selected: list[float | None] = field(default_factory=list)
    held: list[list[float]] = field(default_factory=list)
    holdable: list[float] = field(default_factory=list)
    bias: float | None = None
    variance: float | None = None
    diverged: bool = False
    provenance: int = 0


Watched = CellFile[Watch, Importance]


_SIZES: Mapping[str, Size] = {
    "quick": Size(1, {"train_samples": 128, "test_samples": 100, "epochs": 2, "warmup_epochs": 0.1}),
    "usual": Size(2),
    "full": Size(3, FULL),
}


def importance_plan(request: Request) -> Listed[Watch, Importance]:
    """The runs of the study, at the rate that is the middle one of the results table.

    Raises:
        ValueError: no such size, task or scheme.
    """
    recipes = study_recipes(request, ("digits",) if request.size == "quick" else RECIPES, _SIZES)
    seeds = range(_SIZES[request.size].seeds)
    cells = (
        Watch(task, drawn, seed, DRAWS[request.size])
        for seed in seeds
        for task in recipes
        for drawn in choosing_channels(request.schemes) or DRAWN
    )
    return Listed(recipes, tuple(cells), (Watch, Importance), watch, Watch.words)


def watch(cell: Watch, recipe: Settings) -> Importance:
    """Fine-tune with a scheme and measure all channels' gradients before every epoch; a run that diverges has an outcome too.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had.
    """
    scheme, pool = DRAWN.get(cell.drawn, (cell.drawn, ""))
    settings = replace(
        recipe,
        schemes=(scheme,),
        pool=pool or recipe.pool,
        budget=BUDGET,
        learning_rate=middle_rate(recipe),
        seed=cell.seed,
    )
    torch.set_num_threads(settings.threads)
    data = load_samples(cell.task, recipe, held_out=False)
    # An oracle draws the same channels again.
    watching = Watching(2 if selection.SCHEMES[scheme].needs_gradients else cell.draws)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_scheme(scheme, settings, data, Path(folder, "checkpoint.pt"), watching)
        except Diverged:
            return Importance(0.0, diverged=True)
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
        self._norms.append(self._measured())
        self._holdable.append(
            _holdable(regime, next(iter(batches()))[0], self._norms[-1], self._selections[-1])
        )

    def _measured(self) -> Norms:
        """On batches of its own: what two measurements had of the same samples would look like agreement."""
        batches = self._batches(len(self._norms))
        return channel_norms(self._regime.model, batches, F.cross_entropy)

    def found(self, top1: float) -> Importance:
        """Everything, as plain values; draws channels anew for it."""
        norms = [*self._norms, self._measured()]
        held = [
            [_short(share_of(norms[at], chosen)) for at in (epoch, epoch + 1)]
            for epoch, chosen in enumerate(self._selections)
        ]
        lags = range(1, len(norms))
        places = [{name: places_of(found) for name, found in measured.items()} for measured in norms]
        everything: Norms = {name: torch.arange(len(found)) for name, found in norms[0].items()}
        try:
            update = expected_update(norms[-1], self._draw())
        except NoOverlap:
            bias = variance = None
        else:
            bias, variance = _short(update.bias), _short(update.variance)
        return Importance(
            top1,
            [_lagged(places, [everything] * len(self._selections), lag) for lag in lags],
            [_lagged(places, self._selections, lag) for lag in lags],
            held,
            self._holdable,
            bias,
            variance,
        )

    def _draw(self) -> Iterator[Norms]:
        """Selections as the next epoch's would be drawn: nothing trains in between, so that each draw knows as much."""
        optimizer = torch.optim.SGD(self._regime.parameters(), lr=0.0)
        for _ in range(self._draws):
            self._regime.resample(optimizer)
            yield _selected(self._regime)


def _selected(regime: Regime) -> Norms:
    return {name: layer.channels.cpu().clone() for name, layer in sparse_layers(regime.model).items()}


def places_of(norms: torch.Tensor) -> torch.Tensor:
    """Ranks of a layer's channels over their number, equal ones the mean of theirs: float64 ``(C,)``, above 0 to 1."""
    _, group, counts = norms.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    return ranks[group].double() / len(norms)


def share_of(norms: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor]) -> float:
    """Share of the norm of the whole gradient that chosen channels have, from 0 to 1; 0 where there is no gradient."""
    part = sum(float(norms[name][channels].square().sum()) for name, channels in chosen.items())
    whole = sum(float(found.square().sum()) for found in norms.values())
    return math.sqrt(part / whole) if whole else 0.0


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
    return math.sqrt(held / whole) if whole else 0.0


def _lagged(places: list[Norms], chosen: list[Norms], lag: int) -> float | None:
    """Mean over epochs of the correlation between the chosen channels' places and those some epochs later."""
    found = []
    for epoch in range(len(places) - lag):
        now, later = (
            torch.cat([places[at][name][channels] for name, channels in chosen[epoch].items()])
            for at in (epoch, epoch + lag)
        )
        if len(now) > 1 and bool(now.std() > 0) and bool(later.std() > 0):
            found.append(float(torch.corrcoef(torch.stack([now, later]))[0, 1]))
    return _short(statistics.fmean(found)) if found else None


def _short(value: float) -> float:
    return significant(value, 4)


def _groups(cells: Watched) -> dict[tuple[str, str], dict[tuple[str, int], Importance]]:
    """Outcomes by network and what draws, then by task and seed; those that diverged are left out.

    Raises:
        NothingFinished: there is none.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], Importance]] = {}
    for cell in cells:
        if not cells[cell].diverged:
            group = groups.setdefault((cells.recipes[cell.task].model, cell.drawn), {})
            group[cell.task, cell.seed] = cells[cell]
    if not groups:
        raise NothingFinished(f"cells: {cells.path} has no finished run, expected some")
    return groups


def _at(lists: Iterable[list[Any]], place: int) -> list[Any]:
    return [values[place] for values in lists if len(values) > place and values[place] is not None]


def importance_section(cells: Watched) -> list[str]:
    """How long a channel's norm says something, and what selections have of the gradient."""
    rows, sentences = [], []
    groups = _groups(cells)
    for (network, drawn), found in sorted(groups.items()):
        runs = list(found.values())
        lags = max(len(run.all_channels) for run in runs)
        starts = [100 * pair[0] for run in runs for pair in run.held]
        ends = [100 * pair[1] for run in runs for pair in run.held]
        most = [100 * share for run in runs for share in run.holdable]
        correlations = (
            spread(_at((getattr(run, kind) for run in runs), lag), 2)
            for kind in ("all_channels", "selected")
            for lag in (0, lags - 1)
        )
        update = (
            spread([value for run in runs if (value := getattr(run, name)) is not None], 2)
            for name in ("bias", "variance")
        )
        rows.append(
            [network, drawn, *(spread(shares) for shares in (starts, ends, most)), *correlations, *update]
        )
    for network in dict.fromkeys(network for network, _ in groups):
        sentences += _verdicts(
            network, {drawn: found for (n, drawn), found in groups.items() if n == network}
        )
    heads = [
        *("network", "drawn by", "held at start (%)", "at end (%)", "holdable (%)"),
        *("lag 1, all", "last lag, all", "lag 1, selected", "last lag, selected", "bias", "variance"),
    ]
    draws = ", ".join(map(str, sorted({cell.draws for cell in cells})))
    return [
        f"Norms of all channels' gradients, measured before every epoch and after the last, each time on other batches, at {BUDGET}. "
        "Held: share of the whole gradient's norm that the selected channels have, at the start and the end of their epoch; "
        "holdable: of those with most of it for what they cost. Lags: correlation of channels' ranks inside their layers with those "
        "one epoch later, and from the first epoch to the end. Bias and variance: of the update over "
        f"{draws} draws after the last epoch, against the full gradient and relative to the mean update (a bias of 1 is "
        "orthogonal; of an oracle, which draws the same channels again, all of the error is bias). Mean and standard deviation "
        "over tasks, seeds and epochs.",
        "",
        *markdown(heads, rows),
        *sentences,
    ]


@dataclass(frozen=True)
class _Claim:
    """That one way of drawing holds more of the gradient than another.

    Attributes:
        more, less: of ``DRAWN``.
        sentence: what is said, and who says it.
        first: the first epoch that counts, from 0.
    """

    more: str
    less: str
    sentence: str
    first: int = 0


_CLAIMS = (
    _Claim(
        "trady",
        "d-full-random",
        "at the same cost, the layers with most gradient for what they cost hold more of it than all layers (TraDy)",
    ),
    _Claim(
        "trady, medyate's pool",
        "d-full-random",
        "so do the layers by LaRa, equation 9 (MeDyate)",
    ),
    _Claim(
        "medyate",
        "trady, medyate's pool",
        "from the second epoch on, drawing by the norms seen so far holds more of it than drawing evenly from the same layers "
        "(MeDyate)",
        first=1,
    ),
)


def _verdicts(network: str, groups: Mapping[str, Mapping[tuple[str, int], Importance]]) -> list[str]:
    lines = []
    for claim in _CLAIMS:
        if claim.more not in groups or claim.less not in groups:
            continue
        more, less = (
            {
                key: statistics.fmean(100 * pair[0] for pair in run.held[claim.first :])
                for key, run in groups[drawn].items()
                if run.held[claim.first :]
            }
            for drawn in (claim.more, claim.less)
        )
        if more.keys() & less.keys():
            test = paired_test(more, less)
            lines += [
                "",
                f"*{claim.sentence[0].upper()}{claim.sentence[1:]}*, {network}: {test.verdict}, "
                f"{statistics.fmean(more.values()):.1f}% of its norm against {statistics.fmean(less.values()):.1f}%, {test.words} "
                f"over {test.pairs} pairs of task and seed.",
            ]
    return lines


def plot_importance(path: Path, cells: Watched) -> None:
    """Draw what selections hold by epoch, and correlations by lag, two panels a network."""
    groups = _groups(cells)
    networks = list(dict.fromkeys(network for network, _ in groups))
    drawn_by = list(dict.fromkeys(drawn for _, drawn in groups))
    figure, axes_of = panels(2 * len(networks))
    for place, network in enumerate(networks):
        held, lagged = axes_of[2 * place : 2 * place + 2]
        for number, drawn in enumerate(drawn_by):
            runs = list(groups.get((network, drawn), {}).values())
            epochs = range(max((len(run.held) for run in runs), default=0))
            shares = {
                1.0 + epoch: [100 * pair[0] for pair in _at((r.held for r in runs), epoch)]
                for epoch in epochs
            }
            draw_means(held, shares, label=drawn, **style(number))
            most = {
                1.0 + epoch: [100 * m for m in _at((r.holdable for r in runs), epoch)] for epoch in epochs
            }
            if drawn == "d-det-rgn":
                draw_means(held, most, label="most for its cost", **_DOTTED)
            for words, kind, line in ((drawn, "all_channels", "-"), (f"{drawn}, selected", "selected", "--")):
                points = {
                    1.0 + lag: _at((getattr(run, kind) for run in runs), lag)
                    for lag in range(max((len(run.all_channels) for run in runs), default=0))
                }
                draw_means(lagged, points, label=words, **style(number) | {"linestyle": line})
        held.set_ylabel("share of the gradient's norm (%)")
        held.set_xlabel("epoch")
        lagged.set_ylabel("correlation of channels' ranks")
        lagged.set_xlabel("epochs between")
        for axes in (held, lagged):
            axes.set_title(network)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
    write_figure(path, figure)


_DOTTED = {"color": "black", "linestyle": ":", "linewidth": 1}
