"""Statistics of batch norms re-estimated on new samples, by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trady_kernels.batch import Example, call


@torch.no_grad()
def estimate_norm_statistics(model: nn.Module, batches: Iterable[Example]) -> None:
    r"""Replace running statistics by their average over some batches; nothing is kept, no weight moves.

    .. math:: \mu = \frac{1}{B} \sum_b \mu_b, \qquad \sigma^2 = \frac{1}{B} \sum_b \sigma^2_b

    over the means and unbiased variances of ``B`` batches, each of which weighs the same: ``momentum=None`` of
    ``nn.BatchNorm2d``. A norm sees what the norms before it make with the statistics of the batch. Whatever is no
    batch norm runs in evaluation mode. Modes and momenta are left as they were.

    Args:
        model: a network whose norms are not frozen yet. Norms without running statistics stay as they are.
        batches: inputs of the network, read once; of equal size, and in an order that does not depend on the classes:
            variance between batches is not counted.

    Raises:
        ValueError: there is no batch, and the statistics are as they were; or what a norm raises for a batch with
            one value a channel.

    Source: Li et al. (AdaBN), arXiv 1603.04779, section 3.2.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.training = True
            norm.momentum = None
        for count, batch in enumerate(batches, start=1):
            if count == 1:
                for norm in norms:
                    norm.reset_running_stats()
            call(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if not count:
        raise ValueError("batches: got none, expected at least one")
