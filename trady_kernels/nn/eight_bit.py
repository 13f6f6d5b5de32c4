"""``keep_in_eight_bits``: a network whose forward packs what others' operations keep for backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from trady_kernels.batch import tensors_in
from trady_kernels.functional.eight_bit import enter, leave, stay_exact

# The handles lie in the module's own dict: they travel with it through deepcopy and pickle, where a handle
# also reserves its id, so that no hook registered afterwards takes the place of ours.
_HANDLES = "_eight_bit_handles"


def _enter_network(model: nn.Module, args: Any, kwargs: Any) -> None:
    def references() -> Iterator[torch.Tensor]:
        yield from model.parameters()
        yield from model.buffers()
        yield from tensors_in((args, kwargs))

    enter(model, references)


def _leave_network(model: nn.Module, args: Any, output: Any) -> None:
    leave(model)


def _enter_exact(module: nn.Module, args: Any) -> None:
    stay_exact()


def keep_in_eight_bits(model: nn.Module, exact: Iterable[nn.Module] = ()) -> None:
    """Keep what a network's operations save for backward in 8 bits, from its next forward on.

    See ``trady_kernels.functional.eight_bit`` for what stays exact. Only calls of ``model`` itself count, not
    calls of its submodules alone. Regions that ``torch.compile`` takes over are left to the compiler.

    Args:
        model: the network; a second call changes nothing but ``exact``.
        exact: modules inside it that keep what they need in full, and after which everything is kept in
            full until the network's forward ends: the head, and a loss behind it.
    """
    keep_in_full(model)
    model.__dict__[_HANDLES] = [
        model.register_forward_pre_hook(_enter_network, prepend=True, with_kwargs=True),
        model.register_forward_hook(_leave_network, always_call=True),
    ]
    for module in exact:
        handle = module.register_forward_pre_hook(_enter_exact, prepend=True)
        module.__dict__.setdefault(_HANDLES, []).append(handle)


def keep_in_full(model: nn.Module) -> None:
    """Undo ``keep_in_eight_bits``; any other network stays as it is."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def keeps_in_eight_bits(model: nn.Module) -> bool:
    """Whether ``keep_in_eight_bits`` holds for this network."""
    return any(hook is _enter_network for hook in model._forward_pre_hooks.values())
