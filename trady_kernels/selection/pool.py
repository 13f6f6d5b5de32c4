"""Pools: which layers' channels take part in a draw, by the layers' places in a ranking or by their names."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trady_kernels.cost import Budget, LayerCost, total

if TYPE_CHECKING:
    from trady_kernels.selection.ranking import LayerRanking


@dataclass(frozen=True)
class Pool(ABC):
    """A rule for which layers take part.

    Attributes:
        metric: that of the ranking it goes by; None takes any.
        ranked: whether it goes by a ranking.
    """

    metric: str | None = None
    ranked: ClassVar[bool] = True

    @staticmethod
    def parse(text: str) -> Pool:
        """The pool that a user means.

        ``"97%"``: the first layers of the ranking that hold that share of its cumulative score. ``"20 layers"``: so many
        first ones. ``"alpha 20%"``: the first ones of whose cost the budget is at most that share. Each may name the
        ranking's metric: ``"20 layers by lara"``. ``"only blocks.3, head"``, ``"without blocks.3"``: layers by name, or
        all those inside a module.

        Raises:
            ValueError: it reads as none of these, or a number is out of range.
        """
        for pattern, make in _PATTERNS:
            match = re.fullmatch(pattern, text) if isinstance(text, str) else None
            if match is not None and (pool := make(match)) is not None:
                return pool
        raise ValueError(
            f'pool: got {text!r}, expected "97%", "20 layers", "alpha 20%", each with " by lara" or another metric where '
            'the ranking has to be of that one, "only NAME, NAME" or "without NAME"'
        )

    @abstractmethod
    def layers(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        """Names of the layers that take part, in the order of ``layers``; of a pool that goes by a ranking every layer
        where there is none.

        Args:
            layers: every sparse layer.
            ranking: of them, or None.
            budget: of the selection.

        Raises:
            ValueError: a name that is not one of theirs.
        """


@dataclass(frozen=True)
class RankedPool(Pool):
    """The first layers of a ranking; every layer where there is none."""

    def layers(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        if ranking is None:
            return list(layers)
        top = set(self._first(layers, ranking, budget))
        return [name for name in layers if name in top]

    @abstractmethod
    def _first(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking, budget: Budget | None
    ) -> Iterable[str]: ...


@dataclass(frozen=True)
class ShareOfScore(RankedPool):
    """The first layers of a ranking that hold a share of its cumulative score [TraDy, arXiv 2510.19675, section 4.1]."""

    share: float = 0.97

    def _first(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking, budget: Budget | None
    ) -> Iterable[str]:
        return ranking.top(self.share, among=layers)


@dataclass(frozen=True)
class ShareOfCost(RankedPool):
    """The first layers of a ranking of whose cost the budget is at most a share: the fewest, at least one.

    Source: MeDyate, arXiv 2510.20979, section 4.
    """

    share: float = 0.2

    def _first(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking, budget: Budget | None
    ) -> Iterator[str]:
        if budget is None:
            yield from layers
            return
        limit = budget.limit(total(layer.full for layer in layers.values()))
        cost = 0
        for name in ranking:
            # A small share may round to nothing.
            if name in layers and (not cost or limit > self.share * cost):
                yield name
                cost += budget.of(layers[name].full)


@dataclass(frozen=True)
class FirstLayers(RankedPool):
    """So many first layers of a ranking."""

    count: int = 1

    def _first(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking, budget: Budget | None
    ) -> Iterable[str]:
        return [name for name in ranking if name in layers][: self.count]


@dataclass(frozen=True)
class NamedLayers(Pool):
    """Layers by name.

    Attributes:
        names: of layers, or of modules for all the layers inside.
        inside: whether these take part, or all others.
    """

    names: tuple[str, ...] = ()
    inside: bool = True
    ranked: ClassVar[bool] = False

    def layers(
        self, layers: Mapping[str, LayerCost], ranking: LayerRanking | None, budget: Budget | None
    ) -> list[str]:
        named: set[str] = set()
        for wanted in self.names:
            found = [name for name in layers if name == wanted or name.startswith(f"{wanted}.")]
            if not found:
                examples = " or ".join(dict.fromkeys([next(iter(layers)), list(layers)[-1]]))
                raise ValueError(
                    f"pool: got {wanted!r}, which is no sparse layer and has none inside, expected names such as {examples}"
                )
            named.update(found)
        return [name for name in layers if (name in named) == self.inside]


def _share(text: str) -> float | None:
    share = float(text) / 100
    return share if 0 < share <= 1 else None


def _ranked(
    make: Callable[..., Pool], read: Callable[[str], float | None]
) -> Callable[[re.Match[str]], Pool | None]:
    def pool(match: re.Match[str]) -> Pool | None:
        amount = read(match[1])
        return make(match["metric"], amount) if amount else None

    return pool


def _named(inside: bool) -> Callable[[re.Match[str]], Pool | None]:
    return lambda match: NamedLayers(None, tuple(re.split(r",\s*", match[1])), inside)


_NUMBER, _BY = r"(\d+(?:\.\d+)?)", r"(?: by (?P<metric>\w+))?"
#: What users write, and what it makes, or None where a number is out of range.
_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], Pool | None]], ...] = (
    (rf"{_NUMBER}%{_BY}", _ranked(ShareOfScore, _share)),
    (rf"alpha {_NUMBER}%{_BY}", _ranked(ShareOfCost, _share)),
    (rf"(\d+) layers?{_BY}", _ranked(FirstLayers, int)),
    (r"only (\S+(?:,\s*\S+)*)", _named(True)),
    (r"without (\S+(?:,\s*\S+)*)", _named(False)),
)
