"""The matrix behind ``docs/results.md``: which networks, data and schemes, in three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trady_kernels.study.matrix import Matrix
from trady_kernels.training.settings import Settings

#: 2.2% of the full figure is the papers' smallest budget (27,946 of 1,252,320 elements of MobileNetV2 0.35).
BUDGETS = ("2.2%", "1%", "7%")
#: One thread a run, so that as many runs as there are cores go side by side.
IMAGES = Settings(
    model="efficientnet_lite0",
    train_samples=1000,
    test_samples=1000,
    image_size=64,
    epochs=5,
    threads=1,
    test_once=True,
)
RECIPES: Mapping[str, Settings] = {
    "fashion-mnist": replace(IMAGES, data="fashion-mnist"),
    "mnist": replace(IMAGES, data="mnist"),
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
    "last-layers",
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
        train_samples, test_samples: None for all.
        epochs: of each run.
        seeds: of the final runs.
    """

    train_samples: int | None
    test_samples: int | None
    epochs: int
    seeds: int


SIZES: Mapping[str, Size] = {
    "quick": Size(100, 100, 1, 2),
    "usual": Size(1000, 1000, 5, 3),
    "full": Size(None, None, 50, 3),
}


def results_matrix(
    size: str,
    tasks: tuple[str, ...] = (),
    schemes: tuple[str, ...] = (),
    device: str = "cpu",
) -> Matrix:
    """The results table's matrix.

    Args:
        size: one of ``SIZES``.
        tasks: some of ``RECIPES``; all by default.
        schemes: the rows; all by default.
        device: where to run.

    Raises:
        ValueError: no such size or task.
    """
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}, expected one of {', '.join(SIZES)}")
    if unknown := [task for task in tasks if task not in RECIPES]:
        raise ValueError(f"task: got {unknown[0]!r}, expected one of {', '.join(RECIPES)}")
    chosen = SIZES[size]
    recipes = {
        task: replace(
            recipe,
            train_samples=chosen.train_samples,
            test_samples=chosen.test_samples,
            epochs=chosen.epochs,
            warmup_epochs=min(recipe.warmup_epochs, chosen.epochs / 10),
            device=device,
        )
        for task, recipe in RECIPES.items()
        if not tasks or task in tasks
    }
    rows = schemes or SCHEMES
    leading = tuple(scheme for scheme in rows if scheme in LEADING)
    budgets = BUDGETS if size != "quick" else BUDGETS[:1]
    return Matrix(recipes, rows, leading, budgets, chosen.seeds)
