"""Launches of Triton kernels that cost the host little once a variant is compiled.

``kernel[grid](...)`` binds and specialises every argument at every call, which with twenty of them takes longer than the
kernel of a small layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from trady_kernels.ops.backend import TRITON_INTERPRETED

Plan = TypeVar("Plan")
#: Plans that are kept of one kind: a network's layers at many sizes of images.
MOST_PLANS = 4096
#: Compiled variants, and the constants that end their arguments, by what Triton would compile anew for.
_variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def ceil_div(dividend: int, divisor: int) -> int:
    """``triton.cdiv`` on the host, where Triton's own looks for constants in its arguments."""
    return -(-dividend // divisor)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device.

    Args:
        kernel: a function under ``triton.jit`` whose integers are not specialised.
        grid: programs along one to three axes.
        arguments: tensors, integers, floats and None, in the order of the kernel's.
        constants: its ``tl.constexpr`` arguments, which come last, with ``num_warps`` and ``num_stages``.
    """
    if TRITON_INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    key = (
        kernel,
        torch.cuda.current_device(),
        *constants.values(),
        *[_variant_of(argument) for argument in arguments],
    )
    found = _variants.get(key)
    if found is None:
        if kernel.constexprs and min(kernel.constexprs) < len(arguments):
            raise TypeError(f"{kernel.arg_names[min(kernel.constexprs)]}: expected by name, it is a constant")
        compiled = kernel[grid](*arguments, **constants)
        tail = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _variants[key] = compiled, tail
        return
    compiled, tail = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *tail)


def remembered(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """``plan``, a function of how its tensors lie in memory and of values, asked once for each: it takes longer than a launch."""
    known: dict[tuple[Any, ...], Plan] = {}

    @functools.wraps(plan)
    def found(*arguments: Any) -> Plan:
        key = tuple([_layout_of(a) if isinstance(a, torch.Tensor) else a for a in arguments])
        if key not in known:
            if len(known) >= MOST_PLANS:
                known.clear()
            known[key] = plan(*arguments)
        return known[key]

    return found


def _layout_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


def _variant_of(argument: Any) -> Any:
    """What of an argument Triton compiles another variant for: a pointer's dtype and alignment, a number's type."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return -(2**31) <= argument < 2**31
    return type(argument)
