"""The matrix behind ``docs/results.md``: which networks, data and schemes, in three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trady_kernels.study.matrix import Matrix
from trady_kernels.training.ingredients import Spec
from trady_kernels.training.settings import Settings

#: 2.2% of the full figure is the papers' smallest budget (27,946 of 1,252,320 elements of MobileNetV2 0.35).
BUDGETS = ("2.2%", "1%", "7%")
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
#: In the order in which they run: what others are compared with comes first.
SCHEMES = (
    "trady",
    "medyate",
    "head-only",
    "full",
    "trady+bias",
    "medyate+bias",
    "bias-only",
    "d-full-random",
    "s-topk-random",
    "d-det-rgn",
    "sparse-update",
    "last-layers",
    "velocity",
    "lora",
    "s-full-random",
    "s-det-rgn",
    "trady+bias+stats",
)
#: At every budget.
LEADING = ("trady", "medyate", "trady+bias", "medyate+bias")


@dataclass(frozen=True)
class Size:
    """How large a results table is.

    Attributes:
        seeds: of the final runs.
        settings: what differs from the recipes.
        budgets: how many of ``BUDGETS``.
    """

    seeds: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    budgets: int = len(BUDGETS)


SIZES: Mapping[str, Size] = {
    "quick": Size(
        2, {"train_samples": 100, "test_samples": 100, "epochs": 1, "warmup_epochs": 0.1}, budgets=1
    ),
    "usual": Size(),
    "full": Size(settings={"train_samples": None, "test_samples": None, "epochs": 50, "warmup_epochs": 5}),
}


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
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}, expected one of {', '.join(SIZES)}")
    if unknown := [task for task in tasks if task not in RECIPES]:
        raise ValueError(f"task: got {unknown[0]!r}, expected one of {', '.join(RECIPES)}")
    for scheme in schemes:
        Spec.parse(scheme)
    chosen = SIZES[size]
    recipes = {
        task: replace(recipe, device=device, **chosen.settings)
        for task, recipe in RECIPES.items()
        if not tasks or task in tasks
    }
    rows = schemes or SCHEMES
    leading = tuple(scheme for scheme in rows if scheme in LEADING)
    return Matrix(recipes, rows, leading, BUDGETS[: chosen.budgets], chosen.seeds)
