"""Norm statistics re-estimated by forward passes, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from networks import as_trained
from torch import nn

from trady_kernels.training.norm_statistics import estimate_norm_statistics


def network() -> nn.Sequential:
    return as_trained(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(5, momentum=0.3),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(5, 4, 1),
            nn.BatchNorm2d(4, momentum=None),
            nn.BatchNorm2d(4, track_running_stats=False),
        ).double()
    )


def test_statistics_are_the_mean_over_batches() -> None:
    model = network()
    batches = [torch.randn(6, 3, 5, 4, dtype=torch.float64) * 2 + 1 for _ in range(3)]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    estimate_norm_statistics(model, iter(batches))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = [], []
    for batch in batches:
        before = model[0](batch)
        first.append((before.mean((0, 2, 3)), before.var((0, 2, 3), unbiased=True)))
        scale = torch.rsqrt(before.var((0, 2, 3), unbiased=False) + 1e-5)[:, None, None]
        normal = (before - before.mean((0, 2, 3))[:, None, None]) * scale
        affine = normal * model[1].weight[:, None, None] + model[1].bias[:, None, None]
        after = model[4](affine.relu())  # without dropout
        second.append((after.mean((0, 2, 3)), after.var((0, 2, 3), unbiased=True)))
    for norm, seen in ((model[1], first), (model[5], second)):
        for value, expected in zip(
            (norm.running_mean, norm.running_var), zip(*seen, strict=True), strict=True
        ):
            torch.testing.assert_close(value, torch.stack(expected).mean(0))
        assert norm.num_batches_tracked == 3
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.3, None)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_no_batch_changes_nothing() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="batches: got none, expected at least one"):
        estimate_norm_statistics(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model[1].momentum == 0.3
