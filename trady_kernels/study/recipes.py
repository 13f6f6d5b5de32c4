"""What was trained: a table of the settings of tasks, the same in all documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trady_kernels.data import kind_of
from trady_kernels.study.cells import CellFile
from trady_kernels.study.markdown import markdown
from trady_kernels.training.settings import Settings

#: A sample's size, by its kind.
_SIZES = {"images": "{0.image_size}x{0.image_size}", "sentences": "{0.max_length} tokens"}
#: Learning rates of a task that are listed; of more the range.
_LISTED = 3


def recipe_table(
    recipes: Mapping[str, Settings], more: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """Samples, epochs and batches of each task.

    Args:
        recipes: settings by task.
        more: further columns by their heads, each by task.
    """
    columns = more or {}
    heads = ["task", "network", "training samples", "test samples", "epochs", "warm-up", "batch", "input"]
    rows = [
        [
            task,
            recipe.model,
            str(recipe.train_samples or "all"),
            str(recipe.test_samples or "all"),
            str(recipe.epochs),
            f"{recipe.warmup_epochs:g}",
            str(recipe.batch_size),
            _SIZES[kind_of(recipe.data)].format(recipe),
            *(column.get(task, "") for column in columns.values()),
        ]
        for task, recipe in recipes.items()
    ]
    return markdown([*heads, *columns], rows)


def recipes_of(cells: CellFile[Any, Any], rate: Callable[[Any, Settings], float]) -> list[str]:
    """The tasks that a file has runs of, with their seeds and peak learning rates; trials on held-out samples do not count.

    Args:
        cells: the file.
        rate: peak learning rate of a cell with the settings of its task.
    """
    rates: dict[str, set[float]] = {}
    seeds: dict[str, set[int]] = {}
    for cell in cells:
        if not getattr(cell, "held_out", False):
            rates.setdefault(cell.task, set()).add(rate(cell, cells.recipes[cell.task]))
            seeds.setdefault(cell.task, set()).add(cell.seed)
    return recipe_table(
        {task: recipe for task, recipe in cells.recipes.items() if task in rates},
        {
            "seeds": {task: str(len(found)) for task, found in seeds.items()},
            "peak learning rate": {task: _listed(sorted(found)) for task, found in rates.items()},
        },
    )


def _listed(rates: list[float]) -> str:
    if len(rates) > _LISTED:
        return f"{rates[0]:g} to {rates[-1]:g}"
    return ", ".join(f"{rate:g}" for rate in rates)
