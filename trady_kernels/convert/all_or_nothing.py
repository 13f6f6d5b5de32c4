"""A conversion that ends in an error has not happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from trady_kernels.nn import optimizer_state
from trady_kernels.nn.channels import SparseChannels

#: Where every module keeps its parameters, buffers, children and hooks.
_OWN = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put every module's class and attributes and every parameter's flag and gradient back if the block raises.

    Values that the block writes into parameters and buffers stay written.

    Args:
        model: the network that changes inside.
    """
    kinds = {module: type(module) for module in model.modules()}
    attributes = {module: dict(module.__dict__) for module in kinds}
    # Handles of hooks have hold of these dicts: they are emptied and filled again, not replaced.
    own: list[tuple[Any, Any]] = [
        (module.__dict__[name], module.__dict__[name].copy())
        for module in kinds
        for name in _OWN
        if name in module.__dict__
    ]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind in kinds.items():
            rows = module._parameters.get("channel_weight")
            if rows is not None and not issubclass(kind, SparseChannels):
                optimizer_state.unregister(rows)
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes[module])
        for container, values in own:
            container.clear()
            container.update(values)
        for parameter, requires_grad, gradient in parameters:
            if parameter.requires_grad != requires_grad:  # an inference tensor's is not to be set
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        raise
