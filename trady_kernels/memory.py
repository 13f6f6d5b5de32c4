"""Measured memory: what a training step keeps for backward, and how much it needs at its peak."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, normalization, pooling
from torch.profiler import ProfilerActivity, profile

from trady_kernels.batch import Example, loss_of, storage_key, tensors_in, without_trace

KINDS = (
    "conv input",
    "linear input",
    "activation",
    "norm",
    "pooling",
    "dropout",
    "attention",
    "residual",
    "other",
)

#: Kind of what a module keeps, by its class; the first row that fits counts.
_BY_CLASS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("conv input", (conv._ConvNd,)),
    ("linear input", (nn.Linear, nn.Bilinear)),
    ("attention", (nn.MultiheadAttention,)),
    (
        "norm",
        (
            batchnorm._BatchNorm,
            instancenorm._InstanceNorm,
            normalization.LayerNorm,
            normalization.GroupNorm,
            normalization.RMSNorm,
            normalization.LocalResponseNorm,
        ),
    ),
    ("dropout", (dropout._DropoutNd,)),
    (
        "pooling",
        tuple(kind for kind in vars(pooling).values() if isinstance(kind, type) and "Pool" in kind.__name__),
    ),
    (
        "activation",
        tuple(
            kind
            for kind in vars(activation).values()
            if isinstance(kind, type)
            and issubclass(kind, nn.Module)
            and kind.__module__ == activation.__name__
            and kind is not nn.MultiheadAttention
        ),
    ),
)

#: The same for classes that subclass none of torch's, by what libraries call them.
_BY_NAME: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("attention", re.compile("Attention|Attn")),
    (
        "linear input",
        re.compile("^Conv1D$"),
    ),  # Hugging Face's name of a linear layer with a transposed weight
    ("dropout", re.compile("Dropout|DropPath|DropBlock|StochasticDepth")),
    ("pooling", re.compile(r"Pool(\dd)?(Same)?$")),
    ("norm", re.compile(r"^(?!.*Conv).*Norm(Act)?(\dd\w{0,4}|Fp32)?$")),
    (
        "activation",
        re.compile(r"^(?!.*Conv).*(Activation|ReLU6?|GELU|SiLU|Swish|Mish|Sigmoid|Tanh|Softplus)$"),
    ),
)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that one training step keeps for backward.

    Attributes:
        saved_bytes: unique storages saved between forward and backward, without parameters, buffers and the
            batch itself.
        by_kind: ``saved_bytes`` by what keeps them, in the order of ``KINDS``; a storage that several keep
            counts for the first. "residual" is what the operations between a container's modules keep: skips,
            layer scales, gates, and activations that are no modules. "other" is the loss, the copies of weights
            that autocast makes, and modules that nothing tells.
        by_module: ``saved_bytes`` by module name; "" is the network's own forward and the loss.
        parameter_bytes: saved storages that are parameters or buffers of the network: references.
        batch_bytes: saved storages that belong to the batch: references.
        gradients: bytes of the gradients that the step left, by parameter name.
        peak_bytes: high-water mark of the allocator during the step, above what was allocated before it;
            contains the gradients.
        device: where it was measured.
    """

    saved_bytes: int
    by_kind: Mapping[str, int]
    by_module: Mapping[str, int]
    parameter_bytes: int
    batch_bytes: int
    gradients: Mapping[str, int]
    peak_bytes: int
    device: str

    @property
    def gradient_bytes(self) -> int:
        """Sum of ``gradients``."""
        return sum(self.gradients.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(kind, size) for kind, size in self.by_kind.items()]
        rows += [
            ("saved for backward", self.saved_bytes),
            ("parameters referenced", self.parameter_bytes),
            ("batch referenced", self.batch_bytes),
            ("gradients", self.gradient_bytes),
            (f"peak of the step ({self.device})", self.peak_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size:>15,} B  {size / 2**20:>9.2f} MiB" for name, size in rows)


@dataclass
class SavedBytes:
    """What a forward has kept for backward so far: see ``MemoryReport`` for the attributes."""

    by_kind: Counter[str] = field(default_factory=Counter)
    by_module: Counter[str] = field(default_factory=Counter)
    parameter_bytes: int = 0
    batch_bytes: int = 0

    @property
    def saved_bytes(self) -> int:
        """Sum of ``by_kind``."""
        return sum(self.by_kind.values())


@contextmanager
def saved_by_module(model: nn.Module, batch: Example = ()) -> Iterator[SavedBytes]:
    """Count what every module keeps for backward while the block runs a forward.

    Saved-tensor hooks see it, so what an inner pair of hooks packs on its own is counted only where that pair
    hands on what it packs, as the 8-bit form does.

    Args:
        model: the network that the block calls.
        batch: whose tensors count as references.

    Returns:
        The figures, which grow as the forward goes on.
    """
    parameters = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    inputs = {storage_key(tensor) for tensor in tensors_in(batch)}
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    seen: dict[int, StorageWeakRef] = {}
    saved = SavedBytes()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        before = seen.get(key)
        if before is None or before.expired():  # the addresses of a part that was dropped are used again
            storage = tensor.untyped_storage()
            seen[key], size = StorageWeakRef(storage), storage.nbytes()
            if key in parameters:
                saved.parameter_bytes += size
            elif key in inputs:
                saved.batch_bytes += size
            elif size:
                module = running[-1] if running else None
                saved.by_kind[_kind(module, tensor)] += size
                saved.by_module[names[module] if module is not None else ""] += size
        return tensor.detach()  # the tensor itself would hold its own graph alive

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    for module in names:
        # First in, last out: what users hooked on a module counts as the module's.
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()


def measure_memory(
    model: nn.Module, batch: Example, loss_fn: Callable[..., torch.Tensor] | None = None
) -> MemoryReport:
    """Run one forward and backward and measure what it keeps.

    The model runs in the mode it is in, and uncompiled where ``torch.compile`` has taken over a module. Modes,
    buffers, gradients and random numbers are left as they were; no optimiser steps.

    Args:
        model: any network.
        batch: a tensor, a pair ``(input, target)`` whose input is a tensor, a tuple or a dict, or a dict of
            keyword arguments; on the model's device.
        loss_fn: called with the output, and with the target where the batch is a pair; without it the
            output's ``loss``, else the sum of the output.

    Returns:
        The measured bytes.

    Raises:
        TypeError, ValueError: ``batch`` is of another kind, or the loss depends on nothing that trains.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with without_trace(model), torch.enable_grad(), peak_memory(device) as peak:
        with saved_by_module(model, batch) as saved:
            loss = loss_of(model, batch, loss_fn)
        if not loss.requires_grad:
            raise ValueError(
                "model: got a loss that depends on no parameter that requires a gradient, expected at least "
                "one that trains"
            )
        loss.backward()
        del loss
        gradients = {
            name: parameter.grad.untyped_storage().nbytes()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return MemoryReport(
        saved_bytes=saved.saved_bytes,
        by_kind={kind: saved.by_kind[kind] for kind in KINDS if saved.by_kind[kind]},
        by_module=dict(saved.by_module),
        parameter_bytes=saved.parameter_bytes,
        batch_bytes=saved.batch_bytes,
        gradients=gradients,
        peak_bytes=peak.bytes,
        device=peak.name,
    )


def _kind(module: nn.Module | None, tensor: torch.Tensor) -> str:
    if module is None:
        return "other"
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() > 1 and tensor.dtype != weight.dtype:
        if tensor.is_floating_point() and tensor.shape in (weight.shape, weight.mT.shape):
            return "other"  # the copy of the weight that autocast makes
    for kind, classes in _BY_CLASS:
        if isinstance(module, classes):
            return kind
    for kind, pattern in _BY_NAME:
        if pattern.search(type(module).__name__):
            return kind
    return "residual" if next(module.children(), None) is not None else "other"


class _CudaPeak:
    """The caching allocator's own high-water mark."""

    def __init__(self, device: torch.device) -> None:
        self.name, self.bytes, self._device = torch.cuda.get_device_name(device), 0, device

    def __enter__(self) -> _CudaPeak:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.cuda.synchronize(self._device)
        self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before


class _CpuPeak:
    """Running sum of what the profiler sees the allocator hand out and take back."""

    def __init__(self, device: torch.device) -> None:
        self.name, self.bytes = device.type, 0

    def __enter__(self) -> _CpuPeak:
        # Kineto writes lines to stderr at its start and stop unless told otherwise before its first use.
        level = os.environ.get("KINETO_LOG_LEVEL")
        os.environ["KINETO_LOG_LEVEL"] = level or "99"
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        profiler: Any = self._profile.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.bytes = max(accumulate((event.nbytes() for event in events), initial=0))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[_CpuPeak | _CudaPeak]:
    """A context whose ``bytes`` is afterwards the allocator's high-water mark above what it held before.

    Python's garbage collector, which comes at whatever moment, waits until the end: the same work has the same peak.

    Args:
        device: whose allocator; on the CPU torch's profiler watches it.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _CudaPeak(device) if device.type == "cuda" else _CpuPeak(device) as peak:
            yield peak
    finally:
        if collects:
            gc.enable()
