"""The sparse layers of a converted network."""

from __future__ import annotations

import math

import torch
from torch import nn

from trady_kernels.nn.channels import SparseChannels


def sparse_layers(model: nn.Module) -> dict[str, SparseChannels]:
    """The sparse layers of a network by name, in the order of definition.

    Raises:
        ValueError: there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseChannels)}
    if not layers:
        raise ValueError(
            f"model: got a {type(model).__name__} without sparse layers, expected one that sparsify(model) has "
            "converted"
        )
    return layers


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What to give an optimiser: every ``channel_weight``, also those without a channel now, head, trained biases.

    Args:
        model: a network with sparse layers.

    Returns:
        Each ``channel_weight`` and every other parameter that requires a gradient.

    Raises:
        ValueError: ``model`` has no sparse layer.
    """
    rows = {id(layer.channel_weight) for layer in sparse_layers(model).values()}
    return [parameter for parameter in model.parameters() if parameter.requires_grad or id(parameter) in rows]


def select_fraction(model: nn.Module, fraction: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Select that share of every sparse layer's channels, at random.

    Args:
        model: a network with sparse layers.
        fraction: from 0 to 1; above 0 every layer gets at least one channel.
        seed: of the draw, which is the same on every device.

    Returns:
        ``{layer name: (k,) int64, sorted}``, on the CPU.

    Raises:
        TypeError: ``fraction`` is not a number.
        ValueError: it is outside 0 to 1, or ``model`` has no sparse layer. Nothing has changed then.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    selection = {}
    for name, layer in sparse_layers(model).items():
        count = max(math.floor(fraction * layer.channel_count + 0.5), 1 if fraction else 0)
        drawn = torch.randperm(layer.channel_count, generator=generator, device="cpu")[:count]
        selection[name] = drawn.sort().values
        layer.select(selection[name])
    return selection
