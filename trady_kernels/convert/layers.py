"""The sparse layers of a converted network."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Real

import torch
from torch import nn
from torch.optim import Optimizer

from trady_kernels.nn import optimizer_state
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


def select_everywhere(
    layers: Mapping[str, SparseChannels],
    selection: Mapping[str, torch.Tensor],
    optimizer: Optimizer | None = None,
) -> None:
    """Let every layer ``select()`` its channels, or none of them where one cannot.

    Args:
        layers: by name.
        selection: ``{layer name: indices}`` of all of them.
        optimizer: as for ``select()``.

    Raises:
        RuntimeError, TypeError, NotImplementedError: what ``select()`` raises; no layer has changed then.
    """
    for layer in layers.values():  # whatever one can refuse comes before the first changes
        with torch.inference_mode(layer.channel_weight.is_inference()):
            layer.synchronize()
        if isinstance(optimizer, Optimizer):
            optimizer_state.check(optimizer, layer)
    for name, layer in layers.items():
        layer.select(selection[name], optimizer)


def select_fraction(model: nn.Module, fraction: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Select that share of every sparse layer's channels, at random.

    Args:
        model: a network with sparse layers.
        fraction: from 0 to 1; above 0 every layer gets at least one channel.
        seed: of the draw, which is the same on every device.

    Returns:
        ``{layer name: (k,) int64, sorted}``, on the CPU.

    Raises:
        TypeError: ``fraction`` is not a number, or ``seed`` not an int.
        ValueError: it is outside 0 to 1, or ``model`` has no sparse layer.
        RuntimeError: a layer's ``weight`` and ``channel_weight`` were both written. Nothing has changed in any case.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, float | Real):
        raise TypeError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    generator = torch.Generator().manual_seed(operator.index(seed))
    layers, selection = sparse_layers(model), {}
    for name, layer in layers.items():
        count = max(math.floor(float(fraction) * layer.channel_count + 0.5), 1 if fraction else 0)
        drawn = torch.randperm(layer.channel_count, generator=generator, device="cpu")[:count]
        selection[name] = drawn.sort().values
    select_everywhere(layers, selection)
    return selection
