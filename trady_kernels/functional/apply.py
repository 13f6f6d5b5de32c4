"""``Function.apply`` without its overhead."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], input: torch.Tensor, *args: Any) -> Any:
    """``function.apply(input, *args)``, every argument given by position.

    For a Function with ``setup_context``, torch 2.13 rebuilds the signature of ``forward`` with ``inspect`` at
    every call, to fill in defaults: 95 of the 130 us that a sparse layer cost more than a dense one. The
    C++ ``apply`` underneath needs none of it, except under ``torch.func`` and while compiling.

    Raises:
        NotImplementedError: an argument has a tangent: torch.compile takes no Function that says so in a ``jvp``.
    """
    if torch.compiler.is_compiling():
        return function.apply(input, *args)
    try:
        if torch._C._are_functorch_transforms_active():
            return function.apply(input, *args)
        # An input may have outlived the torch.func transform it was made in.
        input = torch._C._functorch.unwrap_if_dead(input)
        return super(torch.autograd.Function, function).apply(input, *args)  # type: ignore[misc]
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        raise NotImplementedError(
            "sparse and lean layers have no forward-mode derivative while something in them trains or the input "
            "requires grad: run them under torch.no_grad(), or use the dense network (densify(model))"
        ) from None
