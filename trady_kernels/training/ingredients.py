"""What a scheme can be combined with: ``trady+bias`` is the scheme ``trady`` with the ingredient ``bias``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trady_kernels.batch import Example
from trady_kernels.cost import Budget
from trady_kernels.selection import SCHEMES
from trady_kernels.training.checkpointing import checkpoint_blocks
from trady_kernels.training.norm_statistics import estimate_norm_statistics


@dataclass(frozen=True)
class Ingredient:
    """Something that goes with a scheme.

    Attributes:
        name: how users call it, after a "+".
        note: what it does, as a reader of the results must know it.
        sparsify: arguments of ``sparsify`` that it sets.
        prepare: called with the plain network and inputs of training batches, before anything else is made of it.
        dense: called with a network of which no channels are chosen, before its training, also when a run goes on.
        at_once: samples that go forward and backward at a time; None for the whole batch.
        momentum: of SGD.
        exact: whether a step without it has the same gradients but for rounding, so that its learning rate serves; not of a
            scheme that observes gradients. At a rate that is nearly too high rounding alone makes another training of it.
    """

    name: str
    note: str
    sparsify: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Iterable[Example]], None] | None = None
    dense: Callable[[nn.Module], None] | None = None
    at_once: int | None = None
    momentum: float = 0.0
    exact: bool = False

    def fits(self, scheme: str) -> bool:
        """Whether it goes with the scheme of that name."""
        return not (self.sparsify if scheme in WITHOUT_CHANNELS else self.dense)


#: Schemes that train a network without choosing channels of it, by name: whether a budget bounds what trains.
WITHOUT_CHANNELS = {"full": False, "velocity": True, "lora": True}
#: By name; another one joins them by ``INGREDIENTS[mine.name] = mine``.
INGREDIENTS: dict[str, Ingredient] = {
    ingredient.name: ingredient
    for ingredient in (
        Ingredient(
            "bias",
            "biases of layers and frozen norms train, outside the budget; no activation is kept for them, but down to "
            "the lowest of them one bit for each element of a ReLU",
            sparsify={"biases": True},
        ),
        Ingredient(
            "8bit",
            "what is kept for backward, selected channels too, is packed into 8 bits, so that gradients are not exact",
            sparsify={"lean": "8bit", "stored": "8bit"},
        ),
        Ingredient(
            "stats",
            "norm statistics are those of the training samples, estimated by forward passes before training",
            prepare=estimate_norm_statistics,
        ),
        Ingredient(
            "checkpoint",
            "what is inside a block is computed again in the backward pass",
            dense=checkpoint_blocks,
            exact=True,
        ),
        Ingredient(
            "accumulate",
            "samples go forward and backward one by one, their gradients added up over the batch",
            at_once=1,
            exact=True,
        ),
        Ingredient(
            "momentum",
            "SGD with momentum 0.9: the optimiser keeps as much again as the weights that train, channels that leave "
            "give theirs up",
            momentum=0.9,
        ),
    )
}


#: Combinations with a name of their own.
#: frugal: the last layers, so that nothing is kept below them; biases, which keep nothing; a byte instead of four for the
#: rest, so that the same bytes hold more channels; momentum, which pays for its state (docs/results.md).
#: ample: the same in the layers that trady draws from, for networks most of whose bytes no selection saves.
PRESETS = {"frugal": "late+bias+8bit+momentum", "ample": "trady+bias+8bit+momentum"}


def scheme_names() -> list[str]:
    """Every scheme that a training takes: those that choose channels, the others, presets."""
    return list(dict.fromkeys([*SCHEMES, *WITHOUT_CHANNELS, *PRESETS]))


def tuned_as(text: str) -> str:
    """The spec whose learning rate serves for this one: without the ingredients that leave its numbers as they are."""
    scheme = Spec.parse(text).scheme
    if scheme in SCHEMES and SCHEMES[scheme].observes:
        return text  # what it observes, and then draws, is the norm of every backward pass, not of the batch's gradient
    combined, at, own = text.partition("@")
    first, *names = combined.split("+")
    return "+".join([first, *(name for name in names if not INGREDIENTS[name].exact)]) + at + own


@dataclass(frozen=True)
class Spec:
    """A scheme and what it is combined with.

    Attributes:
        scheme: name of the scheme.
        ingredients: in the order given; first those that the scheme itself consists of.
        budget: its own, in place of the settings'; None without one.
    """

    scheme: str
    ingredients: tuple[Ingredient, ...]
    budget: str | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """The spec that a user means: the name of a scheme or preset, of ingredients, each after a "+", a budget after an "@".

        Raises:
            ValueError: no such scheme or ingredient, one given twice, or one that the scheme cannot have.
        """
        combined, at, own = text.partition("@")
        first, *names = combined.split("+")
        scheme, *preset = PRESETS.get(first, first).split("+")
        names = [*preset, *names]
        if scheme not in scheme_names():
            raise ValueError(f"scheme: got {scheme!r}, expected one of {', '.join(scheme_names())}")
        for name in names:
            if name not in INGREDIENTS:
                raise ValueError(
                    f"scheme: got {text!r}, in which {name!r} is no ingredient, expected one of "
                    f"{', '.join(INGREDIENTS)} after a +"
                )
        if scheme in SCHEMES and SCHEMES[scheme].biases:
            names = ["bias", *names]
        ingredients = tuple(INGREDIENTS[name] for name in names)
        if len(set(names)) < len(names):
            raise ValueError(f"scheme: got {text!r}, which has an ingredient twice, expected each one once")
        if not all(ingredient.fits(scheme) for ingredient in ingredients):
            raise ValueError(
                f"scheme: got {text!r}, expected only ingredients that go with {scheme}: "
                f"{', '.join(name for name, known in INGREDIENTS.items() if known.fits(scheme))}"
            )
        spec = cls(scheme, ingredients)
        if not at:
            return spec
        if not spec.budgeted:
            raise ValueError(
                f"scheme: got {text!r}, expected no budget after the scheme {scheme}, which has none"
            )
        Budget.parse(own)
        return cls(scheme, ingredients, own)

    @property
    def budgeted(self) -> bool:
        """Whether a budget bounds what trains."""
        return SCHEMES[self.scheme].budgeted if self.scheme in SCHEMES else WITHOUT_CHANNELS[self.scheme]

    @property
    def at_once(self) -> int | None:
        """Samples that go forward and backward at a time; None for the whole batch."""
        return min((part.at_once for part in self.ingredients if part.at_once), default=None)

    @property
    def momentum(self) -> float:
        """Momentum of SGD; 0 without one."""
        return max((part.momentum for part in self.ingredients), default=0.0)

    @property
    def sparsify(self) -> dict[str, Any]:
        """Arguments of ``sparsify`` that the ingredients set."""
        return {name: value for part in self.ingredients for name, value in part.sparsify.items()}

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know about the ingredients."""
        return [ingredient.note for ingredient in self.ingredients]
