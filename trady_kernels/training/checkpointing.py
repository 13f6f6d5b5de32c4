"""Gradient checkpointing of a network's blocks."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules of the longest ``nn.Sequential`` or ``nn.ModuleList``, in order."""
    lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    longest = max(lists, key=len, default=nn.ModuleList())
    return list(longest)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep the inputs of the network's blocks alone, and compute what is inside them again in the backward pass.

    Args:
        model: changed in place; its state dict is not.

    Raises:
        ValueError: it has no sequence of blocks.

    Source: Chen et al., arXiv 1604.06174; by ``torch.utils.checkpoint``.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(
            f"scheme: got a {type(model).__name__} without a sequence of blocks to checkpoint, expected one with an "
            "nn.Sequential or nn.ModuleList"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
