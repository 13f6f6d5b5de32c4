"""Velocities of neurons against worked examples, and which of them fit a budget."""

from __future__ import annotations

import math

import torch
from torch import nn

from trady_kernels.training.velocity import NeuronVelocities, fastest, neuron_outputs


def test_three_epochs_by_hand() -> None:
    """A neuron that turns by 60 degrees and stays, and one that never turns."""
    velocities = NeuronVelocities()
    start = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    turned = torch.tensor([[0.5, math.sqrt(0.75)], [6.0, 8.0]])
    assert velocities.update({"a": start})["a"].tolist() == [0, 0]
    # The cosine falls from 1 to 1/2, then goes back to 1, then stays: -1/2; 1/2 + 1/4; 0 - 3/8.
    expected = [[-0.5, 0.0], [0.75, 0.0], [-0.375, 0.0]]
    saved = None
    for place, values in enumerate(expected):
        if place == 2:
            assert saved is not None
            velocities = NeuronVelocities()
            velocities.load_state_dict(saved)
        found = velocities.update({"a": turned})["a"]
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), atol=1e-7, rtol=0)
        saved = velocities.state_dict()


def test_outputs_of_neurons() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5)).train()
    layers = {"0": model[0], "3": model[3]}
    inputs = [torch.randn(4, 2, 4, 4), torch.randn(2, 2, 4, 4)]
    mean = model[1].running_mean.clone()
    outputs = neuron_outputs(model, layers, inputs)
    assert {name: tuple(o.shape) for name, o in outputs.items()} == {"0": (3, 6 * 4), "3": (5, 6)}
    first = model[0](inputs[0])
    torch.testing.assert_close(outputs["0"][:, :16], first.transpose(0, 1).flatten(1))
    # Modes, statistics and hooks are as before.
    assert model.training and torch.equal(model[1].running_mean, mean) and not model[0]._forward_hooks


def test_the_fastest_that_fit() -> None:
    velocities = {"a": torch.tensor([0.1, -0.9, 0.0]), "b": torch.tensor([0.5, -0.2])}
    chosen = fastest(velocities, {"a": 3, "b": 4}, 8, torch.Generator().manual_seed(0))
    # -0.9 (3), 0.5 (4), then nothing of 3 or 4 fits into 1.
    assert {name: mask.tolist() for name, mask in chosen.items()} == {
        "a": [False, True, False],
        "b": [True, False],
    }


def test_at_the_start_neurons_are_drawn_at_random() -> None:
    start = {"a": torch.zeros(6, dtype=torch.float64)}
    counts = torch.zeros(6)
    for seed in range(600):
        chosen = fastest(start, {"a": 5}, 10, torch.Generator().manual_seed(seed))["a"]
        assert chosen.sum() == 2
        counts += chosen
    assert (counts - 200).abs().max() < 5 * math.sqrt(600 * 2 / 9)
