"""A Function as a function, without the overhead of ``apply``."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from trady_kernels.ops.backend import backend, forced_backend

_COMPILER = "torch._dynamo"
#: What the compiler is to run as it is.
_in_graph: list[Callable[..., torch.Tensor]] = []


def applied(function: type[torch.autograd.Function]) -> Callable[..., torch.Tensor]:
    """``function.apply``, every argument given by position, that returns the first of several outputs.

    For a Function with ``setup_context``, torch 2.13 rebuilds the signature of ``forward`` with ``inspect`` at
    every call, to fill in defaults: 95 of the 130 us that a sparse layer cost more than a dense one. The
    C++ ``apply`` underneath needs none of it, except under ``torch.func`` and while something is compiled.

    torch.compile runs it on tensors without values, and so writes down the operations of forward and backward. Else it
    would read every line of them, of ``setup_context`` and of what they call. The first step's seconds of
    ``benchmarks/training_step.py --compile`` tell what that is, in a second run, whose kernels are compiled already.

    Raises:
        NotImplementedError: by what is returned: an argument has a tangent.
    """

    def run(forced: str | None, input: torch.Tensor, *args: Any) -> torch.Tensor:
        # A `with backend(...)` that the compiler has read is over when it runs this.
        context = nullcontext() if forced == forced_backend() else backend(forced or "auto")
        try:
            with context:
                if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                    outputs = function.apply(input, *args)
                else:
                    # An input may have outlived the torch.func transform it was made in.
                    input = torch._C._functorch.unwrap_if_dead(input)
                    outputs = super(torch.autograd.Function, function).apply(input, *args)  # type: ignore[misc]
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            raise NotImplementedError(
                "sparse and lean layers have no forward-mode derivative while something in them trains or the input "
                "requires grad: run them under torch.no_grad(), or use the dense network (densify(model))"
            ) from None
        first: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return first

    # Graphs and profiles show it.
    run.__name__ = run.__qualname__ = function.__name__.strip("_")
    _in_graph.append(run)
    if _COMPILER in sys.modules:
        torch.compiler.allow_in_graph(run)

    def call(input: torch.Tensor, *args: Any) -> torch.Tensor:
        # What torch.compile reads here it compiles anew for when it changes.
        return run(forced_backend(), input, *args)

    return call


class _Registering(importlib.abc.MetaPathFinder):
    """Tells the compiler of ``_in_graph`` when somebody imports it, which takes seconds that not everybody has to spend."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COMPILER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_tell(module: ModuleType) -> None:
            load(module)
            for run in _in_graph:
                module.allow_in_graph(run)

        spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


if _COMPILER not in sys.modules:
    sys.meta_path.insert(0, _Registering())
