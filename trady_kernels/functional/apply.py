"""A Function as a function, without the overhead of ``apply``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trady_kernels.ops.backend import forced_backend


def applied(function: type[torch.autograd.Function]) -> Callable[..., torch.Tensor]:
    """``function.apply``, every argument given by position, that returns the first of several outputs.

    For a Function with ``setup_context``, torch 2.13 rebuilds the signature of ``forward`` with ``inspect`` at
    every call, to fill in defaults: 95 of the 130 us that a sparse layer cost more than a dense one. The
    C++ ``apply`` underneath needs none of it, except under ``torch.func`` and while something is exported.

    torch.compile runs it on tensors without values, and so writes down the operations of forward and backward. Else it
    would read every line of them, of ``setup_context`` and of what they call: half of its time for a whole network.

    Raises:
        NotImplementedError: by what is returned: an argument has a tangent (torch.compile takes no Function that says so
            in a ``jvp``).
    """

    @torch.compiler.allow_in_graph
    def run(forced: str | None, input: torch.Tensor, *args: Any) -> torch.Tensor:
        try:
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

    def call(input: torch.Tensor, *args: Any) -> torch.Tensor:
        # What torch.compile reads here it compiles anew for when it changes.
        result: torch.Tensor = run(forced_backend(), input, *args)
        return result

    return call
