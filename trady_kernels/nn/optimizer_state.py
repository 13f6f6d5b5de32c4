"""Optimisers and sparse layers: rows reach the weight after every step, state follows its channels."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Layer(Protocol):
    """What this module needs of a sparse layer."""

    channel_weight: torch.nn.Parameter
    channels: torch.Tensor

    def is_own_rows(self, parameter: torch.Tensor) -> bool: ...
    def synchronize(self) -> None: ...


#: Parameter id -> the layer whose `channel_weight` it is. The layer keeps the parameter alive, so an id is
#: not reused while its entry lives; `layer_of` compares identities all the same.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(layer: Layer) -> None:
    """Let optimiser steps know the layer that owns ``layer.channel_weight``."""
    _layers[id(layer.channel_weight)] = layer


def layer_of(parameter: torch.Tensor) -> Layer | None:
    """The sparse layer that has ``parameter`` as its ``channel_weight``, or None."""
    layer = _layers.get(id(parameter))
    return layer if layer is not None and layer.is_own_rows(parameter) else None


def check_supported(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    pass


def rearrange(optimizer: Optimizer, layer: Layer) -> None:
    pass


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = layer_of(parameter)
            if layer is not None:
                layer.synchronize()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = layer_of(parameter)
            if layer is not None:
                layer.synchronize()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
