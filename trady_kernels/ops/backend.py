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
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._guards import _TLS

BACKENDS = ("reference", "aten", "cpp", "cuda", "triton")
#: What sums are taken in float32 of.
HALVES = (torch.bfloat16, torch.float16)
#: Values that the operators take.
FLOATING = (torch.float32, torch.float64, *HALVES)

#: The one library object that owns the ``torch.ops.trady`` namespace: schemas and fakes live in
#: Python, implementations may come from compiled code.
LIBRARY = torch.library.Library("trady", "DEF")

#: The operators once more, as their Triton kernels: what a traced graph calls.
TRITON_LIBRARY = torch.library.Library("trady_triton", "DEF")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

#: Every operator by name; tests and benchmarks loop over it.
OPERATORS: dict[str, Operator] = {}

# Not thread-local: the backward pass of a GPU graph runs on the autograd engine's own threads.
_forced: str | None = None
_last_kernel: dict[str, str] = {}


def is_tracing() -> bool:
    """Whether torch.compile or torch.export reads what runs here, or runs it on tensors without values to write down
    its operations.
    """
    # TracingContext.try_get(), but for the time that an attribute takes which is not there.
    return torch.compiler.is_compiling() or _TLS.__dict__.get("tracing_context") is not None


class Operator:
    """One operator of ``torch.ops.trady``: schema, kernels by backend, and the choice among them.

    Args:
        schema: signature as ``torch.library`` reads it, e.g. ``"double(Tensor x) -> Tensor"``. Results may be
            several, and an argument may be written in place (``Tensor(a!)``).
        reference: plain PyTorch implementation; also what ``torch.ops.trady.<name>`` runs on a device
            that has no compiled kernel.
        fake: shape, dtype and strides of the result, for ``torch.compile``.
        kernels: further implementations in Python, by backend name; the compiled ones, ``cpp`` and
            ``cuda``, join them when the libraries are loaded.
        triton: name of the module that has the Triton kernel, a function named as the operator; None where
            there is none. Imported at the first call.
        choose: takes the operator's arguments and returns the backend that ``auto`` uses for them.
            Where it has no kernel here, ATen's is taken, and where there is none, the reference.
        validate: takes the operator's arguments; raises ``ValueError`` / ``TypeError`` on bad ones.
        stands_in: whether the reference stands in for a forced backend without a kernel: for what is ATen's own work
            everywhere but on a GPU.
        cpp_checks: whether the C++ kernel refuses all that ``validate`` does. Before a small call in C++ a look at the
            arguments in Python costs as much as the call: it is then taken only once something has failed, for the words.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: dict[str, Callable[..., Any]],
        choose: Callable[..., str],
        validate: Callable[..., None],
        stands_in: bool = False,
        cpp_checks: bool = False,
        triton: str | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"trady::{self.name}", fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.trady, self.name).default
        self.kernels = {"reference": reference, **kernels}
        #: What a traced graph calls in the place of a kernel of ``kernels`` that cannot be traced.
        self._traced: dict[str, Callable[..., Any]] = {}
        #: Module of the Triton kernel, where there is one and Triton.
        self.triton = triton if TRITON_INSTALLED else None
        if self.triton is not None:
            self._add_triton(schema, fake, self.triton)
        self.choose = choose
        self.validate = validate
        self.stands_in = stands_in
        self.cpp_checks = cpp_checks
        #: The operator as a function. To call an object costs its look-up and another interpreter loop: several
        #: microseconds where caches are cold, as long as a small kernel takes.
        self.call = self._make_call()
        OPERATORS[self.name] = self

    def _add_triton(self, schema: str, fake: Callable[..., Any], module: str) -> None:
        def kernel(*args: Any) -> Any:
            return getattr(importlib.import_module(module), self.name)(*args)

        # An operator of its own: a graph then launches kernels as they are, also those of an interpreter.
        TRITON_LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        TRITON_LIBRARY.impl(self.name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"trady_triton::{self.name}", fake, lib=TRITON_LIBRARY)
        self.kernels["triton"] = kernel
        self._traced["triton"] = getattr(torch.ops.trady_triton, self.name).default

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def _make_call(self) -> Callable[..., Any]:
        late, overload = self.cpp_checks, self.overload
        #: What the overload calls in its turn.
        direct = getattr(overload, "_op", overload)

        def call(*args: Any) -> Any:
            if is_tracing():
                self.validate(*args)
                name = self.choose(*args) if _forced is None else self._forced(args[0])
                name, kernel = self._existing(name, args[0].dtype)
                return self._traced.get(name, kernel)(*args)
            if not late:
                self.validate(*args)
            try:
                name = self.choose(*args) if _forced is None else self._forced(args[0])
                if self.kernels.get(name) is overload:
                    _last_kernel[self.name] = name
                    return direct(*args)
                if late:
                    self.validate(*args)
            except (IndexError, RuntimeError, TypeError):
                if late:
                    self.validate(*args)
                raise
            name, kernel = self._existing(name, args[0].dtype)
            _last_kernel[self.name] = name
            if torch._C._are_functorch_transforms_active():  # whose tensors only an operator unwraps
                kernel = self._traced.get(name, kernel)
            return kernel(*args)

        return call

    def _existing(self, name: str, dtype: torch.dtype | None = None) -> tuple[str, Callable[..., Any]]:
        """The kernel of a backend, or what stands in for it."""
        # Triton's sums are float32: for float64 it stands in only where there is nothing to sum, and no ATen either.
        triton = name == "cuda" and not (dtype == torch.float64 and "aten" in self.kernels)
        for stand_in in (name, *(("triton",) if triton else ()), "aten", "reference"):
            if stand_in in self.kernels:
                return stand_in, self.kernels[stand_in]
        raise AssertionError(f"{self.name} has no reference")

    def checked(self, name: str) -> Callable[..., Any]:
        """Kernel ``name`` with the checks that a call makes before it, for timing."""
        kernel = self.kernels[name]
        if name == "cpp" and self.cpp_checks:
            return kernel

        def call(*args: Any) -> Any:
            self.validate(*args)
            return kernel(*args)

        return call

    def _forced(self, input: torch.Tensor) -> str:
        name = _forced or ""
        if name not in self.kernels:
            if self.stands_in:
                return "reference"
            raise NotImplementedError(
                f"{self.name}: backend {name!r} has no kernel for this operator, "
                f"expected one of {', '.join(self.kernels)}"
            )
        device = _devices().get(name)
        if device is not None and input.device.type != device:
            raise ValueError(
                f"{self.name}: backend {name!r} runs on {device} tensors, got one on {input.device}; "
                f"move it or force another backend"
            )
        return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every operator inside the ``with`` block onto one backend.

    An operator without a kernel of that name is not left to another one: calling it raises. ``"reference"``, ``"cpp"``
    and ``"triton"`` run whole networks. ``"aten"`` has weight gradients and ``scatter_channels_`` alone, and ``"cuda"``
    nothing for convolutions with a trained bias, max pooling and 8-bit storage: these two are for calls of single
    operators. ``fold_norm`` and ``shift_channels_``, ATen's own work but in CUDA C++, and
    ``conv2d_depthwise_input_grad``, but in Triton, run on the reference under names that have no kernel of them.

    Args:
        name: ``"reference"``, ``"aten"``, ``"cpp"``, ``"cuda"``, ``"triton"``, or ``"auto"`` for the
            measured choice by shape. Holds for all threads, since backward passes run on others.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says why.
        NotImplementedError: by an operator in the block that has no such kernel.
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


def forced_backend() -> str | None:
    """Name of the backend that :func:`backend` forces now; None for the choice by shape."""
    return _forced


def by_device(input: torch.Tensor, *_: object) -> str:
    """``choose`` of an operator with one compiled kernel a device."""
    return "cuda" if input.is_cuda else "cpp"


def by_device_or_fused(input: torch.Tensor, *_: object) -> str:
    """``choose`` of an elementwise operator: as :func:`by_device`, but what torch.compile fuses in a GPU's graph.

    There a pass over memory of its own costs as much as those that it stands between, and inductor makes one of
    them all. Its C++ for CPUs is slower than ours.
    """
    return "reference" if input.is_cuda and is_tracing() else by_device(input)


def last_kernel(operator: str) -> str | None:
    """Backend that the last eager call of ``operator`` ran on, or None before the first call."""
    return _last_kernel.get(operator)


# ---- what exists here -----------------------------------------------------------------------------------

#: Device type that a compiled backend works on, which is also its dispatch key.
_DEVICES = {"cpp": "cpu", "cuda": "cuda"}
#: Whether Triton kernels run in Triton's interpreter, on tensors of any device: decided when they are decorated.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_LIBRARIES = Path(__file__).parent.parent / "_lib"
_reasons: dict[str, str] = {}


def build_record() -> dict[str, str]:
    """What ``setup.py`` wrote down at installation: compiler, torch, nvcc, or why there is none.

    Returns:
        ``compiler``, ``torch``, ``python``, and ``nvcc`` with ``cuda_archs`` or ``cuda_missing``;
        ``missing`` alone where there was no compiler; empty in a source folder never installed.
    """
    try:
        return json.loads((_LIBRARIES / "build.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _devices() -> dict[str, str]:
    """Device type of the tensors that a backend takes, where it does not take any."""
    return _DEVICES if TRITON_INTERPRETED else {**_DEVICES, "triton": "cuda"}


def _load_library(name: str) -> str | None:
    path = _LIBRARIES / f"libtrady_{_DEVICES[name]}.so"
    if not path.exists():
        record = build_record()
        why = record.get("missing") or (record.get("cuda_missing") if name == "cuda" else None)
        mend = "a C++ compiler" if "missing" in record else "the CUDA toolkit" if why else None
        return (
            f"{why}: install {mend} and install the package again"
            if why
            else f"{path.name} was never built: run pip install -e . --no-build-isolation in the source folder"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}): install the package again with this torch, {torch.__version__}"
    return None


def load_compiled() -> None:
    """Load the compiled libraries that belong to this torch; note, and say once, why one is missing.

    Raises:
        ValueError: ``TRADY_ISA`` names an instruction set that this CPU does not have.
    """
    missing = _load_library("cpp")
    if missing:
        _reasons["cpp"] = missing
        warnings.warn(
            f"trady_kernels runs without compiled code, on ATen and the plain PyTorch reference: {missing}.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif "TRADY_ISA" in os.environ:
        compiled = importlib.import_module("trady_kernels._C")
        try:
            compiled.set_isa(os.environ["TRADY_ISA"])
        except ValueError as error:
            raise ValueError(f"TRADY_ISA: {error}") from None
    # A CPU build of torch lacks symbols that the CUDA library names: loading it there would fail.
    cuda_missing = (
        "torch.version.cuda is None: install a CUDA build of torch"
        if torch.version.cuda is None
        else _load_library("cuda")
    )
    if cuda_missing is None and not torch.cuda.is_available():
        cuda_missing = (
            "torch.cuda.is_available() is False: torch finds no NVIDIA GPU or driver, see nvidia-smi"
        )
    if cuda_missing:
        _reasons["cuda"] = cuda_missing
    if not TRITON_INSTALLED:
        _reasons["triton"] = "triton is not installed: install a CUDA build of torch, which brings it"
    elif not TRITON_INTERPRETED and not torch.cuda.is_available():
        _reasons["triton"] = (
            "torch.cuda.is_available() is False: TRITON_INTERPRET=1 in the environment runs its kernels without a GPU"
        )
    for operator in OPERATORS.values():
        for name, device in _DEVICES.items():
            key = device.upper()
            if name not in _reasons and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"trady::{operator.name}", key
            ):
                operator.kernels[name] = operator.overload


def unavailable(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine and how to mend it; None when it can.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {', '.join(BACKENDS)}")
    return _reasons.get(name)


def instruction_set() -> str | None:
    """Instruction set that the C++ kernels run on now; None without compiled code."""
    if unavailable("cpp"):
        return None
    name: str = importlib.import_module("trady_kernels._C").isa()
    return name


def triton_version() -> str | None:
    """Version of the installed Triton, without importing it; None without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU in its maker's words."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available() -> dict[str, str | None]:
    """Every backend, with None where it runs here and otherwise the reason and the mend."""
    return {name: unavailable(name) for name in BACKENDS}
