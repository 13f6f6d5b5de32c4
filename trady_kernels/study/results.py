"""The matrix behind ``docs/results.md``: which networks, data and schemes, in three sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from trady_kernels.data import kind_of
from trady_kernels.selection import SCHEMES as CHOOSE_CHANNELS
from trady_kernels.study.matrix import MOST_MOVES, Matrix
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.settings import Settings

T = TypeVar("T")

#: One thread a run, so that as many runs as there are cores go side by side.
IMAGES = Settings(
    model="efficientnet_lite0", train_samples=1000, image_size=64, epochs=5, threads=1, test_once=True
)
SENTENCES = Settings(model="minilm", train_samples=1000, max_length=32, epochs=3, threads=1, test_once=True)
RECIPES: Mapping[str, Settings] = {
    "fashion-mnist": replace(IMAGES, data="fashion-mnist", test_samples=1000),
    "mnist": replace(IMAGES, data="mnist"),
    "digits": replace(IMAGES, data="digits"),
    "movie-reviews": replace(SENTENCES, data="movie-reviews", test_samples=1000),
    "tweets": replace(SENTENCES, data="tweets"),
    "editorials": replace(SENTENCES, data="editorials"),
}
_BY_KIND = {"images": IMAGES, "sentences": SENTENCES}
#: Middle one of the learning rates tried. Lower than what ``trady finetune`` takes by default, for fewer channels and more
#: images: with 1,000 images at 2.2%, seeds of every sampler diverged at 0.2 and some at 0.1.
RATES: Mapping[str, Mapping[str, float]] = {
    "efficientnet_lite0": {"": 0.05, "full": 0.01, "velocity": 0.02},
    "minilm": {"": 0.2, "full": 0.05, "velocity": 0.1, "head-only": 0.5},
}
#: The papers' smallest budget: 27,946 of the 1,252,320 elements of MobileNetV2 0.35.
SMALLEST_BUDGET = "2.2%"
#: Rows by network and budget, in the order in which they run: what others are compared with comes first. A budget after
#: an @ is what makes a step of a scheme need no more measured bytes than one of trady at the table's; of MiniLM, most of whose
#: bytes are not selected channels, frugal does so with all channels of its layers, and ample with most of the network's.
SCHEMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "efficientnet_lite0": {
        SMALLEST_BUDGET: (
            "trady",
            "medyate",
            "frugal@5.2%",
            "ample@1.8%",
            "head-only",
            "full",
            "medyate@0.4%",
            "trady+momentum@1.9%",
            "late@4.5%",
            "d-full-random",
            "s-topk-random",
            "d-det-rgn",
            "bias-only",
            "last-layers",
            "last-layers@16%",
            "sparse-update",
            "velocity",
            "lora",
            "s-full-random",
            "s-det-rgn",
            "full+momentum",
            "full+checkpoint",
            "full+accumulate",
        ),
        "1%": ("trady", "medyate", "frugal@2%"),
        "7%": ("trady", "medyate", "frugal@14%"),
    },
    "minilm": {
        SMALLEST_BUDGET: (
            "trady",
            "medyate",
            "frugal@5.2%",
            "frugal@100%",
            "head-only",
            "full",
            "d-full-random",
            "s-topk-random",
            "d-det-rgn",
            "bias-only",
            "last-layers",
            "last-layers@50%",
            "ample@65%",
            "velocity",
            "lora",
            "s-full-random",
            "s-det-rgn",
            "full+checkpoint",
            "full+accumulate",
        ),
        "1%": ("trady", "medyate", "frugal@2%"),
        "7%": ("trady", "medyate", "frugal@14%"),
    },
}


@dataclass(frozen=True)
class Size:
    """How large a results table or another study is.

    Attributes:
        seeds: of the final runs.
        settings: what differs from the recipes.
        budgets: how many of a network's; None for all.
        moves: how often the learning rates tried move on at most, because the best of them is at an end.
    """

    seeds: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    budgets: int | None = None
    moves: int = MOST_MOVES


#: On a machine with a GPU: all samples, the papers' epochs.
FULL: Mapping[str, Any] = {
    "train_samples": None,
    "test_samples": None,
    "epochs": 50,
    "warmup_epochs": 5,
}
SIZES: Mapping[str, Size] = {
    "quick": Size(
        2, {"train_samples": 100, "test_samples": 100, "epochs": 1, "warmup_epochs": 0.1}, budgets=1, moves=0
    ),
    "usual": Size(),
    "full": Size(settings=FULL),
}


@dataclass(frozen=True)
class Request:
    """What a user asks of a study.

    Attributes:
        size: "quick", "usual" or "full".
        tasks: as :func:`recipe_of` takes them; the study's own by default.
        schemes: of a study that compares or takes some; its own by default.
        ranking: file of a layer ranking for all tasks; None takes those that ship.
        device: where to run.
    """

    size: str = "usual"
    tasks: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    ranking: str | None = None
    device: str = "cpu"


def recipe_of(task: str) -> Settings:
    """Settings of a task: one of ``RECIPES`` by its name, or any network on any data, as in "mobilenet_v2 on digits".

    Raises:
        ValueError: it reads as neither.
    """
    if task in RECIPES:
        return RECIPES[task]
    model, _, data = task.partition(" on ")
    if not model or not data:
        raise ValueError(
            f"task: got {task!r}, expected one of {', '.join(RECIPES)}, or a network and data: 'mobilenet_v2 on digits'"
        )
    return replace(_BY_KIND[kind_of(data)], model=model, data=data)


def _of_network(table: Mapping[str, T], recipe: Settings) -> T:
    """A network's entry; of another one that of ours for the same kind of samples."""
    return table.get(recipe.model, table[_BY_KIND[kind_of(recipe.data)].model])


def middle_rate(recipe: Settings, scheme: str = "") -> float:
    """The middle one of the learning rates tried; "" for a sampler's."""
    rates = _of_network(RATES, recipe)
    return rates.get(scheme, rates[""])


def choosing_channels(schemes: tuple[str, ...]) -> tuple[str, ...]:
    """The schemes of a study of channels that are drawn.

    Raises:
        ValueError: one is no scheme that chooses channels within a budget.
    """
    for scheme in schemes:
        if scheme not in CHOOSE_CHANNELS or not CHOOSE_CHANNELS[scheme].budgeted:
            able = ", ".join(name for name, kind in CHOOSE_CHANNELS.items() if kind.budgeted)
            raise ValueError(f"scheme: got {scheme!r}, expected one of {able}")
    return schemes


def rows_of(recipe: Settings) -> dict[str, tuple[str, ...]]:
    """Rows of the results table by budget, those that a network has what they need for."""
    shipped = recipe.model in RATES or recipe.layer_fractions is not None
    return {
        budget: tuple(scheme for scheme in schemes if shipped or scheme != "sparse-update")
        for budget, schemes in _of_network(SCHEMES, recipe).items()
    }


def study_recipes(request: Request, usual: Iterable[str], sizes: Mapping[str, Size]) -> dict[str, Settings]:
    """Settings of a study's tasks: the recipes of the results table, but for what differs.

    Args:
        request: what a user asks for.
        usual: tasks where a user asks for none.
        sizes: what differs in each size.

    Raises:
        ValueError: no such size or task.
    """
    if request.size not in SIZES:
        raise ValueError(f"size: got {request.size!r}, expected one of {', '.join(SIZES)}")
    own = {"device": request.device, "ranking": request.ranking, **sizes[request.size].settings}
    return {task: replace(recipe_of(task), **own) for task in request.tasks or usual}


def _asked_for(schemes: tuple[str, ...], own: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Rows by budget of the schemes that a user asks for: a network's own where they are, others at every budget.

    With a budget of its own a scheme trains alike at all of them: another one then has the first.
    """

    def budgets(scheme: str) -> list[str]:
        listed = [budget for budget, rows in own.items() if scheme in rows]
        return listed or list(own)[: None if Spec.parse(scheme).budget is None else 1]

    if not schemes:
        return own
    return {budget: tuple(scheme for scheme in schemes if budget in budgets(scheme)) for budget in own}


def results_matrix(request: Request) -> Matrix:
    """The results table's matrix: all tasks of ``RECIPES`` and the rows of each network by default.

    Learning rates are tuned on all tasks of a network whichever are asked for, but in the quick size.

    Raises:
        ValueError: no such size, task or scheme.
    """
    for scheme in request.schemes:
        Spec.parse(scheme)
    asked_recipes = study_recipes(request, RECIPES, SIZES)
    models = {recipe.model for recipe in asked_recipes.values()}
    tuned_on = [task for task, recipe in RECIPES.items() if recipe.model in models]
    tasks = tuple(asked_recipes)
    recipes = study_recipes(
        replace(
            request, tasks=tasks if request.size == "quick" else tuple(dict.fromkeys((*tuned_on, *tasks)))
        ),
        RECIPES,
        SIZES,
    )
    size = SIZES[request.size]
    schemes: dict[str, dict[str, tuple[str, ...]]] = {}
    asked: dict[str, dict[str, tuple[str, ...]]] = {}
    for recipe in recipes.values():
        own = dict(list(rows_of(recipe).items())[: size.budgets])
        asked[recipe.model] = _asked_for(request.schemes, own)
        schemes[recipe.model] = {
            budget: tuple(dict.fromkeys((*own[budget], *rows)))
            for budget, rows in asked[recipe.model].items()
        }
    rates = {recipe.model: _of_network(RATES, recipe) for recipe in recipes.values()}
    return Matrix(recipes, schemes, rates, size.seeds, size.moves, tasks, asked)
