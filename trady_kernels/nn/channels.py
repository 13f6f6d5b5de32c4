"""What the sparse layers have in common: the rows that train, and the weight that holds them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trady_kernels.functional.stored import Stored, check_stored
from trady_kernels.nn import optimizer_state
from trady_kernels.nn.optimizer_state import to_device

if TYPE_CHECKING:
    from typing_extensions import Self

#: What `channels=` takes: None = all, an int = that many at random, or indices.
Channels = int | torch.Tensor | Sequence[int] | None


def as_channels(channels: Channels, count: int) -> torch.Tensor:
    """Sorted int64 indices for what a user may pass as ``channels``, on the device that a tensor is on.

    Args:
        channels: None for all, an int for that many at random (torch's global generator), or a 1-D
            tensor or sequence of indices. A tensor on an accelerator is checked by a device assertion,
            without synchronisation.
        count: input channels of the layer.

    Raises:
        TypeError: not an int, an integer tensor or a sequence of ints.
        ValueError: an int out of range, duplicates, or not one-dimensional.
        IndexError: an index out of range.
    """
    expected = f"None, an int from 0 to {count}, or a 1-D tensor or sequence of indices below {count}"
    # On the CPU under `torch.device("meta")` too, where indices would be without values.
    if channels is None:
        return torch.arange(count, device="cpu")
    if isinstance(channels, bool | str):
        raise TypeError(f"channels: got {channels!r}, expected {expected}")
    if isinstance(channels, Integral):
        number = int(channels)
        if not 0 <= number <= count:
            raise ValueError(f"channels: got {number}, expected {expected}")
        return torch.randperm(count, device="cpu")[:number].sort().values
    if isinstance(channels, Sequence):
        for index in channels:
            if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
                continue
            if not isinstance(index, Integral) or isinstance(index, bool):
                raise TypeError(f"channels: got {index!r} among the indices, expected {expected}")
        channels = torch.tensor([int(index) for index in channels], dtype=torch.int64, device="cpu")
    elif not isinstance(channels, torch.Tensor):
        if not hasattr(channels, "__array__"):
            raise TypeError(f"channels: got {type(channels).__name__}, expected {expected}")
        channels = torch.as_tensor(channels, device="cpu")
    if channels.dtype == torch.bool or channels.is_floating_point() or channels.is_complex():
        raise TypeError(f"channels: got a tensor of {channels.dtype}, expected {expected}")
    if channels.dim() != 1:
        raise ValueError(f"channels: got a tensor of shape {tuple(channels.shape)}, expected {expected}")
    indices = channels.detach().to(torch.int64).sort().values
    if indices.device.type == "cpu":
        if indices.numel() and (indices[0] < 0 or indices[-1] >= count):
            wrong = int(indices[0]) if indices[0] < 0 else int(indices[-1])
            raise IndexError(f"channels: got index {wrong}, expected {expected}")
        repeated = indices[1:][indices[1:] == indices[:-1]]
        if repeated.numel():
            raise ValueError(f"channels: got index {int(repeated[0])} more than once, expected {expected}")
    elif indices.numel():
        torch._assert_async((indices[0] >= 0) & (indices[-1] < count), f"channels: expected {expected}")
        torch._assert_async((indices[1:] > indices[:-1]).all(), "channels: expected each index once")
    return indices


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when somebody writes to a tensor: its version in place, its address when replaced."""
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # inference tensors have no version counter
        return -1, tensor.data_ptr()


#: Attributes of a sparse layer that hold identities and addresses of this process.
_IDENTITIES = ("_own", "_original", "_settled", "_unread", "_selection", "_wrapper")


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether ``module`` computes what ``base`` does: neither its class nor somebody else has put in another forward."""
    return all(
        method not in module.__dict__ and getattr(type(module), method, None) is getattr(base, method, None)
        for method in ("forward", "_conv_forward")
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(
            f"dtype: got {dtype}, expected a real floating-point type, whose gradients alone the sparse layers "
            "compute: keep the dense layer for others"
        )


@contextlib.contextmanager
def _outside_autograd() -> Iterator[None]:
    # The layer's own tensors are never wrapped by torch.func, which forbids writing to them all the same.
    with torch.no_grad(), torch._C._DisableFuncTorch():
        yield


_Dense = TypeVar("_Dense", bound=nn.Module)


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for name in ("weight", "bias"):
        parameter = getattr(source, name)
        if parameter is not None:
            copy = parameter.detach().clone()
            setattr(
                target, name, nn.Parameter(copy, requires_grad=name == "weight" or parameter.requires_grad)
            )
    target.train(source.training)


class SparseChannels(nn.Module):
    """Base of the sparse layers: the trainable rows of a frozen weight, kept equal to each other.

    ``weight`` is the dense layer's parameter, frozen, whole and in ``state_dict()``. ``channel_weight`` is the
    trainable parameter, one row per selected input channel. Whichever of the two was written last is copied
    to the other: rows after every ``optimizer.step()``, everything else at the next eager forward,
    ``state_dict()``, ``select()`` or ``synchronize()``. Writes are seen by version counter and address, so
    in-place writes through ``.data`` or NumPy are not seen, except those before the first use.
    """

    weight: torch.Tensor
    channel_weight: nn.Parameter
    channels: torch.Tensor
    #: How the selected channels are kept for backward; in the instance's ``__dict__`` where it is not this.
    stored: Stored = "exact"

    # -- what a concrete layer defines -------------------------------------------------------------

    @property
    def channel_count(self) -> int:
        """Input channels that can be selected."""
        raise NotImplementedError

    def read_rows(self, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        """Contiguous copy of ``weight`` at ``channels``, in the shape of ``channel_weight``."""
        raise NotImplementedError

    def write_rows(self, weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor) -> None:
        """Write ``rows``, shaped as ``channel_weight``, into ``weight`` at ``channels``, in place."""
        raise NotImplementedError

    def compute(
        self, input: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None, channels: torch.Tensor
    ) -> torch.Tensor:
        """The output for these operands, whatever the layer has selected; ``rows`` get the gradient.

        Args:
            input: what ``forward`` takes.
            weight: the whole weight.
            rows: in the shape of ``channel_weight``; equal to ``weight`` at ``channels``. None: no weight trains.
            channels: ``(k,)`` int64, sorted, unique, on the weight's device.
        """
        raise NotImplementedError

    @property
    def trains_beside_rows(self) -> bool:
        """Whether something in this layer gets a gradient besides ``channel_weight``."""
        bias = self.bias
        return isinstance(bias, torch.Tensor) and bias.requires_grad

    # -- construction ------------------------------------------------------------------------------

    def _register_rows(self, channels: Channels, stored: Stored = "exact") -> None:
        check_stored(stored)
        if stored != self.stored:
            self.stored = stored
        # An index tensor on the meta device would forget which channels it means.
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        indices = to_device(as_channels(channels, self.channel_count), device)
        self.weight.requires_grad_(False)
        self.register_buffer("channels", indices, persistent=False)
        rows = self.read_rows(self.weight.detach(), indices)
        self.register_parameter("channel_weight", nn.Parameter(rows, requires_grad=len(indices) > 0))
        self._adopt()

    @classmethod
    def take_over(cls, module: nn.Module, channels: Channels = None, stored: Stored = "exact") -> None:
        """Turn a dense layer into this class in place: the object, its weight, hooks and attributes stay.

        Args:
            module: a layer of the dense class.
            channels, stored: as for the constructor.
        """
        module.__class__ = cls
        assert isinstance(module, SparseChannels)
        module._register_rows(channels, stored)

    def hand_back(self, dense: type[nn.Module]) -> None:
        """Turn this layer into the class ``dense`` in place, its values kept: ``take_over`` undone."""
        self.synchronize()
        optimizer_state.unregister(self.channel_weight)
        del self.channel_weight, self.channels
        self.__dict__.pop("stored", None)
        for name in _IDENTITIES:
            del self.__dict__[name]
        self.__class__ = dense  # type: ignore[assignment]

    @staticmethod
    def _check_dense(module: nn.Module, dense: type[nn.Module], sparse: type[nn.Module]) -> None:
        """Check that ``module`` computes what the class ``dense`` or ``sparse`` does."""
        if not isinstance(module, dense):
            raise TypeError(f"module: got {type(module).__name__}, expected an nn.{dense.__name__}")
        if not (computes_as(module, dense) or computes_as(module, sparse)):
            raise TypeError(
                f"module: got a {type(module).__name__} with a forward of its own, expected that of "
                f"nn.{dense.__name__}: derive the class from {sparse.__name__} instead"
            )

    def _copy_from(self, module: nn.Module, channels: Channels) -> Self:
        """Fill a layer made on the meta device with copies of a dense one's values."""
        if isinstance(module, SparseChannels):
            module.synchronize()
        indices = as_channels(channels, self.channel_count)
        _copy_parameters(module, self)
        self.select(indices)
        self._unread = True
        return self

    def _copy_to(self, dense: _Dense) -> _Dense:
        self._synchronize_held()
        _copy_parameters(self, dense)
        return dense

    def _adopt(self) -> None:
        """Take the parameters that the module holds now as its own, rows and weight being equal."""
        _check_dtype(self.weight.dtype)
        self._own = (self.weight, self.channel_weight)
        known = optimizer_state.register(self)
        # A shallow copy shares its parameters with the original, which the optimisers' hooks go on to know; not by
        # __setattr__, to which a module is a submodule.
        self.__dict__["_original"] = None if known is self else known
        self._selection: tuple[torch.Tensor, int, tuple[int, ...]] | None = None
        self._wrapper: tuple[weakref.ref[nn.Module], int] | None = None
        self._settle()
        # Somebody may still initialise `weight` through `.data`, which no version counter sees.
        self._unread = True

    def _settle(self) -> None:
        weight, rows = self._own
        self._settled = (_stamp(weight), _stamp(rows))
        self._unread = False

    def is_own_rows(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` is this layer's ``channel_weight`` (not one lent by ``functional_call``)."""
        return self._own[1] is parameter

    # -- rows and weight ---------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Copy the rows into ``weight`` if they were written, or ``weight`` into the rows if it was.

        Raises:
            RuntimeError: both were written, and they differ.
        """
        self._take_replaced()
        self._reconcile()

    def _synchronize_held(self) -> None:
        """``synchronize()`` where the layer does not hold others' tensors: ``state_dict()`` may be asked for theirs."""
        self._take_replaced()
        if self._holds_own():
            self._reconcile()

    def _reconcile(self) -> None:
        """``synchronize()`` where neither of the two has been replaced."""
        weight, rows = self._own
        stamps = _stamp(weight), _stamp(rows)
        if stamps == self._settled and not self._unread:  # the usual case, at every forward
            return
        weight_written, rows_written = self._written()
        if weight_written and rows_written:
            self._pull_equal()
        elif weight_written:
            self._pull()
        elif rows_written:
            self._push()
        elif self._unread:
            self._pull()

    def push_rows(self) -> None:
        """Copy the rows into ``weight``, also if nothing shows that they were written."""
        if self._written()[0]:
            self.synchronize()
        else:
            self._push()

    @property
    def selection(self) -> tuple[int, ...]:
        """``channels`` as ints; read from the device once a selection."""
        channels, version = self.channels, _stamp(self.channels)[0]
        # A shallow copy may have put in another tensor.
        if self._selection is None or self._selection[0] is not channels or self._selection[1] != version:
            self._selection = (channels, version, tuple(channels.tolist()))
        return self._selection[2]

    def _written(self) -> tuple[bool, bool]:
        """Which of weight and rows somebody wrote to since they last agreed."""
        weight, rows = self._own
        weight_stamp, rows_stamp = self._settled
        return _stamp(weight) != weight_stamp, _stamp(rows) != rows_stamp

    def _pull_equal(self) -> None:
        """Take the weight where both were written, to the same values."""
        weight, rows = (tensor.detach() for tensor in self._own)
        from_weight = self.read_rows(weight, self.channels)
        if torch.equal(from_weight, rows):  # a shallow copy of this layer may have done it
            self._settle()
            return
        # Equal up to rounding: an averaged copy of both is not bit-equal.
        tolerance = 8 * torch.finfo(rows.dtype).eps
        if from_weight.shape != rows.shape or not torch.allclose(
            from_weight, rows, rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise RuntimeError(
                "weight and channel_weight were both written since they last agreed, expected one of them: initialise "
                "weight alone, whose rows follow, give optimisers trainable_parameters(model), average state_dict()s; "
                "load_state_dict() takes the weight, and equal rows are accepted"
            )
        self._pull()

    def _pull(self) -> None:
        weight, rows = self._own
        with _outside_autograd():
            rows.copy_(self.read_rows(weight, self.channels))
        self._settle()

    def _push(self) -> None:
        weight, rows = self._own
        with _outside_autograd():
            self.write_rows(weight, self.channels, rows)
        self._settle()

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``weight`` and ``channel_weight`` for a forward, equal at the selected channels.

        Raises:
            RuntimeError: one of the two is computed from something else, or DDP was made for another number of rows.
        """
        weight, rows = self.weight, self.channel_weight
        own_weight, own_rows = self._own
        if weight is not own_weight or rows is not own_rows:
            return self._others_operands(weight, rows)
        if not torch.compiler.is_compiling():
            if DistributedDataParallel._active_ddp_module is not None:
                self._check_wrapper(DistributedDataParallel._active_ddp_module)
            self._reconcile()
        return weight, rows

    def _others_operands(
        self, weight: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``_operands`` where one of the two is not the layer's own: lent for this call by ``torch.func.functional_call``.

        Rows are written into a copy of the weight. A weight alone gives no gradient to the layer's own rows, but for
        a parameter that was put in its place, and that ``_take_replaced`` takes at the next step.
        """
        self._refuse_computed()
        if isinstance(rows, torch.fx.Proxy):
            return weight, rows
        if rows is not self._own[1]:
            merged = weight.detach().clone()
            self.write_rows(merged, self.channels, rows.detach())
            return merged, rows
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "weight: got one that requires grad in the place of the layer's own, expected channel_weight beside it, "
                "which its gradient goes to: lend what named_parameters() gives, not state_dict(), or assign to layer.weight"
            )
        return weight, rows if isinstance(weight, nn.Parameter) else None

    def _take_replaced(self) -> None:
        """Take parameters that somebody put in the place of the layer's own, past ``register_parameter`` too.

        Not to be called in a forward, for whose time ``torch.func.functional_call`` does the same.
        """
        weight, rows = self._parameters.get("weight"), self._parameters.get("channel_weight")
        if weight is self._own[0] and rows is self._own[1]:  # the usual case, at every step
            return
        if not isinstance(weight, nn.Parameter) or not isinstance(rows, nn.Parameter):
            return
        self._check_replacement("weight", weight)
        self._check_replacement("channel_weight", rows)
        if weight is not self._own[0]:
            weight.requires_grad_(False)
            self._take_weight()
        else:
            self._adopt()
            self._push()

    def _check_replacement(self, name: str, value: torch.Tensor) -> None:
        expected = self._own[name == "channel_weight"].shape
        if is_traceable_wrapper_subclass(value):
            raise TypeError(
                f"{name}: got a {type(value).__name__}, expected a plain parameter: shard no sparse layer (FSDP2, tensor "
                "parallelism), DistributedDataParallel trains them"
            )
        if value.shape != expected:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {tuple(expected)}; select() changes the number of "
                "rows"
            )
        _check_dtype(value.dtype)

    def _check_wrapper(self, wrapper: nn.Module) -> None:
        """Refuse another number of rows than DDP has made its buckets for: it would average other elements, or none."""
        count = len(self.channel_weight)
        if self._wrapper is None or self._wrapper[0]() is not wrapper:
            self._wrapper = weakref.ref(wrapper), count
        elif self._wrapper[1] != count:
            raise RuntimeError(
                f"channels: got {count} of them in a layer whose DistributedDataParallel was made for {self._wrapper[1]}, "
                "expected the same number: wrap the network in a new one after select(), or draw with "
                "ChannelSampler(counts='fixed')"
            )

    def _refuse_computed(self) -> None:
        if getattr(self, "_is_replica", False):  # nn.DataParallel's copies have no parameters at all
            return
        for name in ("weight", "channel_weight"):
            if name not in self._parameters:
                raise RuntimeError(
                    f"{name}: got a tensor that is computed from others, expected a plain parameter: parametrise, "
                    "normalise or prune the dense layer (.to_dense()) instead"
                )

    # -- selection ---------------------------------------------------------------------------------

    def select(self, channels: Channels, optimizer: Optimizer | None = None) -> None:
        """Train these input channels from now on, and no others.

        ``channel_weight`` stays the same object and takes the rows of the new channels; its ``.grad`` is
        cleared. State that an optimiser keeps for channels that stay is carried over, that of channels that
        leave is dropped, and entering channels start as in a fresh optimiser. Under DDP every rank has to
        select the same channels, and another number of them needs a new wrapper.

        Args:
            channels: None for all, an int for that many at random, or a 1-D tensor or sequence of indices.
            optimizer: one that holds ``channel_weight``: its state is rearranged now instead of at its
                next step.

        Raises:
            TypeError, ValueError, IndexError: bad ``channels``; nothing has changed then.
            NotImplementedError: ``optimizer`` keeps state that cannot be rearranged; nothing has changed.
        """
        # Inference mode may write to rows of its own making alone: all others are to be saved for backward.
        with torch.inference_mode(self.channel_weight.is_inference()), torch.no_grad():
            self._select(channels, optimizer)

    def _select(self, channels: Channels, optimizer: Optimizer | None) -> None:
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        given = as_channels(channels, self.channel_count)
        indices = to_device(given, device)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer or None"
            )
        if optimizer is not None:
            optimizer_state.check(optimizer, self)
        self.synchronize()
        rows, previous = self.channel_weight, len(self.channels)
        selected = self.read_rows(self.weight.detach(), indices)
        rows.grad = None
        if selected.shape == rows.shape:
            # In place: addresses, DDP's hooks and compiled graphs stay valid.
            rows.copy_(selected)
            self.channels.copy_(indices)
        else:
            # A live graph keeps a gradient accumulator with the old shape; a change of dtype renews it.
            other = torch.float64 if rows.dtype != torch.float64 else torch.float32
            rows.data = torch.empty(0, dtype=other, device=rows.device)
            rows.data = selected
            # Such a graph has saved the old indices, and its backward has to notice.
            torch.autograd.graph.increment_version(self.channels)
            self.channels = indices
            if not len(indices) or not previous:  # otherwise as the user set it
                rows.requires_grad_(len(indices) > 0)
        # What came from the host need not be read back from a GPU.
        on_host = given.device.type == "cpu"
        selection = self.channels, _stamp(self.channels)[0]
        self._selection = (*selection, tuple(given.tolist())) if on_host else None
        self._settle()
        if optimizer is not None:
            optimizer_state.rearrange(optimizer, self)

    # -- what nn.Module does with parameters -------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not torch.compiler.is_compiling():
            self._synchronize_held()
        rows = self._parameters.pop("channel_weight")
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["channel_weight"] = rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight_written, rows_written = self._written()
        if rows_written and not weight_written:
            self._push()
        before = _stamp(self.weight)
        rows = self._parameters.pop("channel_weight")
        # torch.distributed.checkpoint fills up what it loads with the model's own parameters.
        name = f"{prefix}channel_weight"
        if state_dict.get(name) is rows:
            state_dict = {key: value for key, value in state_dict.items() if key != name}
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._parameters["channel_weight"] = rows
        if self.weight is not self._own[0] or _stamp(self.weight) != before:
            self._take_weight()

    def _take_weight(self) -> None:
        """The weight as it is now wins, whatever was written to the rows, which take its dtype and device."""
        weight, rows = self.weight, self.channel_weight
        if (rows.dtype, rows.device) != (weight.dtype, weight.device):
            if not weight.is_meta:
                self.channels = self.channels.to(weight.device)
            selected = self.read_rows(weight.detach(), self.channels)
            if rows.is_meta or weight.is_meta:  # no tensor goes to or from there
                self._parameters["channel_weight"] = nn.Parameter(selected, requires_grad=rows.requires_grad)
            else:
                rows.data, rows.grad = selected, None
        self._adopt()
        self._pull()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._synchronize_held()
        # `to_empty` and the like would leave indices that point anywhere.
        indices = self._buffers.pop("channels")
        try:
            super()._apply(fn, recurse)
        finally:
            assert indices is not None
            self._buffers["channels"] = indices if self.weight.is_meta else indices.to(self.weight.device)
        self._adopt()
        return self

    def _holds_own(self) -> bool:
        return self.weight is self._own[0] and self.channel_weight is self._own[1]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if not (
            name in ("weight", "channel_weight")
            and isinstance(param, nn.Parameter)
            and "_own" in self.__dict__
        ):
            super().register_parameter(name, param)
            return
        self._check_replacement(name, param)
        super().register_parameter(name, param)
        # While a state_dict is being loaded the rows are hidden, and it takes the weight itself afterwards.
        self._take_replaced()

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 writes to `_parameters` itself where a class does not define this.
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self._synchronize_held()
        state = self.__dict__.copy()
        for name in _IDENTITIES:
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, selected={len(self.channels)}"
        return text if self.stored == "exact" else f"{text}, stored={self.stored!r}"
