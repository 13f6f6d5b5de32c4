"""A layer ranking of a network, from a short fine-tuning of all its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from trady_kernels.batch import Example
from trady_kernels.convert import sparsify
from trady_kernels.data import DataSet
from trady_kernels.models.loading import Sizes, classifier_name, load_model
from trady_kernels.selection import LayerRanking, rank_layers


def rank_model(
    model: str,
    data: DataSet,
    *,
    metric: str,
    budget: int | str | None = None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    sizes: Sizes | None = None,
    on_step: Callable[[], None],
) -> LayerRanking:
    """Fine-tune all layers of a pretrained network for some steps and rank them by their gradients.

    The papers accumulate over a few epochs on any task: the ranks belong to the architecture (TraDy,
    arXiv 2510.19675, section 4.1).

    Args:
        model: as :func:`trady_kernels.models.loading.load_model` takes it.
        data: what to fine-tune on.
        metric, budget: as :func:`trady_kernels.rank_layers` takes them.
        steps: of plain SGD; several passes over the data where it has fewer samples.
        batch_size: samples in a step.
        learning_rate: constant.
        seed: of the classifier's first values, the order of the samples and the blocks of channels.
        device: where to run.
        sizes: of the network's input.
        on_step: called after each step.

    Raises:
        ValueError: an argument is out of range, the data does not fit the network, or the training diverged.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps, batch_size: got {steps} and {batch_size}, expected at least 1")
    loaded = load_model(model, len(data.classes), seed=seed, sizes=sizes)
    data = loaded.prepare(data)
    network = loaded.model.to(device)
    generator = torch.Generator().manual_seed(seed)

    def indices() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(len(data.train), generator=generator).split(batch_size)

    def batches() -> Iterator[tuple[Example, torch.Tensor]]:
        for _, chosen in zip(range(steps), indices(), strict=False):
            part = data.train.subset(chosen)
            yield loaded.front.input(part, device), part.labels.to(device)
            on_step()

    example, _ = next(batches())
    sparsify(network, example, head=classifier_name(network, len(data.classes)) or "auto")
    generator.manual_seed(seed)
    return rank_layers(
        network,
        batches(),
        F.cross_entropy,
        metric,
        budget=budget,
        learning_rate=learning_rate,
        seed=seed,
    )
