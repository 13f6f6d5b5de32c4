"""``ChannelSampler``: which channels train now, inside a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from trady_kernels.batch import Example
from trady_kernels.convert import ConversionReport, conversion_report, select_everywhere, sparse_layers
from trady_kernels.cost import Backward, Budget, Cost, LayerCost, measure_network, total
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.selection.channel_norms import NotFinite
from trady_kernels.selection.fill import that_fit
from trady_kernels.selection.gradient_norms import GradientNorms
from trady_kernels.selection.pool import Pool
from trady_kernels.selection.ranking import LayerRanking
from trady_kernels.selection.resampling import Resampling, SinceDraw
from trady_kernels.selection.schemes import Scheme, find_scheme

Counts = Literal["free", "fixed"]
_VERSION = 2


class NothingSelected(UserWarning):
    """No channel fits into the budget."""


@dataclass(frozen=True)
class LayerSelection:
    """One sparse layer in a selection.

    Attributes:
        layer: its name, channels, and cost of one of them.
        rank: its place in the ranking, from 1; None without a ranking.
        in_pool: whether its channels take part in the draw.
        selected: how many of its channels are selected.
    """

    layer: LayerCost
    rank: int | None
    in_pool: bool
    selected: int

    @property
    def cost(self) -> Cost:
        """Cost of the selected channels."""
        return self.layer.channel * self.selected


class ChannelSampler:
    """Draws the input channels that train, layer by layer, without ever exceeding the budget.

    The scheme orders the pool's channels; each one that still fits is taken, one that would overflow is
    skipped, and the rest goes on: what is left of the budget is less than the cheapest channel left. The
    constructor makes the first draw and selects it in the model's layers. Draws are made on the CPU with a
    generator of the sampler's own: the same seed gives the same channels on any device and rank.

    Args:
        model: a network that ``sparsify`` has converted.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, of the batch
            size, resolution and dtype that training uses.
        budget: an int counts elements of one sample; a string with a unit ("256KiB", "1 MB") the bytes of
            selected weight gradients and stored inputs of the example batch; "5%" is a share of the full cost
            in elements. None is for the schemes without a budget ("head-only", "bias-only", "full"), which ignore it.
        scheme: name of one of ``trady_kernels.selection.SCHEMES``, or a scheme, such as ``SparseUpdate(file)``, for
            this sampler alone.
        ranking: of the model's layers, for the schemes whose pool are the top layers; None makes the pool
            every sparse layer.
        pool: other layers than the scheme's own choice: "97%", "20 layers", "alpha 20%", "only blocks.3, blocks.4" or
            "without blocks.3", as :meth:`trady_kernels.selection.Pool.parse` has it. Of them, those that the scheme
            reaches, at least one.
        counts: "free" draws anew how many channels each layer trains; "fixed" keeps every layer's number
            from the first draw and changes only which channels, so that nothing that depends on shapes is
            rebuilt.
        resampling: when to draw again: "epoch" or "2 epochs", where the loop calls :meth:`resample` at the start of
            every epoch but the first: each time, or every second time; "50 steps" or "norm 60%", where it calls
            :meth:`step` after every step: every 50 of them, or once the norm of the selected channels' gradient has
            fallen under 60% of its first value (each the mean of five steps). Gradients are measured as they arrive, by
            this rule and by "medyate": multiplied by the scale where a ``GradScaler`` scales the loss, so that a new scale
            looks like another gradient. Those that are not finite do not count.
        seed: of the draws.
        gradients: for the schemes that order channels by their gradient, "d-det-rgn" and "s-det-rgn": called before
            each draw, the first one included, and returns what :func:`trady_kernels.channel_norms` does, such as
            ``lambda: channel_norms(model, batches, loss_fn)``. Other schemes never call it.

    Attributes:
        budget: the parsed ``Budget``, or None.
        resampling: the parsed rule.
        layers: ``{layer name: LayerCost}`` of every sparse layer, in the order of their first calls.
        pool: names of the layers that take part.
        full_cost: ``Cost`` of all channels of all sparse layers.

    Raises:
        TypeError, ValueError: a bad argument, or a model without sparse layers. Nothing is selected then.
        RuntimeError: as for :meth:`resample`.

    Warns:
        NothingSelected: the budget is below the pool's cheapest channel.

    Source: TraDy, arXiv 2510.19675, section 4.2.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Example,
        *,
        budget: int | str | Budget | None,
        scheme: str | Scheme = "trady",
        ranking: LayerRanking | None = None,
        pool: str | Pool | None = None,
        counts: Counts = "free",
        resampling: str = "epoch",
        seed: int = 0,
        gradients: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self._scheme = find_scheme(scheme)
        if self._scheme.needs_gradients and not callable(gradients):
            raise (ValueError if gradients is None else TypeError)(
                f"gradients: got {_short(gradients)}, expected a function that measures the norms of all channels' gradients, "
                f"which the scheme {self._scheme.name} draws by: lambda: channel_norms(model, batches, loss_fn)"
            )
        if counts not in ("free", "fixed"):
            raise ValueError(f"counts: got {counts!r}, expected 'free' or 'fixed'")
        self.resampling = Resampling.parse(resampling)
        if isinstance(seed, bool) or not isinstance(seed, int | Integral):
            raise TypeError(f"seed: got {seed!r}, expected an int")
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed: got {seed}, expected one of 64 bits")
        if ranking is not None and not isinstance(ranking, LayerRanking):
            raise TypeError(f"ranking: got {type(ranking).__name__}, expected a LayerRanking or None")
        if budget is None and not self._scheme.budgeted:
            self.budget = None
        else:
            self.budget = Budget.parse(budget)  # type: ignore[arg-type]
        modules = sparse_layers(model)
        if ranking is not None:
            _check_ranking(ranking, modules, model)
        self._conversion = _report_or_none(model)
        if self._scheme.biases is True and not (
            any(layer.trains_beside_rows for layer in modules.values())
            or (self._conversion is not None and self._conversion.biases)
        ):
            raise ValueError(
                f"scheme: got {self._scheme.name!r} for a network whose biases are frozen, expected one from "
                "sparsify(model, biases=True)"
            )
        network = measure_network(model, example_input)
        uncalled = [name for name in modules if name not in network.layers]
        if uncalled:
            raise ValueError(
                f"example_input: the run does not call the sparse layer {uncalled[0]!r}, expected one that "
                "calls every sparse layer: give sparsify the same example"
            )
        self.layers: dict[str, LayerCost] = {
            name: cost for name, cost in network.layers.items() if name in modules
        }
        self.pool: list[str] = self._scheme.pool(self.layers, ranking, self.budget)
        if pool is not None:
            self.pool = self._pool_asked_for(pool, ranking)
        if not self.pool and self._scheme.takes_pool:
            reached = " or ".join(self._scheme.reach(self.layers)[-2:])
            raise ValueError(
                f"pool: got {pool!r}, in which the scheme {self._scheme.name} has no layer to draw from, expected "
                f"layers that it reaches, such as {reached}"
            )
        self.full_cost: Cost = total(cost.full for cost in self.layers.values())
        self._modules = modules
        self._network = network
        self._called = {name: model.get_submodule(name) for name in network.layers}
        self._ranking = ranking
        self._own_pool = pool is None
        self._counts = counts
        self._measure = gradients
        self._generator = torch.Generator().manual_seed(int(seed))
        self._fixed: dict[str, int] | None = None
        watches = self._scheme.observes or self.resampling.kind == "norm"
        self._gradients = GradientNorms(modules if watches else {})
        self._since_draw = SinceDraw()
        self._select(self._draw(), None)
        if nothing := self._below_cheapest():
            warnings.warn(f"budget: got {budget!r}, {nothing}", NothingSelected, stacklevel=2)
        if counts == "fixed":
            self._fixed = {name: len(channels) for name, channels in self._selection.items()}

    # -- what is selected --------------------------------------------------------------------------

    @property
    def selection(self) -> dict[str, torch.Tensor]:
        """``{layer name: (k,) int64, sorted}`` of every sparse layer, on the CPU."""
        return dict(self._selection)

    @property
    def cost(self) -> Cost:
        """Cost of the current selection."""
        return total(self.layers[name].channel * len(channels) for name, channels in self._selection.items())

    @property
    def backward(self) -> Backward:
        """Cost of the backward pass for the current selection and the dense layers that train."""
        trained = {name: len(channels) for name, channels in self._selection.items() if len(channels)}
        for name, module in self._called.items():
            if name in trained:
                continue
            if isinstance(module, SparseChannels):  # its weight never requires a gradient itself
                if module.trains_beside_rows:
                    trained[name] = 0
            elif any(parameter.requires_grad for parameter in module.parameters()):
                weight = getattr(module, "weight", None)
                whole = weight is not None and weight.requires_grad
                trained[name] = self._network.layers[name].channels if whole else 0
        return self._network.backward(trained)

    @property
    def full_backward(self) -> Backward:
        """Cost of full fine-tuning's backward pass: all weight gradients, all input gradients but the first layer's."""
        return self._network.full_backward

    def resample(self, optimizer: Optimizer | None = None) -> None:
        """Draw again, if the scheme does, and select the new channels in the model's layers; of "2 epochs" every second time.

        Args:
            optimizer: one that holds the layers' ``channel_weight``s: its state is rearranged now instead
                of at its next step.

        Raises:
            TypeError, NotImplementedError: what the layers' ``select()`` raises; no layer has changed then.
            ValueError: with fixed counts, a scheme's order leaves too few channels of a layer; no layer has changed then.
            RuntimeError: a layer's ``weight`` and ``channel_weight`` were both written; no layer has changed then.
        """
        if not self._scheme.every_epoch:
            return
        if self.resampling.kind == "epoch":
            self._since_draw.epochs += 1
            if not self._since_draw.is_due(self.resampling):
                return
        before = self._generator.get_state(), self._scheme.state_dict()
        try:
            for name, norms in self._gradients.means().items() if self._scheme.observes else ():
                self._scheme.observe(name, self.layers[name].channels, self._selection[name], norms)
            self._select(self._draw(), optimizer)
        except BaseException:
            self._generator.set_state(before[0])
            self._scheme.load_state_dict(before[1])
            self._since_draw.epochs -= self.resampling.kind == "epoch"
            raise

    def step(self, optimizer: Optimizer | None = None) -> bool:
        """Tell that a training step is done; draw again if the rule of ``resampling`` asks for it.

        Args:
            optimizer: as for :meth:`resample`.

        Returns:
            Whether new channels train from now on.
        """
        if self.resampling.kind == "epoch" or not self._scheme.every_epoch:
            return False
        if self.resampling.kind == "norm":
            self._since_draw.note(self._gradients.latest())
        else:
            self._since_draw.count()
        if not self._since_draw.is_due(self.resampling):
            return False
        self.resample(optimizer)
        return True

    def _select(self, selection: dict[str, torch.Tensor], optimizer: Optimizer | None) -> None:
        select_everywhere(self._modules, selection, optimizer)
        self._selection = selection
        self._gradients.restart()
        self._since_draw = SinceDraw()

    def _pool_asked_for(self, pool: str | Pool, ranking: LayerRanking | None) -> list[str]:
        rule = pool if isinstance(pool, Pool) else Pool.parse(pool)
        if not self._scheme.takes_pool:
            raise ValueError(
                f"pool: got {pool!r} for the scheme {self._scheme.name}, which chooses its layers itself, expected None"
            )
        if rule.ranked and (ranking is None or rule.metric not in (None, ranking.metric)):
            given = "no ranking" if ranking is None else f"a ranking by {ranking.metric}"
            wanted = "one" if rule.metric is None else f"one by {rule.metric}"
            raise ValueError(
                f"ranking: got {given} for the pool {pool!r}, expected {wanted}: rank_layers(model, ...)"
            )
        found, reached = rule.layers(self.layers, ranking, self.budget), set(self._scheme.reach(self.layers))
        return [name for name in found if name in reached]

    def _draw(self) -> dict[str, torch.Tensor]:
        sizes = [self.layers[name].channels for name in self.pool]
        starts = [0, *accumulate(sizes)]
        if self._scheme.needs_gradients:
            self._scheme.measure(self._measured(), self.layers)
        order = self._scheme.order(dict(zip(self.pool, sizes, strict=True)), self._generator)
        if self._fixed is not None:
            taken = self._fill_counts(order, sizes)
        elif self._limit is None:
            taken = order
        else:
            taken = self._fill_budget(order, sizes, self._limit)
        selection = {name: torch.empty(0, dtype=torch.int64) for name in self.layers}
        ordered = taken.sort().values
        edges = torch.searchsorted(ordered, torch.tensor(starts)).tolist()
        for index, name in enumerate(self.pool):
            selection[name] = ordered[edges[index] : edges[index + 1]] - starts[index]
        return selection

    def _measured(self) -> dict[str, torch.Tensor]:
        assert self._measure is not None
        norms = self._measure()
        for name, layer in self.layers.items():
            found = norms.get(name)
            fits = found is not None and found.shape == (layer.channels,)
            if found is None or not fits or not torch.isfinite(found).all():
                raise (NotFinite if fits else ValueError)(
                    f"gradients: the function gave {_short(found)} for layer {name!r}, expected the norms of "
                    f"{layer.channels} channels, finite, as channel_norms returns them"
                )
        return {name: norms[name].detach().cpu() for name in self.layers}

    def _below_cheapest(self) -> str | None:
        """What to say of a budget that no channel of the pool fits into."""
        limit = self._limit
        if self.budget is None or limit is None or not self.pool:
            return None
        cheapest = min(self.budget.of(self.layers[name].channel) for name in self.pool)
        if limit >= cheapest:
            return None
        unit = "bytes" if self.budget.kind == "bytes" else "elements"
        return f"below the cheapest channel ({cheapest:,} {unit}): nothing is selected"

    @property
    def _limit(self) -> int | None:
        return self.budget.limit(self.full_cost) if self.budget and self._scheme.budgeted else None

    def _fill_budget(self, order: torch.Tensor, sizes: list[int], limit: int) -> torch.Tensor:
        """The channels of ``order`` that fit, each in its turn."""
        assert self.budget is not None
        if not sizes:
            return order
        prices = torch.tensor([self.budget.of(self.layers[name].channel) for name in self.pool])
        return that_fit(order, prices.repeat_interleave(torch.tensor(sizes)), limit)

    def _fill_counts(self, order: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The first k channels of ``order`` in each layer, k being the layer's fixed count."""
        assert self._fixed is not None
        if not sizes:
            return order
        layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        layers = layer_of[order]
        by_layer = order[layers.sort(stable=True).indices]
        tried = layers.bincount(minlength=len(sizes))  # not sizes: an order may leave channels out
        parts = by_layer.split(tried.tolist())
        for part, name in zip(parts, self.pool, strict=True):
            if len(part) < self._fixed[name]:
                raise ValueError(
                    f"counts: got 'fixed' for the scheme {self._scheme.name}, whose order has {len(part)} channels of "
                    f"layer {name!r} now, expected at least the {self._fixed[name]} of the first draw; give 'free'"
                )
        return torch.cat([part[: self._fixed[name]] for part, name in zip(parts, self.pool, strict=True)])

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The current selection, the state of the generator and what a scheme has observed: what the next draws need."""
        return {
            "version": _VERSION,
            "scheme": self._scheme.name,
            "counts": self._counts,
            "budget": str(self.budget),
            "pool": list(self.pool),
            "generator": self._generator.get_state(),
            "observed": self._scheme.state_dict(),
            "gradients": self._gradients.state_dict(),
            "resampling": str(self.resampling),
            "since_draw": self._since_draw.state_dict(),
            "selection": {name: channels.clone() for name, channels in self._selection.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Select what the saved sampler had selected, and go on drawing as it would have.

        Load the model before, and the optimiser after: the state it saved belongs to these channels.

        Raises:
            ValueError: the state is of another version, scheme, budget, pool or network, or damaged. Nothing has
                changed then.
            RuntimeError: as for :meth:`resample`. Nothing has changed then.
        """
        ours = self.state_dict()
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(ours):
            raise ValueError(
                f"state_dict: got {type(state_dict).__name__} with other entries, expected what "
                "ChannelSampler.state_dict() returned"
            )
        for key in ("version", "scheme", "counts", "budget", "pool", "resampling"):
            if state_dict[key] != ours[key]:
                raise ValueError(
                    f"state_dict: got {key} {_short(state_dict[key])}, expected {_short(ours[key])}, that of "
                    "this sampler"
                )
        with _reading(state_dict, "selection"):
            selection = {name: torch.as_tensor(c).cpu() for name, c in state_dict["selection"].items()}
        if {
            name: _fits(channels, self.layers.get(name)) for name, channels in selection.items()
        } != dict.fromkeys(self.layers, True):
            raise ValueError("state_dict: got a selection of other layers, expected one of this network's")
        generator, since_draw = torch.Generator(), SinceDraw()
        with _reading(state_dict, "generator"):
            generator.set_state(state_dict["generator"].cpu())
        with _reading(state_dict, "gradients"):
            gradients = self._gradients.checked(state_dict["gradients"], selection)
        with _reading(state_dict, "since_draw"):
            since_draw.load_state_dict(state_dict["since_draw"])
        observed = self._scheme.state_dict()
        try:
            with _reading(state_dict, "observed"):
                self._scheme.load_state_dict(state_dict["observed"])
            self._select(selection, None)
        except BaseException:
            self._scheme.load_state_dict(observed)
            raise
        self._generator = generator
        self._gradients.load_state_dict(gradients)
        self._since_draw = since_draw
        if self._fixed is not None:
            self._fixed = {name: len(channels) for name, channels in selection.items()}

    # -- for readers -------------------------------------------------------------------------------

    @property
    def scheme(self) -> str:
        """Name of the scheme."""
        return self._scheme.name

    def layer_selections(self) -> list[LayerSelection]:
        """Every sparse layer with its cost, its place in the ranking and how much of it is selected."""
        ranks = {name: rank for rank, name in enumerate(self._ranking or (), start=1)}
        members = set(self.pool)
        return [
            LayerSelection(layer, ranks.get(name), name in members, len(self._selection[name]))
            for name, layer in self.layers.items()
        ]

    def report(self) -> str:
        """The selection as a table: per layer k of C channels, cost of one and of all k; totals and notes."""
        header = (
            "layer", "rank", "pool", "channels", "elements each", "MACs each", "selected", "elements", "bytes", "MACs",
        )  # fmt: skip
        rows = [
            (
                entry.layer.name,
                "-" if entry.rank is None else str(entry.rank),
                "yes" if entry.in_pool else "no",
                f"{entry.layer.channels:,}",
                f"{entry.layer.channel.elements:,}",
                f"{entry.layer.channel.macs:,}",
                *_spent(entry.selected, entry.cost),
            )
            for entry in self.layer_selections()
        ]
        channels = sum(layer.channels for layer in self.layers.values())
        selected = sum(len(channels) for channels in self._selection.values())
        pool = f"{len(self.pool)} of {len(self.layers)}"
        rows.append(("total", "", pool, f"{channels:,}", "", "", *_spent(selected, self.cost)))
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (header, *rows)
        ]
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        full, cost, limit = self.full_cost, self.cost, self._limit
        notes = [f"scheme {self._scheme.name}, counts {self._counts}, resampling {self.resampling}"]
        if self.budget is None or limit is None:
            notes.append(f"the scheme {self._scheme.name} has no budget")
        else:
            unit = "bytes" if self.budget.kind == "bytes" else "elements"
            notes.append(f"budget {self.budget}: {self.budget.of(cost):,} of {limit:,} {unit} used")
            if limit >= self.budget.of(total(self.layers[name].full for name in self.pool)):
                whole = "everything" if len(self.pool) == len(self.layers) else "the whole pool"
                notes.append(f"the budget is above the full cost of the pool: {whole} is selected")
            elif nothing := self._below_cheapest():
                notes.append(f"the budget is {nothing}")
        notes.append(
            f"{cost.elements / full.elements:.2%} of the full cost ({full.elements:,} elements), "
            f"{cost.macs / max(full.macs, 1):.2%} of its weight-gradient multiply-accumulates"
        )
        notes.append(self._backward_note())
        if self._scheme.needs_gradients:
            notes.append(
                "an oracle: it draws by the gradients of all channels, whose measurement the budget does not cover"
            )
        ranking = self._ranking
        if self._scheme.ranked and ranking is None:
            notes.append("no ranking given: the pool is every sparse layer")
        elif ranking is not None and self._draws_by_other_than(ranking):
            notes.append(
                f"ranked by {ranking.metric}, where {self._scheme.name} takes {self._scheme.metric}: "
                f"rank_layers(..., metric={self._scheme.metric!r})"
            )
        if self._conversion is not None:
            head = self._conversion.head
            notes.append(
                f"head (dense, trains, not in the budget): {head}" if head is not None else "no head"
            )
            if biases := self._conversion.biases:
                notes.append(
                    f"biases (train, not in the budget): {len(biases)}, {sum(biases.values()):,} elements"
                )
            notes += [
                f"stays dense and frozen: {name}, {why}" for name, why in self._conversion.dense.items()
            ]
        return notes

    def _draws_by_other_than(self, ranking: LayerRanking) -> bool:
        return self._scheme.ranked and self._own_pool and ranking.metric != self._scheme.metric

    def _backward_note(self) -> str:
        backward, full = self.backward, self.full_backward
        if backward.ends_at is None:
            return "the backward pass computes nothing: no layer trains"
        order = list(self._called)
        weights, inputs = 2 * backward.weight_grad_macs, 2 * backward.input_grad_macs
        return (
            f"the backward pass ends at {backward.ends_at}, layer {order.index(backward.ends_at) + 1} of "
            f"{len(order)} in the order of calls: {backward.flops:,} FLOPs a sample, {weights:,} for weight gradients "
            f"and {inputs:,} for input gradients, {backward.flops / max(full.flops, 1):.2%} of a full one "
            f"({full.flops:,})"
        )


def _spent(selected: int, cost: Cost) -> tuple[str, ...]:
    return f"{selected:,}", f"{cost.elements:,}", f"{cost.bytes:,}", f"{cost.macs:,}"


def _report_or_none(model: nn.Module) -> ConversionReport | None:
    try:
        return conversion_report(model)
    except ValueError:  # sparse layers put there by hand
        return None


def _check_ranking(ranking: LayerRanking, layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    known = {name for name, _ in model.named_modules()}
    foreign = [name for name in ranking if name not in known]
    missing = [name for name in layers if name not in ranking]
    if foreign or missing:
        wrong = f"names {foreign[0]!r}" if foreign else f"lacks {missing[0]!r}"
        raise ValueError(
            f"ranking: got one that {wrong}, expected a score for each sparse layer of this network: "
            "rank_layers(model, ...) makes one"
        )


def _fits(channels: torch.Tensor, layer: LayerCost | None) -> bool:
    if layer is None or channels.dim() != 1 or channels.dtype != torch.int64:
        return False
    return not len(channels) or bool(
        channels[0] >= 0 and channels[-1] < layer.channels and (channels[1:] > channels[:-1]).all()
    )


@contextmanager
def _reading(state_dict: Mapping[str, Any], key: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of that entry."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise ValueError(
            f"state_dict: got {key} {_short(state_dict[key])}, expected that of ChannelSampler.state_dict() for this "
            "network"
        ) from None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
