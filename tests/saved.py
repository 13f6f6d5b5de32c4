"""Bytes that a forward keeps for backward, measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the unique storages saved for backward, those of parameters and buffers apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}
    kept = []  # alive until counted, so that no address is counted for two storages

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())  # an output itself would hold its own graph alive, and that this list
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())
