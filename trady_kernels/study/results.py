"""The matrix behind ``docs/results.md``: which networks, data and schemes, in three sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trady_kernels.study.matrix import Matrix
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.settings import Settings

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
#: Middle one of the learning rates tried. Lower than what ``trady finetune`` takes by default, for fewer channels and more
#: images: with 1,000 images at 2.2%, seeds of every sampler diverged at 0.2 and some at 0.1.
RATES: Mapping[str, Mapping[str, float]] = {
    "efficientnet_lite0": {"": 0.05, "full": 0.01, "velocity": 0.02},
    "minilm": {"": 0.2, "full": 0.05, "velocity": 0.1, "head-only": 0.5},
}
#: Rows by network and budget, in the order in which they run: what others are compared with comes first. 2.2% of the full
#: figure is the papers' smallest budget (27,946 of 1,252,320 elements of MobileNetV2 0.35). A budget after an @ is what makes
#: a step of a scheme need no more measured bytes than one of trady at the table's; of MiniLM, most of whose bytes are not
#: selected channels, frugal does so with all channels of its layers.
SCHEMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "efficientnet_lite0": {
        "2.2%": (
            "trady",
            "medyate",
            "frugal@5.2%",
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
        "2.2%": (
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
    """

    seeds: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    budgets: int | None = None


#: On a machine with a GPU: all samples, the papers' epochs.
FULL: Mapping[str, Any] = {
    "train_samples": None,
    "test_samples": None,
    "epochs": 50,
    "warmup_epochs": 5,
}
SIZES: Mapping[str, Size] = {
    "quick": Size(
        2, {"train_samples": 100, "test_samples": 100, "epochs": 1, "warmup_epochs": 0.1}, budgets=1
    ),
    "usual": Size(),
    "full": Size(settings=FULL),
}


def check_names(size: str, tasks: tuple[str, ...]) -> None:
    """Check what a user asks of a study.

    Raises:
        ValueError: no such size or task.
    """
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}, expected one of {', '.join(SIZES)}")
    if unknown := [task for task in tasks if task not in RECIPES]:
        raise ValueError(f"task: got {unknown[0]!r}, expected one of {', '.join(RECIPES)}")


def study_recipes(
    size: str, tasks: tuple[str, ...], usual: Iterable[str], sizes: Mapping[str, Size], device: str
) -> dict[str, Settings]:
    """Settings of a study's tasks: the recipes of the results table, but for what differs.

    Args:
        size: one of ``SIZES``.
        tasks: those that a user asks for, names of ``RECIPES``.
        usual: those where a user asks for none.
        sizes: what differs in each.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    check_names(size, tasks)
    return {task: replace(RECIPES[task], device=device, **sizes[size].settings) for task in tasks or usual}


def results_matrix(
    size: str, tasks: tuple[str, ...] = (), schemes: tuple[str, ...] = (), device: str = "cpu"
) -> Matrix:
    """The results table's matrix.

    Args:
        size: one of ``SIZES``.
        tasks: some of ``RECIPES``; all by default.
        schemes: the rows; all by default.
        device: where to run.

    Raises:
        ValueError: no such size, task or scheme.
    """
    check_names(size, tasks)
    for scheme in schemes:
        Spec.parse(scheme)
    chosen = SIZES[size]
    recipes = {
        task: replace(recipe, device=device, **chosen.settings)
        for task, recipe in RECIPES.items()
        if not tasks or task in tasks
    }
    rows = {
        model: {budget: schemes or own for budget, own in list(budgets.items())[: chosen.budgets]}
        for model, budgets in SCHEMES.items()
        if any(recipe.model == model for recipe in recipes.values())
    }
    return Matrix(recipes, rows, RATES, chosen.seeds)
