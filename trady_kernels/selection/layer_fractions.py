"""``LayerFractions``: which share of each layer trains, given as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trady_kernels.cost import Budget, Cost, LayerCost, total
from trady_kernels.selection.saved import Saved

#: Shares of a layer's input channels that may train [Sparse Update, arXiv 2206.15472, section 3.2].
FRACTIONS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class LayerFractions(Saved):
    """The share of every layer's input channels that trains: always the first ones.

    Args:
        network: name of the network that they are for.
        budget: that they were made for, as ``ChannelSampler`` takes it.
        layers: ``{layer name: 0, 1/8, 1/4, 1/2 or 1}``; a layer that is not there has 0.
        bias_layers: how many of the last layers train their bias too.
        contributions: ``{layer name: {fraction: gain}}`` that a search measured, each alone: what fractions for another
            budget are chosen by.

    Raises:
        TypeError, ValueError: an argument is not of that kind.

    Source: Lin et al., On-Device Training Under 256KB Memory, arXiv 2206.15472, section 3.2.
    """

    format = "trady-layer-fractions"
    words = "file of layer fractions"
    folder = "fractions"
    network: str
    budget: int | str
    layers: Mapping[str, float] = field(default_factory=dict)
    bias_layers: int = 0
    contributions: Mapping[str, Mapping[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.network, str) or not self.network:
            raise ValueError(f"network: got {self.network!r}, expected the network's name")
        Budget.parse(self.budget)
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers: got {type(self.layers).__name__}, expected {{layer name: fraction}}")
        for name, fraction in self.layers.items():
            if not isinstance(name, str) or isinstance(fraction, bool) or fraction not in FRACTIONS:
                raise ValueError(
                    f"layers: got {fraction!r} for layer {name!r}, expected one of 0, 0.125, 0.25, 0.5 and 1"
                )
        whole = isinstance(self.bias_layers, int) and not isinstance(self.bias_layers, bool)
        if not whole or self.bias_layers < 0:
            raise ValueError(f"bias_layers: got {self.bias_layers!r}, expected a number of layers from 0")

    def within(self, budget: Budget, layers: Mapping[str, LayerCost]) -> LayerFractions:
        """These fractions, or where the contributions are known those for another budget or input.

        Args:
            budget: of the selection.
            layers: every sparse layer of the network.

        Raises:
            ValueError: these fractions cost more than the budget and have no contributions, or are of another network.
        """
        cost, limit = self.cost(layers), budget.limit(total(layer.full for layer in layers.values()))
        # A share of the full cost is another one with another input.
        if self.contributions and (budget != Budget.parse(self.budget) or budget.of(cost) > limit):
            chosen = choose_fractions(self.contributions, layers, budget)
            # A share may round to nothing, which is no budget; one buys nothing either.
            made_for = max(limit, 1)
            written = f"{made_for} B" if budget.kind == "bytes" else made_for
            return replace(self, budget=written, layers=chosen)
        if budget.of(cost) > limit:
            unit = "bytes" if budget.kind == "bytes" else "elements"
            raise ValueError(
                f"budget: got {budget}, but the layer fractions for {self.network} cost "
                f"{budget.of(cost):,} {unit} with this input, expected a budget of at least that, or other fractions"
            )
        return self

    def channels_of(self, layer: LayerCost) -> int:
        """How many of a layer's channels train: the fraction of them, rounded down."""
        return math.floor(self.layers.get(layer.name, 0.0) * layer.channels)

    def cost(self, layers: Mapping[str, LayerCost]) -> Cost:
        """Cost of all channels that train.

        Args:
            layers: every sparse layer of the network.

        Raises:
            ValueError: a fraction is of no layer of it.
        """
        for name in (*self.layers, *self.contributions):
            if name not in layers:
                raise ValueError(
                    f"layers: got a fraction for {name!r}, expected sparse layers of this network: these fractions are "
                    f"for {self.network}"
                )
        return total(layer.channel * self.channels_of(layer) for layer in layers.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "budget": self.budget,
            "layers": dict(self.layers),
            "bias_layers": self.bias_layers,
            "contributions": {name: dict(gains) for name, gains in self.contributions.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerFractions:
        contributions = {
            name: {float(fraction): float(gain) for fraction, gain in alone.items()}
            for name, alone in data.get("contributions", {}).items()
        }
        network, budget, layers, bias_layers = map(data.get, ("network", "budget", "layers", "bias_layers"))
        return cls(network, budget, layers, bias_layers, contributions)  # type: ignore[arg-type]

    @classmethod
    def shipped(cls, network: str) -> LayerFractions:
        """The fractions of an embedded network that come with the package.

        Args:
            network: its name, such as "efficientnet_lite0".

        Raises:
            ValueError: none are shipped for that network.
        """
        try:
            return cls._shipped(network)
        except KeyError as error:
            raise ValueError(
                f"network: got {network!r}, expected one that layer fractions ship for "
                f"({', '.join(error.args) or 'none'}), or a file with them, which trady search makes"
            ) from None


def choose_fractions(
    contributions: Mapping[str, Mapping[float, float]],
    layers: Mapping[str, LayerCost],
    budget: Budget,
) -> dict[str, float]:
    """Fractions that contribute most for what they cost, inside a budget, chosen greedily.

    From nothing, the layer whose next larger fraction adds most to the sum of contributions per unit of cost is
    enlarged, until nothing that adds fits.

    Args:
        contributions: ``{layer name: {fraction: gain}}``, in any unit, of the layer alone; 0 has the gain 0.
        layers: costs of every sparse layer.
        budget: of the selection.

    Returns:
        ``{layer name: fraction}`` of the layers that train.
    """
    left = budget.limit(total(layer.full for layer in layers.values()))

    def price(name: str, fraction: float) -> int:
        layer = layers[name]
        return budget.of(layer.channel * math.floor(fraction * layer.channels))

    chosen = dict.fromkeys(contributions, 0.0)
    while True:
        best: tuple[float, str, float] | None = None
        for name, gains in contributions.items():
            now = chosen[name]
            for fraction, gain in gains.items():
                added, cost = gain - gains.get(now, 0.0), price(name, fraction) - price(name, now)
                if fraction > now and added > 0 and 0 < cost <= left:
                    step = (added / cost, name, fraction)
                    best = max(best, step, key=lambda known: known[0]) if best else step
        if best is None:
            return {name: fraction for name, fraction in chosen.items() if fraction}
        _, name, fraction = best
        left -= price(name, fraction) - price(name, chosen[name])
        chosen[name] = fraction
