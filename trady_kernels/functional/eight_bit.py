"""Saved tensors in 8 bits: what other people's operations keep for backward, packed while a network runs.

A pair of hooks of ``torch.autograd.graph`` sees every tensor that an operation saves. Full-size floating tensors
become codes of 8 bits with one scale per 64 elements (``quantize_blocks``), bool masks become bits, and what is
none of both stays the reference that it was. Exact stay

* what this package's own Functions save: selected channels, bits, winners of pools (``in_eight_bits = True`` on a
  Function that saves a whole tensor undoes that);
* parameters, buffers and the batch, in whole or as a view: their memory is somebody else's;
* tensors of fewer than ``MIN_ELEMENTS``, statistics (the mean of a norm, the log-sum of an attention), and the
  results of square roots, vector norms and ``log_softmax``;
* the input of a checkpoint, which is run again from it, and what a compiled region keeps;
* what the head keeps, and everything after it (the loss that some networks compute themselves).

The error of a value is at most half a scale, 1/254 of the largest magnitude in its block: not relative to the value.
An operation whose gradient has its input as a divisor, ``log(x)`` or ``a / x`` by hand, magnifies it, and
is given 0 for a value 254 times smaller than its block's largest: such networks are not for 8 bits.

Hooks of a caller around the network (``save_on_cpu``, a counter of bytes, a checkpoint around all of it) go on
seeing everything that is kept: they are given codes, scales, bits and references at the moment they are saved.

In-place writes: autograd checks no versions where hooks are active. A reference is checked here instead, with the
same result: writing to it before backward raises. A packed tensor holds the values of the forward pass, so a
write that dense autograd would refuse is harmless, and not refused.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint

from trady_kernels.functional import apply
from trady_kernels.functional.running import is_running
from trady_kernels.ops import dequantize_blocks, pack_bits, quantize_blocks
from trady_kernels.ops.backend import FLOATING, is_tracing
from trady_kernels.ops.layout import is_dense
from trady_kernels.ops.pack_bits import bytes_of_bits
from trady_kernels.ops.quantize_blocks import blocks_of

#: Tensors of fewer elements stay as they are: 16 KiB at most, where packing costs as much as the operation itself.
MIN_ELEMENTS = 4096
#: A tensor that needs no gradient, or has a dimension of 1 besides the batch, and is this many times smaller than
#: the largest one seen is a statistic of it: 1 / normalized_shape of a norm's input, 1 / head_dim of a query. They
#: scale or sit in an exponent, so that an error of theirs is one of a whole row.
STATISTIC = 16
#: Operations whose backward pass divides by their result, or takes its exponential.
_AMPLIFYING = frozenset({"SqrtBackward0", "LinalgVectorNormBackward0", "LogSoftmaxBackward0"})

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FUNCTION_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]

_Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_AS_IT_IS: _Hooks = (_same, _same)


class _Reference:
    """A tensor kept as it is."""

    __slots__ = ("__weakref__", "origin", "tensor", "unpack", "version")

    def __init__(self, tensor: torch.Tensor, outer: _Hooks | None) -> None:
        self.unpack = None if outer is None else outer[1]
        self.version = tensor._version
        # Detached: an output that the graph keeps would keep its graph alive.
        self.tensor = tensor.detach() if outer is None else outer[0](tensor)
        self.origin: StorageWeakRef | None = None

    def restore(self) -> torch.Tensor:
        if self.unpack is not None:  # what hooks further out return has versions of its own
            return self.unpack(self.tensor)
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} needed for backward was modified in place: it is at version "
                f"{self.tensor._version}, expected version {self.version}, that of the forward pass; step the "
                "optimiser after backward, or write out of place"
            )
        return self.tensor


class _Content:
    """Codes and scales, or bits, of a stretch of memory."""

    __slots__ = ("__weakref__", "origin", "tensors")

    def __init__(self, tensor: torch.Tensor, origin: StorageWeakRef) -> None:
        self.tensors: tuple[torch.Tensor, ...] = (
            (pack_bits(tensor),) if tensor.dtype is torch.bool else quantize_blocks(tensor)
        )
        self.origin = origin  # while it is held, no other storage gets the address that the key is made of


class _Packed:
    """A tensor of which codes and scales, or bits, are kept."""

    __slots__ = ("content", "dtype", "parts", "shape", "stride", "unpack")

    def __init__(
        self,
        content: _Content,
        dtype: torch.dtype,
        shape: torch.Size,
        stride: tuple[int, ...],
        outer: _Hooks | None,
    ) -> None:
        self.dtype, self.shape, self.stride = dtype, shape, stride
        pack, self.unpack = outer or _AS_IT_IS
        # Packed by the outer hooks for each tensor saved: a checkpoint gives out each of its own only once.
        self.parts = tuple(map(pack, content.tensors))
        # What the outer hooks have put elsewhere must not be held here as well.
        self.content = content if all(map(_in_place, self.parts, content.tensors)) else None

    def restore(self) -> torch.Tensor:
        first, *rest = map(self.unpack, self.parts)
        if rest:
            flat = dequantize_blocks(first, rest[0], self.dtype)
        else:
            places = torch.arange(8, dtype=torch.uint8, device=first.device)
            flat = (first[:, None] >> places & 1).bool()
        return flat.as_strided(self.shape, self.stride)


def _in_place(kept: object, tensor: torch.Tensor) -> bool:
    return isinstance(kept, torch.Tensor) and kept.data_ptr() == tensor.data_ptr()


def _restore(kept: _Reference | _Packed) -> torch.Tensor:
    return kept.restore()


def _saves_exactly(frame: FrameType) -> bool:
    """Whether the Python code that made the node is our own ``applied``, a checkpoint's or a compiled region's."""
    code = frame.f_code
    if code.co_filename == apply.__file__:
        return not getattr(frame.f_locals["function"], "in_eight_bits", False)
    if code.co_filename == checkpoint.__file__:
        return True
    if code is not _FUNCTION_APPLY:
        return False
    module = frame.f_locals["cls"].__module__
    return module == checkpoint.__name__ or module.startswith("torch._functorch.")


class _Run:
    """One forward of a network: what stays exact in it, and what is packed already."""

    def __init__(self, references: Iterable[torch.Tensor], outer: _Hooks | None) -> None:
        self.outer = outer
        self.exact = False
        self.largest = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in references if type(tensor) in _PLAIN}
        self.contents: WeakValueDictionary[tuple[Any, ...], _Content] = WeakValueDictionary()
        self.kept_whole: WeakValueDictionary[int, _Reference] = WeakValueDictionary()

    def pack(self, tensor: torch.Tensor) -> _Reference | _Packed:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta:
            return _Reference(tensor, self.outer)
        if not _is_entered(self):  # cut off, and what saves now is not of this network
            return _Reference(tensor, self.outer)
        storage = tensor.untyped_storage()
        elements, size = tensor.numel(), tensor.element_size()
        if storage.nbytes() < MIN_ELEMENTS * size or storage.data_ptr() in self.known:
            return _Reference(tensor, self.outer)
        origin = StorageWeakRef(storage)
        if origin.cdata in self.kept_whole:
            return _Reference(tensor, self.outer)
        if elements < MIN_ELEMENTS:
            # A small part, such as the first token: the reference would keep the whole storage.
            return _Reference(tensor.clone(), self.outer)
        exact = self.exact or _saves_exactly(sys._getframe(1))
        if exact or not self._pays(tensor, elements, storage.nbytes()):
            return self._keep_whole(tensor, origin)
        return self._pack(tensor, origin)

    def _keep_whole(self, tensor: torch.Tensor, origin: StorageWeakRef) -> _Reference:
        reference = _Reference(tensor, self.outer)
        reference.origin = origin
        self.kept_whole[origin.cdata] = reference
        return reference

    def _pays(self, tensor: torch.Tensor, elements: int, storage_bytes: int) -> bool:
        if tensor.dtype is torch.bool:
            return bytes_of_bits(elements) < storage_bytes
        if tensor.dtype not in FLOATING or tensor.is_neg():
            return False
        reduced = not tensor.requires_grad or 1 in tensor.shape[1:]
        if reduced and elements * STATISTIC <= self.largest:
            return False
        if type(tensor.grad_fn).__name__ in _AMPLIFYING:
            return False
        self.largest = max(self.largest, elements)
        # An expanded tensor is smaller than its codes.
        return elements + 4 * blocks_of(elements) < storage_bytes

    def _pack(self, tensor: torch.Tensor, origin: StorageWeakRef) -> _Packed:
        shape, stride = tensor.shape, tensor.stride()
        # Two views of one stretch of memory have the same codes, whatever their shapes.
        key: tuple[Any, ...] = (origin.cdata, tensor.storage_offset(), tensor._version, tensor.dtype)
        if is_dense(tensor):
            key = (*key, tensor.numel())
        else:
            key = (*key, shape, stride)
            tensor = tensor.detach().clone()  # drops the gaps, keeps the order of the dimensions
            stride = tensor.stride()
        content = self.contents.get(key)
        if content is None:
            content = self.contents[key] = _Content(tensor, origin)
        return _Packed(content, tensor.dtype, shape, stride, self.outer)


@functools.cache
def _hide_from_dynamo() -> None:
    """Keep the compiler from tracing the hooks, which a compiled region inside the network calls.

    ``torch.compiler.disable`` would put a frame between a hook and the code that it looks at.
    """
    skip = importlib.import_module("torch._dynamo.decorators").skip
    for function in (
        _Run.pack,
        _Run._keep_whole,
        _Reference.__init__,
        _Reference.restore,
        _restore,
        _saves_exactly,
        _is_entered,
        is_running,
    ):
        skip(function)


@dataclass(frozen=True)
class _Entered:
    """A forward that runs now."""

    owner: object
    #: None where nothing is packed.
    run: _Run | None
    #: Begun with it; None where the run is that of a network further out.
    hooks: saved_tensors_hooks | None
    #: Of the owner.
    call: FrameType


class _Stack(threading.local):
    """The forwards that run on this thread, outermost first."""

    def __init__(self) -> None:
        self.entered: list[_Entered] = []


_stack = _Stack()


def _active_hooks() -> _Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _run_of(hooks: _Hooks | None) -> _Run | None:
    run = None if hooks is None else getattr(hooks[0], "__self__", None)
    return run if isinstance(run, _Run) else None


def _is_entered(run: _Run) -> bool:
    """Whether a forward that it is of still runs."""
    for entered in _stack.entered:
        if entered.run is run and is_running(entered.call):
            return True
    return False


def _end_interrupted() -> None:
    """End the forwards that a KeyboardInterrupt cut off."""
    while _stack.entered and not is_running(_stack.entered[-1].call):
        last = _stack.entered[-1]
        if last.hooks is not None:
            if _run_of(_active_hooks()) is not last.run:
                return  # under somebody else's hooks: the next forward without them
            last.hooks.__exit__(None, None, None)
        _stack.entered.pop()


def enter(owner: object, references: Callable[[], Iterable[torch.Tensor]]) -> None:
    """Pack what is saved on this thread from now on, until ``leave(owner)``; called by a hook of ``owner``.

    Does nothing where gradients are off, under ``torch.func`` (which refuses hooks), while compiling, and
    inside another network that is packed already.

    Args:
        owner: whose forward begins.
        references: gives the tensors that stay what they are: parameters, buffers, the batch.
    """
    if is_tracing():
        return
    if "torch._dynamo" in sys.modules:
        _hide_from_dynamo()
    call = sys._getframe(2)
    _end_interrupted()
    run = hooks = None
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        outer = _active_hooks()
        run = _run_of(outer)
        if run is None:
            run = _Run(references(), outer)
            hooks = saved_tensors_hooks(run.pack, _restore)
            hooks.__enter__()
    _stack.entered.append(_Entered(owner, run, hooks, call))


def leave(owner: object) -> None:
    """End what ``enter(owner)`` began."""
    # Where another hook raised before `enter` could run, there is nothing to end.
    if is_tracing() or not _stack.entered or _stack.entered[-1].owner is not owner:
        return
    hooks = _stack.entered.pop().hooks
    if hooks is not None:
        hooks.__exit__(None, None, None)


def stay_exact() -> None:
    """Keep everything that is saved from now on in full, until the innermost ``enter`` is left."""
    if is_tracing() or not _stack.entered:
        return
    run = _stack.entered[-1].run
    if run is not None:
        run.exact = True
