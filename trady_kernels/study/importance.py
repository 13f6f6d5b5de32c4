"""A study of whether a channel that matters goes on to matter, and of how much of the gradient a selection has."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels import selection
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_layers
from trady_kernels.selection import channel_norms
from trady_kernels.study.cells import CellFile, Listed, NothingFinished
from trady_kernels.study.expectation import NoOverlap, expected_update, length_of
from trady_kernels.study.markdown import counted, markdown, spread
from trady_kernels.study.plot import draw_means, panels, style, write_figure
from trady_kernels.study.results import (
    FULL,
    RECIPES,
    SMALLEST_BUDGET,
    Request,
    Size,
    choosing_channels,
    middle_rate,
    study_recipes,
)
from trady_kernels.study.statistics import PairedTest, held, paired_test, significant, verdict
from trady_kernels.study.trainings import load_samples
from trady_kernels.study.verdicts import Verdict
from trady_kernels.training.loop import MEASURED_BATCHES, Diverged, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.settings import Settings

#: A name without a comma, which would part it in two on the command line; what it is in older files.
_IN_MEDYATES_POOL, _OLD_NAMES = (
    "trady in medyate's pool",
    {"trady, medyate's pool": "trady in medyate's pool"},
)
#: What draws the channels, and from which layers where that is not the scheme's own choice: by chance from the first by RGN,
#: from all, and from those of medyate; by norms seen so far; by an oracle.
DRAWN: Mapping[str, tuple[str, str]] = {
    "trady": ("trady", ""),
    "d-full-random": ("d-full-random", ""),
    _IN_MEDYATES_POOL: ("trady", "alpha 20% by lara"),
    "medyate": ("medyate", ""),
    "d-det-rgn": ("d-det-rgn", ""),
}
#: That an expected update is the mean of.
DRAWS: Mapping[str, int] = {"quick": 100, "usual": 1000, "full": 1000}

#: By layer: norms ``(C,)`` of all channels, and indices ``(k,)`` of some.
Norms = dict[str, torch.Tensor]
Channels = dict[str, torch.Tensor]


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", _OLD_NAMES.get(self.drawn, self.drawn))

    def words(self, outcome: Importance) -> str:
        """The run and its outcome in a line."""
        result = "diverged" if outcome.diverged else f"test {outcome.top1:.1%}"
        return f"{self.task}, {self.drawn}, seed {self.seed}: {result}"


@dataclass(frozen=True)
class Importance:
    """What was found in a run. A channel's norm is that of its weight gradient, the mean over a few training batches, each
    time other ones, and never those that an oracle chooses by. Its place is its rank by it among its layer's channels, so that
    layers of larger gradients do not count.

    Attributes:
        top1: accuracy after the last epoch.
        all_channels: by lag in epochs, from 1: correlation between the places of all channels now and then, the mean over
            epochs; None where it has no value, or where samples are too few for the two measurements to be of different ones.
        selected: the same over the channels that an epoch selects: places at its start and later.
        held: of every epoch, at its start and its end: share of the gradient's norm that the selected channels have.
        holdable: of every epoch, at its start: the share of those channels that, on the batches that an oracle chooses by,
            have most of it for what they cost, up to the same counted cost.
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
    # Small batches, so that few samples are enough for different ones at each measurement.
    "quick": Size(
        1, {"train_samples": 128, "batch_size": 8, "test_samples": 100, "epochs": 2, "warmup_epochs": 1}
    ),
    "usual": Size(2),
    "full": Size(3, FULL),
}


def importance_plan(request: Request) -> Listed[Watch, Importance]:
    """The runs of the study, at the rate that is the middle one of the results table.

    Raises:
        ValueError: no such size, task or scheme.
    """
    recipes = study_recipes(request, ("digits",) if request.size == "quick" else RECIPES, _SIZES)
    choosing_channels(tuple(scheme for scheme in request.schemes if scheme not in DRAWN))
    seeds = range(_SIZES[request.size].seeds)
    cells = (
        Watch(task, drawn, seed, DRAWS[request.size])
        for seed in seeds
        for task in recipes
        for drawn in request.schemes or DRAWN
    )
    return Listed(recipes, tuple(cells), (Watch, Importance), watch, Watch.words)


def watch(cell: Watch, recipe: Settings) -> Importance:
    """Fine-tune with a scheme and measure all channels' gradients before every epoch; a run that diverges has an outcome too.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the task's data or network is not to be had, or has too few samples.
    """
    scheme, pool = DRAWN.get(cell.drawn, (cell.drawn, ""))
    settings = replace(
        recipe,
        schemes=(scheme,),
        pool=pool or recipe.pool,
        budget=SMALLEST_BUDGET,
        learning_rate=middle_rate(recipe),
        seed=cell.seed,
    )
    torch.set_num_threads(settings.threads)
    data = load_samples(cell.task, recipe, held_out=False)
    # An oracle draws the same channels again.
    draws = 2 if selection.SCHEMES[scheme].needs_gradients else cell.draws
    watching = Watching(draws, measurements_apart(len(data.train), recipe.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train_scheme(scheme, settings, data, Path(folder, "checkpoint.pt"), watching)
        except Diverged:
            return Importance(0.0, diverged=True)
    return watching.found(result.top1)


def measurements_apart(samples: int, batch_size: int) -> int:
    """How many measurements there are samples for, beside those that an oracle chooses by.

    Raises:
        ValueError: a measurement would be of the samples of the one before.
    """
    each = MEASURED_BATCHES * batch_size
    apart = samples // each - 1
    if apart < 2:
        raise ValueError(
            f"train_samples: got {samples}, expected at least {3 * each}: {MEASURED_BATCHES} batches of {batch_size} to choose by, "
            "and as many others for each of two measurements"
        )
    return apart


class Watching(Observer):
    """Measures the gradients of all channels before every epoch.

    Args:
        draws: how many an expected update is the mean of.
        apart: after how many measurements the first one's samples come again.
    """

    def __init__(self, draws: int, apart: int) -> None:
        self._draws, self._apart = draws, apart
        self._norms: list[Norms] = []
        self._selections: list[Channels] = []
        self._holdable: list[float] = []

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        self._regime, self._batches = regime, batches
        self._selections.append(_selected(regime))
        self._norms.append(self._measured())
        self._holdable.append(_short(share_of(self._norms[-1], self._most_for_their_cost())))

    def _measured(self) -> Norms:
        """On batches of its own: what two measurements had of the same samples would look like agreement.

        The first batches, of number 0, are those that an oracle chooses by.
        """
        return self._norms_on(1 + len(self._norms) % self._apart)

    def _norms_on(self, number: int) -> Norms:
        return channel_norms(self._regime.model, self._batches(number), F.cross_entropy)

    def _most_for_their_cost(self) -> Channels:
        layers = measure_layers(self._regime.model, next(iter(self._batches()))[0])
        costs = {name: layer.channel.elements for name, layer in layers.items()}
        limit = sum(costs[name] * len(chosen) for name, chosen in self._selections[-1].items())
        return most_for_their_cost(self._norms_on(0), costs, limit)

    def found(self, top1: float) -> Importance:
        """Everything, as plain values; draws channels anew for it."""
        norms = [*self._norms, self._measured()]
        held = [
            [_short(share_of(norms[at], chosen)) for at in (epoch, epoch + 1)]
            for epoch, chosen in enumerate(self._selections)
        ]
        places = [{name: places_of(found) for name, found in measured.items()} for measured in norms]
        everything: Channels = {name: torch.arange(len(found)) for name, found in norms[0].items()}
        try:
            update = expected_update(norms[-1], self._draw())
        except NoOverlap:
            bias = variance = None
        else:
            bias, variance = _short(update.bias), _short(update.variance)
        return Importance(
            top1,
            self._lags(places, [everything] * len(self._selections)),
            self._lags(places, self._selections),
            held,
            self._holdable,
            bias,
            variance,
        )

    def _lags(self, places: list[Norms], chosen: list[Channels]) -> list[float | None]:
        lags = range(1, len(places))
        return [_lagged(places, chosen, lag) if lag % self._apart else None for lag in lags]

    def _draw(self) -> Iterator[Channels]:
        """Selections as the next epoch's would be drawn: nothing trains in between, so that each draw knows as much."""
        optimizer = torch.optim.SGD(self._regime.parameters(), lr=0.0)
        for _ in range(self._draws):
            self._regime.resample(optimizer)
            yield _selected(self._regime)


def _selected(regime: Regime) -> Channels:
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


def most_for_their_cost(norms: Mapping[str, torch.Tensor], costs: Mapping[str, int], limit: int) -> Channels:
    """The channels with most squared norm for what they cost, those that fit a limit."""
    channels = [(name, channel) for name, found in norms.items() for channel in range(len(found))]
    scores = torch.cat([found.square() / costs[name] for name, found in norms.items()])
    chosen: dict[str, list[int]] = {name: [] for name in norms}
    left = limit
    for place in scores.argsort(descending=True).tolist():
        name, channel = channels[place]
        if costs[name] <= left:
            chosen[name].append(channel)
            left -= costs[name]
    return {name: torch.tensor(found, dtype=torch.int64) for name, found in chosen.items()}


def _lagged(places: list[Norms], chosen: list[Channels], lag: int) -> float | None:
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


def _at(lists: Iterable[Sequence[Any]], place: int) -> list[Any]:
    return [values[place] for values in lists if len(values) > place and values[place] is not None]


def importance_section(cells: Watched) -> list[str]:
    """How long a channel's norm says something, and what selections have of the gradient."""
    rows, sentences = [], []
    groups = _groups(cells)
    for (network, drawn), found in sorted(groups.items()):
        runs = list(found.values())
        starts = [100 * pair[0] for run in runs for pair in run.held]
        ends = [100 * pair[1] for run in runs for pair in run.held]
        most = [100 * share for run in runs for share in run.holdable]
        lengths = [100 * length for length in _lengths(found).values()]
        update = (list(of_runs(found).values()) for of_runs in (_biases, _variances))
        rows.append(
            [
                *(network, drawn, *(spread(shares) for shares in (starts, ends, most))),
                *(spread(values, 2) for values in _first_and_last_lag(runs)),
                *(spread(lengths), *(spread(values, 2) for values in update)),
            ]
        )
    for network in dict.fromkeys(network for network, _ in groups):
        drawn_by = {drawn: found for (n, drawn), found in groups.items() if n == network}
        for claim, verdict_words, words in (*_shares(drawn_by), *_lasting(drawn_by), *_updates(drawn_by)):
            sentences += ["", Verdict.of(claim, network, verdict_words, words)]
    heads = [
        *("network", "drawn by", "held at start (%)", "at end (%)", "holdable (%)", "lag 1, all"),
        *("last lag, all", "lag 1, selected", "last lag, selected", "length (%)", "bias", "variance"),
    ]
    return [*_definitions(cells), "", *markdown(heads, rows), *sentences]


def _definitions(cells: Watched) -> list[str]:
    rates = {recipe.model: middle_rate(recipe) for recipe in cells.recipes.values()}
    at = ", ".join(f"{rate:g} ({network})" for network, rate in rates.items())
    batches = ", ".join(map(str, sorted({recipe.batch_size for recipe in cells.recipes.values()})))
    draws = ", ".join(map(str, sorted({cell.draws for cell in cells})))
    return [
        f"At {SMALLEST_BUDGET} and the learning rate {at}. A channel's norm is that of its weight gradient, the mean over "
        f"{MEASURED_BATCHES} batches of {batches}; the gradient's norm, or length, is that of all channels' norms together: of such "
        "means, not of one gradient of all samples. Measured before every epoch and after the last, each time on other samples, "
        "never on those that the oracle `d-det-rgn` chooses by. Mean and standard deviation over tasks, seeds and epochs.",
        "",
        "- Held: share of the gradient's norm that the selected channels have, at the start and the end of their epoch. Holdable: "
        "that of the channels of the same cost that have most for what they cost on the samples that the oracle chooses by.",
        "- Lags: correlation of channels' ranks inside their layers with those one epoch later, and from the first epoch to the "
        "end, where there are samples for measurements on different ones.",
        f"- Of the mean of {draws} updates, drawn after the last epoch, each with the gradient of its channels and zeros elsewhere: "
        "its length, over the gradient's; its bias, the sine of its angle to the gradient, 0 along it and 1 orthogonal, whatever "
        "the length; its variance, the mean squared distance of an update from it, over its squared length. An oracle draws the "
        "same channels again, without variance.",
    ]


def _first_and_last_lag(runs: Sequence[Importance]) -> list[list[float]]:
    """Correlations after one epoch and from the first to the end, of all channels and of selected ones."""
    last = max(len(run.all_channels) for run in runs) - 1
    return [
        _at((getattr(run, kind) for run in runs), lag)
        for kind in ("all_channels", "selected")
        for lag in (0, last)
    ]


#: Runs of one network and way of drawing, by task and seed.
_Runs = Mapping[tuple[str, int], Importance]


def _biases(runs: _Runs) -> dict[object, float]:
    return {key: run.bias for key, run in runs.items() if run.bias is not None}


def _variances(runs: _Runs) -> dict[object, float]:
    return {key: run.variance for key, run in runs.items() if run.variance is not None}


def _lengths(runs: _Runs) -> dict[object, float]:
    biases, variances = _biases(runs), _variances(runs)
    return {key: length_of(bias, variances[key]) for key, bias in biases.items()}


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
        "at the same cost, the layers with most gradient for what they cost hold more of the gradient than all layers (TraDy)",
    ),
    _Claim(
        _IN_MEDYATES_POOL,
        "d-full-random",
        "at the same cost, the layers by LaRa hold more of the gradient than all layers, equation 9 (MeDyate)",
    ),
    _Claim(
        "medyate",
        _IN_MEDYATES_POOL,
        "from the second epoch on, drawing by the norms seen so far holds more of the gradient than drawing evenly from the same "
        "layers (MeDyate)",
        first=1,
    ),
)


def _shares(drawn_by: Mapping[str, _Runs]) -> Iterator[tuple[str, str, str]]:
    """Claims and what was found, of the gradient's norm that selections hold."""
    for claim in _CLAIMS:
        more, less = (
            {
                key: statistics.fmean(100 * pair[0] for pair in run.held[claim.first :])
                for key, run in drawn_by.get(drawn, {}).items()
                if run.held[claim.first :]
            }
            for drawn in (claim.more, claim.less)
        )
        both = more.keys() & less.keys()
        if both:
            test = paired_test(more, less)
            of_more, of_less = (statistics.fmean(shares[key] for key in both) for shares in (more, less))
            yield (
                claim.sentence,
                test.verdict,
                f"{of_more:.1f}% of its norm against {of_less:.1f}%, {test.words} over {_pairs(test)}",
            )


def _pairs(test: PairedTest) -> str:
    return f"{counted(test.pairs, 'pair')} of task and seed"


#: Correlation from which ranks count as lasting, and bias under which a mean update counts as one along the gradient.
_LASTING, _ALONG = 0.5, 0.1


def _lasting(drawn_by: Mapping[str, _Runs]) -> Iterator[tuple[str, str, str]]:
    """That ranks of now tell those of later, and in how many runs they do."""
    runs = [run for found in drawn_by.values() for run in found.values()]
    lags = [[value for value in run.all_channels if value is not None] for run in runs]
    kept = [min(values) >= _LASTING for values in lags if values]
    if kept:
        means = [f"{statistics.fmean(values):.2f}" if values else "-" for values in _first_and_last_lag(runs)]
        yield (
            f"a channel's rank in its layer lasts, with correlations of at least {_LASTING:g} at all lags (MeDyate draws by norms of "
            "earlier epochs)",
            held(sum(kept), len(kept)),
            f"in {sum(kept)} of {counted(len(kept), 'run')}; on average {means[0]} after an epoch and "
            f"{means[1]} from the first epoch to the end, of selected channels {means[2]} and {means[3]}",
        )


#: Ways of drawing of which one is to have more bias and less variance than the other, in words.
_TRADES = (
    ("trady", "d-full-random", "drawing from the layers with most gradient for what they cost, not from all"),
    (
        "medyate",
        _IN_MEDYATES_POOL,
        "drawing by the norms seen so far, not evenly from the same layers",
    ),
)


def _updates(drawn_by: Mapping[str, _Runs]) -> Iterator[tuple[str, str, str]]:
    """Claims and what was found, of the mean update and the scatter around it."""
    even = drawn_by.get("d-full-random", {})
    biases, lengths = _biases(even), _lengths(even)
    if biases:
        along = sum(bias < _ALONG for bias in biases.values())
        yield (
            f"the mean of even draws from all layers points along the gradient, with a bias under {_ALONG:g} (ours)",
            held(along, len(biases)),
            f"in {along} of {counted(len(biases), 'run')}; it has "
            f"{statistics.fmean(lengths.values()):.1%} of the gradient's length",
        )
    for more, less, words in _TRADES:
        first, second = drawn_by.get(more, {}), drawn_by.get(less, {})
        if _biases(first).keys() & _biases(second).keys():
            bias = paired_test(_biases(first), _biases(second))
            yield f"{words}, adds bias (ours)", bias.verdict, f"{bias.words} over {_pairs(bias)}"
            test = paired_test(_variances(first), _variances(second))
            found = verdict(test.p, -test.difference)
            yield f"{words}, takes variance (ours)", found, f"{test.words} over {_pairs(test)}"


def plot_importance(path: Path, cells: Watched) -> None:
    """Draw what selections hold by epoch, and correlations by lag, two panels a network."""
    groups = _groups(cells)
    networks = list(dict.fromkeys(network for network, _ in groups))
    drawn_by = list(dict.fromkeys(drawn for _, drawn in groups))
    figure, axes_of = panels(2 * len(networks))
    for place, network in enumerate(networks):
        shares, lagged = axes_of[2 * place : 2 * place + 2]
        for number, drawn in enumerate(drawn_by):
            runs = list(groups.get((network, drawn), {}).values())
            starts = [[100 * pair[0] for pair in run.held] for run in runs]
            draw_means(shares, _by_place(starts), label=drawn, **style(number))
            if drawn == "d-det-rgn":
                most = [[100 * share for share in run.holdable] for run in runs]
                draw_means(shares, _by_place(most), label="holdable", **_DOTTED)
            for kind, line in _LINES.items():
                correlations = [getattr(run, kind) for run in runs]
                draw_means(lagged, _by_place(correlations), **style(number) | {"linestyle": line})
        for line, words in zip(_LINES.values(), ("ranks of all", "of selected"), strict=True):
            lagged.plot([], [], color="black", linewidth=1, linestyle=line, label=words)
        shares.set_ylabel("gradient's norm held (%)")
        shares.set_xlabel("epoch")
        lagged.set_ylabel("correlation of ranks")
        lagged.set_xlabel("epochs between")
        for axes in (shares, lagged):
            axes.set_title(network)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
    write_figure(path, figure)


def _by_place(lists: Sequence[Sequence[float | None]]) -> dict[float, list[float]]:
    """The first values of some lists, the second ones, and so on, from 1; without those that are None."""
    return {1.0 + place: _at(lists, place) for place in range(max(map(len, lists), default=0))}


_LINES: Mapping[str, str] = {"all_channels": "-", "selected": "--"}
_DOTTED = {"color": "black", "linestyle": ":", "linewidth": 1}
