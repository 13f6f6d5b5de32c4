"""What an example run of a network calls."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode

from trady_kernels.batch import Example, call, storage_key, tensors_in, without_trace

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Calls:
    """What an example run calls.

    Attributes:
        layers: names of the convolutions and linears, in order of the calls.
        head: name of the last one whose output is the network's; None if there is none.
        counts: how often each module is called; None without an example.
        attention: the modules that call ``F.scaled_dot_product_attention`` themselves.
        before_norm: ``{name of a norm: name of the layer called last before it}``, of the norms that have one.
        bypassed: names of the layers whose weight something else than the layer computes with.
        others: of the arguments that modules were given None for, or a tuple, a mapping or the like that holds
            tensors, the names and the classes of what was given.
    """

    layers: list[str] = field(default_factory=list)
    head: str | None = None
    counts: Counter[nn.Module] | None = None
    attention: list[nn.Module] = field(default_factory=list)
    before_norm: dict[str, str] = field(default_factory=dict)
    bypassed: set[str] = field(default_factory=set)
    others: dict[nn.Module, dict[str, set[type]]] = field(default_factory=dict)


#: Through these no gradient comes back to the tensor they are called on.
_WITHOUT_GRADIENT = {
    torch.Tensor.detach,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__get__,  # type: ignore[union-attr]
    torch.Tensor.new_tensor,
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
    torch.Tensor.new_ones,
    torch.Tensor.new_zeros,
    torch.empty_like,
    torch.full_like,
    torch.ones_like,
    torch.rand_like,
    torch.randn_like,
    torch.zeros_like,
}
#: These take dtype and device alone of any tensor but the first.
_CASTS = {torch.Tensor.to, torch.Tensor.type_as}


class _Watching(TorchFunctionMode):
    """Notes which module runs when a function is called that the conversion has to know of.

    Attributes:
        attention: the modules that call ``F.scaled_dot_product_attention``.
        bypassed: the layers whose weight goes into a call while another module runs.
    """

    def __init__(self, names: Mapping[nn.Module, str], running: list[nn.Module]) -> None:
        super().__init__()
        self._running = running
        self._layers = {
            id(weight): module
            for module in names
            if isinstance(module, _ConvNd | nn.Linear)
            and (weight := module._parameters.get("weight")) is not None
        }
        self.attention: dict[nn.Module, None] = {}
        self.bypassed: set[nn.Module] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        running = self._running[-1] if self._running else None
        if function is F.scaled_dot_product_attention and running is not None:
            self.attention[running] = None
        output = function(*args, **(kwargs or {}))
        # What yields no tensor asks for a shape or a dtype.
        if function not in _WITHOUT_GRADIENT and next(tensors_in(output), None) is not None:
            given = args[:1] if function in _CASTS else (args, kwargs)
            layers = {self._layers.get(id(tensor)) for tensor in tensors_in(given)}
            self.bypassed |= {layer for layer in layers if layer is not None and layer is not running}
        return output


def all_calls(names: Mapping[nn.Module, str]) -> Calls:
    """Without an example: every layer is called, in the order of definition."""
    layers: list[str] = []
    before_norm: dict[str, str] = {}
    for module, name in names.items():
        # The output projection of nn.MultiheadAttention, whose weight is used without a call.
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(
            module, NonDynamicallyQuantizableLinear
        ):
            layers.append(name)
        elif isinstance(module, NORMS) and layers:
            before_norm[name] = layers[-1]
    return Calls(layers, head=layers[-1] if layers else None, before_norm=before_norm)


def _fits(forward: Callable[..., Any], example_input: Example) -> bool:
    """Whether a forward's signature takes as many arguments, or arguments of these names."""
    try:
        if isinstance(example_input, Mapping):
            inspect.signature(forward).bind(**example_input)
        elif isinstance(example_input, tuple | list):
            inspect.signature(forward).bind(*example_input)
    except TypeError:
        return False
    return True


def _others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, type]:
    """The class of what a module is given for an argument that is no tensor but None, or holds tensors; by its name."""
    try:
        signature = inspect.signature(inspect.unwrap(type(module).forward))
        given = signature.bind_partial(module, *args, **kwargs).arguments
    except (TypeError, ValueError):  # the forward will say so itself
        return {}
    return {
        name: type(value)
        for name, value in given.items()
        if value is None
        or (not isinstance(value, torch.Tensor) and next(tensors_in(value), None) is not None)
    }


def example_calls(model: nn.Module, names: Mapping[nn.Module, str], example_input: Example) -> Calls:
    """Run the network once, in eval mode, and note what it calls.

    Raises:
        TypeError: the network's forward takes no such arguments.
    """
    layers: list[str] = []
    outputs: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    counts: Counter[nn.Module] = Counter()
    before_norm: dict[str, str] = {}
    norm_is_last = False
    running: list[nn.Module] = []

    others: dict[nn.Module, dict[str, set[type]]] = {}

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(module)
        if not all(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            for name, kind in _others(module, args, kwargs).items():
                others.setdefault(module, {}).setdefault(name, set()).add(kind)

    def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal norm_is_last
        running.pop()
        counts[module] += 1
        if isinstance(module, _ConvNd | nn.Linear):
            layers.append(names[module])
            norm_is_last = False
            # A view of an output keeps its base alive, and with it the weak reference.
            outputs.extend((names[module], weakref.ref(tensor)) for tensor in tensors_in(output))
        elif isinstance(module, NORMS):
            norm_is_last = True
            if layers:
                before_norm.setdefault(names[module], layers[-1])

    handles = [module.register_forward_hook(called) for module in names]
    handles += [module.register_forward_pre_hook(begins, with_kwargs=True) for module in names]
    try:
        with without_trace(model, training=False), torch.no_grad(), _Watching(names, running) as watching:
            output = call(model, example_input)
    except TypeError as error:
        if _fits(model.forward, example_input):
            raise  # from inside the network
        given = ", ".join(example_input) if isinstance(example_input, Mapping) else len(example_input)
        raise TypeError(
            f"example_input: got a {type(example_input).__name__} of {given}, which the forward of "
            f"{type(model).__name__} does not take, expected its arguments: give the network's input alone, not "
            "(input, target) or a shape"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    head = None
    storages = {storage_key(tensor) for tensor in tensors_in(output)}
    for name, reference in outputs:
        tensor = reference()
        if tensor is not None and storage_key(tensor) in storages:
            head = name
    if head is None and layers and not norm_is_last:
        head = layers[-1]
    bypassed = {names[layer] for layer in watching.bypassed}
    return Calls(layers, head, counts, list(watching.attention), before_norm, bypassed, others)
