"""What the sparse Functions cannot be differentiated by, said in one sentence each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

_Gradients = tuple[torch.Tensor | None, ...]


def first_order_only(name: str) -> Callable[[Callable[..., _Gradients]], Callable[..., _Gradients]]:
    """Decorator of a Function's ``backward``: the gradients are right, differentiating them raises.

    Unlike ``torch.autograd.function.once_differentiable`` it also catches a loss that is linear in the
    output: there no incoming gradient requires grad, and a gradient penalty would silently lose terms.
    """
    sentence = (
        f"{name} has no double backward: the gradient of a gradient needs the whole input; use the dense "
        "layer (.to_dense()) for it"
    )

    def decorate(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grad_outputs: torch.Tensor | None) -> _Gradients:
            with torch.no_grad():
                gradients = backward(ctx, *grad_outputs)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            nested = any(grad is not None and grad.requires_grad for grad in grad_outputs)
            # torch.func.grad always runs with create_graph=True: there only a nested transform is an error.
            if any(_is_transformed(grad) for grad in gradients):
                if nested:
                    raise RuntimeError(sentence)
                return gradients
            present = [i for i, grad in enumerate(gradients) if grad is not None]
            refuse = torch._C._functions.DelayedError(sentence.encode(), len(present))
            refused = refuse(*(gradients[i].detach().requires_grad_() for i in present))  # type: ignore[union-attr]
            result = list(gradients)
            for i, grad in zip(present, refused if isinstance(refused, tuple) else (refused,), strict=True):
                result[i] = grad
            return tuple(result)

        return wrapper

    return decorate


def _is_transformed(grad: torch.Tensor | None) -> bool:
    return grad is not None and torch._C._functorch.is_functorch_wrapped_tensor(grad)


def refuse_vmap(name: str) -> NoReturn:
    """Raise the sentence that a Function's ``vmap`` gives."""
    raise NotImplementedError(
        f"{name} cannot run under torch.vmap while it trains: give it the batch as dimension 0, or use the "
        "dense layer (.to_dense())"
    )
