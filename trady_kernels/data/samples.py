"""Labelled samples in memory, of whatever kind, and how a data set of them is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


class Samples(Protocol):
    """Samples of one kind with their class numbers: what a data set consists of."""

    @property
    def kind(self) -> str:
        """What they are, in the plural: "images", "sentences"."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 ``(N,)``."""

    def __len__(self) -> int: ...

    def subset(self, indices: torch.Tensor) -> Any:
        """The samples at ``indices`` (int64 ``(n,)``), in that order, of the same class."""

    def checksum(self) -> int:
        """A number that changes when a sample, a label or their order does."""


SamplesOfAKind = TypeVar("SamplesOfAKind", bound=Samples)


@dataclass(frozen=True)
class DataSet:
    """A data set: the names of its classes, what to train on and what to test on, of one kind."""

    name: str
    classes: tuple[str, ...]
    train: Samples
    test: Samples

    @property
    def kind(self) -> str:
        """What its samples are: "images", "sentences"."""
        return self.train.kind


def stratified_subset(labels: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``samples`` indices with the classes in the same proportions as in ``labels``.

    Args:
        labels: int64 ``(N,)``.
        samples: how many to draw, at least one for each class, at most N.
        generator: source of the draw.

    Returns:
        Sorted int64 ``(samples,)``.

    Raises:
        ValueError: ``samples`` is below the number of classes or above N.
    """
    sizes = torch.bincount(labels)
    classes = int((sizes > 0).sum())
    if not classes <= samples <= len(labels):
        raise ValueError(
            f"samples: got {samples}, expected {classes} (one for each class) to {len(labels)} (all there are)"
        )
    exact = sizes.double() * samples / len(labels)
    taken = exact.floor().long().clamp(min=1).minimum(sizes)
    while (missing := samples - int(taken.sum())) != 0:
        if missing > 0:
            taken[int((exact - taken).argmax())] += 1  # largest remainder first
        else:  # small classes were lifted to one image: the largest class makes up for them
            taken[int(taken.argmax())] -= 1
    chosen = []
    for label, count in enumerate(taken.tolist()):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def complement(indices: torch.Tensor, total: int) -> torch.Tensor:
    """The indices 0..total-1 that are not in ``indices``, sorted."""
    keep = torch.ones(total, dtype=torch.bool)
    keep[indices] = False
    return keep.nonzero().flatten()
