"""``recompute_attention``: a module whose attention computes its probabilities again in the backward pass."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from trady_kernels.functional.attention import scaled_dot_product_attention
from trady_kernels.functional.running import is_running

# In the module's own dict, as those of nn/eight_bit.py are and for the same reason.
_HANDLES = "_attention_handles"


class _Recomputing(TorchFunctionMode):
    """Takes the calls of ``F.scaled_dot_product_attention`` inside of ``call``, from whatever library they come."""

    def __init__(self, call: FrameType) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The compiler, which traces this for a part that it takes over, can look at no frame.
        if function is F.scaled_dot_product_attention and (
            torch.compiler.is_compiling() or is_running(self.call)
        ):
            function = scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class _Stack(threading.local):
    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, _Recomputing]] = []


_stack = _Stack()


def _end_interrupted() -> None:
    """End the forwards that a KeyboardInterrupt cut off."""
    while _stack.entered and not is_running(_stack.entered[-1][1].call):
        if _get_current_function_mode() is not _stack.entered[-1][1]:
            return  # under somebody else's mode: the next forward without it
        _stack.entered.pop()[1].__exit__(None, None, None)


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _end_interrupted()
    mode = _Recomputing(sys._getframe(1))
    mode.__enter__()
    _stack.entered.append((module, mode))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    # Where another hook raised before `_enter` could run, there is nothing to leave.
    if torch.compiler.is_compiling() or not _stack.entered or _stack.entered[-1][0] is not module:
        return
    _stack.entered.pop()[1].__exit__(None, None, None)


def recompute_attention(module: nn.Module) -> None:
    """Let the module's own calls of ``F.scaled_dot_product_attention`` keep no probabilities.

    See ``trady_kernels.functional.scaled_dot_product_attention``. What ``torch.compile`` takes over is left to
    the compiler, and ``nn.MultiheadAttention`` stays as it is: no mode sees the calls inside
    ``F.multi_head_attention_forward``.

    Args:
        module: that calls it; a second call changes nothing.
    """
    keep_attention(module)
    module.__dict__[_HANDLES] = [
        module.register_forward_pre_hook(_enter),
        module.register_forward_hook(_leave, always_call=True, prepend=True),
    ]


def keep_attention(module: nn.Module) -> None:
    """Undo ``recompute_attention``; any other module stays as it is."""
    for handle in module.__dict__.pop(_HANDLES, ()):
        handle.remove()
