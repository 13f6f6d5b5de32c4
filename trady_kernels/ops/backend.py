"""Which kernels exist on this machine, which one an operator call takes, and how to force one.

An operator has one meaning (its reference) and several kernels, named by backend:

==========  ==========================================================================
reference   plain PyTorch, the definition every other kernel is tested against
aten        ATen's own weight gradient on the compact input (oneDNN, cuDNN, BLAS)
cpp         C++ on the CPU, vectorised, chosen by instruction set at run time
cuda        CUDA C++
triton      Triton
==========  ==========================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "aten", "cpp", "cuda", "triton")

#: The one library object that owns the ``torch.ops.trady`` namespace: schemas and fakes live in
#: Python, implementations may come from compiled code.
LIBRARY = torch.library.Library("trady", "DEF")  # noqa: TOR901

#: Every operator by name; tests and benchmarks loop over it.
OPERATORS: dict[str, Operator] = {}

# Not thread-local: the backward pass of a GPU graph runs on the autograd engine's own threads.
_forced: str | None = None
_last_kernel: dict[str, str] = {}


class Operator:
    """One operator of ``torch.ops.trady``: schema, kernels by backend, and the choice among them.

    Args:
        schema: signature as ``torch.library`` reads it, e.g. ``"double(Tensor x) -> Tensor"``.
        reference: plain PyTorch implementation; also what ``torch.ops.trady.<name>`` runs on a device
            that has no compiled kernel.
        fake: shape, dtype and strides of the result, for ``torch.compile``.
        kernels: further implementations, by backend name.
        choose: takes the operator's arguments and returns the backend that ``auto`` uses for them.
        validate: takes the operator's arguments; raises ``ValueError`` / ``TypeError`` on bad ones.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., torch.Tensor],
        fake: Callable[..., torch.Tensor],
        kernels: dict[str, Callable[..., torch.Tensor]],
        choose: Callable[..., str],
        validate: Callable[..., None],
    ) -> None:
        self.name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"trady::{self.name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.trady, self.name).default
        self.kernels = {"reference": reference, **kernels}
        self.choose = choose
        self.validate = validate
        OPERATORS[self.name] = self

    def __call__(self, *args: Any) -> torch.Tensor:
        self.validate(*args)
        name = _forced or self.choose(*args)
        kernel = self.kernels.get(name)
        if kernel is None:
            raise NotImplementedError(
                f"{self.name}: backend {name!r} has no kernel for this operator, "
                f"expected one of {', '.join(self.kernels)}"
            )
        if not torch.compiler.is_compiling():
            _last_kernel[self.name] = name
        return kernel(*args)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every operator inside the ``with`` block onto one backend.

    Args:
        name: ``"reference"``, ``"aten"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or ``"auto"`` for the
            measured choice by shape. Holds for all threads, since backward passes run on others.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says why.
    """
    global _forced
    if name != "auto":
        reason = unavailable(name)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    previous, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = previous


def last_kernel(operator: str) -> str | None:
    """Backend that the last eager call of ``operator`` ran on, or None before the first call."""
    return _last_kernel.get(operator)


_LIBRARIES = Path(__file__).parent.parent / "_lib"
_reasons: dict[str, str] = {}


def load_compiled() -> None:
    """Load the compiled operator libraries that belong to this torch; note why one is missing."""
    for name, file, runs in (
        ("cpp", "libtrady_cpu.so", True),
        ("cuda", "libtrady_cuda.so", torch.version.cuda is not None),
    ):
        path = _LIBRARIES / file
        if not runs:
            _reasons[name] = "this build of torch has no CUDA"
        elif not path.exists():
            _reasons[name] = f"{path.name} was not built"
        else:
            torch.ops.load_library(path)


def unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine; None when it can.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {', '.join(BACKENDS)}")
    return _reasons.get(name)
