"""The one rule by which an operator decides which memory format its result takes."""

from __future__ import annotations

import torch

#: Memory formats by the names that files and commands give them.
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def memory_format_of(input: torch.Tensor) -> torch.memory_format:
    """``channels_last`` for a 4-D tensor whose channels are adjacent and pixels are not, slices included.

    Unlike ``is_contiguous`` the rule looks at two strides only, so a channel or row slice of a
    channels_last tensor counts as channels_last, and a one-channel one as contiguous. The C++ kernels
    apply the same rule.
    """
    stride = input.stride()  # once: each call into torch costs more than the comparisons
    if len(stride) == 4 and stride[1] == 1 and stride[3] != 1:
        return torch.channels_last
    return torch.contiguous_format


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def in_a_memory_format(tensor: torch.Tensor) -> bool:
    """Whether the elements are dense and in order, or, in four dimensions, in the order of channels_last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def flat_view(dense: torch.Tensor) -> torch.Tensor:  # (...) -> (n,)
    """View of a dense tensor's elements one behind the other; no ``as_strided`` where there is nothing to do.

    Through that the compiler fuses nothing.
    """
    return dense if dense.dim() == 1 else dense.as_strided((dense.numel(),), (1,))
