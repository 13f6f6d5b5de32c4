"""What the sparse Functions cannot be differentiated by, said in one sentence each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._C._functorch import _unwrap_for_grad, _wrap_for_grad
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from trady_kernels.ops.backend import is_tracing

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
            if not torch.is_grad_enabled():  # the usual case
                return backward(ctx, *grad_outputs)
            with torch.no_grad():
                gradients = backward(ctx, *grad_outputs)
            if is_tracing() and not torch._C._are_functorch_transforms_active():
                return gradients
            transforms = retrieve_all_functorch_interpreters()
            if not transforms:
                return _refusing(gradients, sentence, grad_outputs)
            if len(transforms) > 1:
                raise RuntimeError(sentence)
            # torch.func.grad always asks for a graph; what counts is whether the tensors it wraps have one.
            level = transforms[0].level()
            if not any(
                grad is not None and _unwrap_for_grad(grad, level).requires_grad for grad in grad_outputs
            ):
                return gradients
            plain = tuple(grad if grad is None else _unwrap_for_grad(grad, level) for grad in gradients)
            with torch._C._DisableFuncTorch(), enable_inplace_requires_grad(True):
                plain = _refusing(plain, sentence)
            return tuple(grad if grad is None else _wrap_for_grad(grad, level) for grad in plain)

        return wrapper

    return decorate


def _refusing(gradients: _Gradients, sentence: str, grad_outputs: _Gradients = ()) -> _Gradients:
    """The same values, raising ``sentence`` when somebody differentiates them.

    Without the edges to ``grad_outputs``, a derivative with respect to what the output was computed from would
    not come by here: ``torch.autograd.functional.hessian`` takes that for zero.
    """
    present = [i for i, grad in enumerate(gradients) if grad is not None]
    edges = [grad for grad in grad_outputs if grad is not None and grad.requires_grad]
    refuse = torch._C._functions.DelayedError(sentence.encode(), len(present) + len(edges))
    refused = refuse(*(gradients[i].detach().requires_grad_() for i in present), *edges)  # type: ignore[union-attr]
    result = list(gradients)
    for i, grad in zip(present, refused if isinstance(refused, tuple) else (refused,), strict=False):
        result[i] = grad
    return tuple(result)


def refuse_vmap(name: str) -> NoReturn:
    """Raise the sentence that a Function's ``vmap`` gives."""
    raise NotImplementedError(
        f"{name} cannot run under torch.vmap while it trains: give it the batch as dimension 0, or use the "
        "dense layer (.to_dense())"
    )
