"""Whole networks: which module becomes which, and back."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from trady_kernels.batch import Example, call, tensors_in, without_trace
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.linear import SparseLinear
from trady_kernels.nn.norm import FrozenBatchNorm2d
from trady_kernels.nn.norm_family import (
    FrozenBatchNorm1d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
    FrozenSyncBatchNorm,
)

_SPARSE: Mapping[type[nn.Module], type[SparseChannels]] = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
_FROZEN: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_DENSE = {ours: dense for table in (_SPARSE, _FROZEN) for dense, ours in table.items()}
_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_RECORD, _REPORT = "_before_sparsify", "_conversion_report"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ConversionReport:
    """What ``sparsify`` made of a network.

    Attributes:
        head: name of the layer or module that stays dense and trains; None if there is none.
        sparse: names of the layers whose input channels can be selected.
        frozen_norms: names of the batch norms with fixed statistics.
        dense: ``{name: why}`` of the layers and norms that stay as they are; their parameters do not train.
    """

    head: str | None
    sparse: tuple[str, ...]
    frozen_norms: tuple[str, ...]
    dense: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{len(self.sparse)} sparse layers, {len(self.frozen_norms)} frozen norms, "
            + (f"head {self.head!r}" if self.head is not None else "no head")
        ]
        if self.dense:
            width = max(map(len, self.dense))
            lines.append("stay dense and frozen:")
            lines += [f"  {name:<{width}}  {why}" for name, why in self.dense.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Before:
    """A module as it was before ``sparsify``."""

    kind: type[nn.Module]
    requires_grad: Mapping[str, bool]


@dataclass
class _Calls:
    """What an example run calls, in order."""

    layers: list[str] = field(default_factory=list)
    outputs: list[tuple[str, weakref.ref[torch.Tensor]]] = field(default_factory=list)
    norm_is_last: bool = False
    head: str | None = None


def sparsify(
    model: Model, example_input: Example | None = None, *, head: str | None = "auto", freeze_norm: bool = True
) -> Model:
    """Make a network's convolutions and linears sparse, in place, with no channel selected yet.

    Afterwards only ``channel_weight``s and the head require gradients. Modules stay the same objects under
    the same names, with their hooks, modes, devices and dtypes, and ``state_dict()`` keeps its keys. What
    stays dense, and why, is in ``conversion_report(model)``. A second call changes nothing more.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments. The network
            runs on it once, in eval mode, and the layers that this run calls become sparse. Without it: all
            layers, in the order of their definition.
        head: name of the module that stays dense and trains as a whole; "auto" for the last layer whose
            output is the network's (the last layer called where an operation without layers follows); None
            for no head.
        freeze_norm: fix the statistics and affine of batch norms, under ``train()`` too, and the affine of
            other norms. False leaves norms as they are, and trainable as they were.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` is of another type.
        ValueError: ``head`` names no module, or one that is sparse already; ``model`` has no layer that can
            become sparse, is itself one, or has lazy parameters. Nothing has changed then.
    """
    _check_model(model)
    if isinstance(model, _ConvNd | nn.Linear | _BatchNorm):
        raise ValueError(
            f"model: got a single {type(model).__name__}, expected a network that contains layers, such as "
            "nn.Sequential(layer)"
        )
    names = {module: name for name, module in model.named_modules()}
    earlier = _find_report(model)
    calls = _example_calls(model, names, example_input) if example_input is not None else _all_calls(names)
    if head == "auto":
        head = earlier.head if earlier else calls.head
    modules = dict(model.named_modules(remove_duplicate=False))
    inside_head = _modules_of_head(modules, head)
    reasons = _reasons_to_stay(names, calls)

    sparse: dict[str, type[nn.Module]] = {}
    norms: dict[str, type[nn.Module]] = {}
    dense: dict[str, str] = {}
    for module, name in names.items():
        if module in inside_head:
            continue
        if isinstance(module, SparseChannels):
            sparse[name] = type(module)
        elif isinstance(module, _ConvNd | nn.Linear):
            base = _base_in(_SPARSE, module)
            if name in reasons:
                dense[name] = reasons[name]
            elif base is None:
                dense[name] = f"{type(module).__name__} has no sparse form"
            else:
                sparse[name] = _SPARSE[base]
        elif isinstance(module, _BatchNorm) and freeze_norm:
            frozen = _frozen_class(module)
            if frozen is None:
                dense[name] = f"{type(module).__name__} cannot be frozen: its statistics follow train()"
            else:
                norms[name] = frozen
        elif _has_own_weights(module):
            dense[name] = f"{type(module).__name__} has no sparse form"
    if not sparse:
        raise ValueError(
            f"model: got {type(model).__name__} in which no nn.Conv2d or nn.Linear besides the head can become "
            "sparse, expected at least one"
        )

    kept = set(inside_head) if freeze_norm else inside_head | {m for m in names if isinstance(m, _NORMS)}
    for module in names:  # all of them before the first change: parameters may be shared
        _record(module)
    for module, name in names.items():
        if name in norms:
            module.__class__ = norms[name]
        if module not in kept and not isinstance(module, SparseChannels):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimiser would still step on it
        if name in sparse and not isinstance(module, SparseChannels):
            layer_class = sparse[name]
            assert issubclass(layer_class, SparseChannels)
            layer_class.take_over(module, channels=())  # a count would draw at random
    for module in inside_head:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    model.__dict__[_REPORT] = ConversionReport(head, tuple(sparse), tuple(norms), dense)
    return model


def densify(model: Model) -> Model:
    """Undo ``sparsify`` in place: the original classes and ``requires_grad`` flags, with the values of now.

    Sparse layers and frozen norms that were built by hand become ``nn.Conv2d``, ``nn.Linear`` and batch norms
    whose parameters train.

    Args:
        model: a network with sparse layers, or any other, which stays as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    for module in list(model.modules()):
        before = module.__dict__.pop(_RECORD, None)
        module.__dict__.pop(_REPORT, None)
        dense = before.kind if before else _DENSE.get(type(module), type(module))
        if isinstance(module, SparseChannels):
            module.hand_back(dense)
        elif type(module) is not dense:
            module.__class__ = dense
        else:
            dense = None
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if before is not None:
                parameter.requires_grad_(before.requires_grad.get(name, parameter.requires_grad))
            elif dense is not None:
                parameter.requires_grad_(True)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What ``sparsify`` made of a network: its head, its sparse layers, what stayed dense and why.

    Raises:
        ValueError: ``model`` has not been through ``sparsify``.
    """
    report = _find_report(model)
    if report is None:
        raise ValueError(
            f"model: got a {type(model).__name__} without a conversion report, expected one that sparsify(model) "
            "has converted"
        )
    return report


def sparse_layers(model: nn.Module) -> dict[str, SparseChannels]:
    """The sparse layers of a network by name, in the order of definition.

    Raises:
        ValueError: there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseChannels)}
    if not layers:
        raise ValueError(
            f"model: got a {type(model).__name__} without sparse layers, expected one that sparsify(model) has "
            "converted"
        )
    return layers


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What to give an optimiser: every ``channel_weight``, also those without a channel now, and the head.

    Args:
        model: a network with sparse layers.

    Returns:
        Each ``channel_weight`` and every other parameter that requires a gradient.

    Raises:
        ValueError: ``model`` has no sparse layer.
    """
    rows = {id(layer.channel_weight) for layer in sparse_layers(model).values()}
    return [parameter for parameter in model.parameters() if parameter.requires_grad or id(parameter) in rows]


def select_fraction(model: nn.Module, fraction: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Select that share of every sparse layer's channels, at random.

    Args:
        model: a network with sparse layers.
        fraction: from 0 to 1; above 0 every layer gets at least one channel.
        seed: of the draw, which is the same on every device.

    Returns:
        ``{layer name: (k,) int64, sorted}``, on the CPU.

    Raises:
        TypeError: ``fraction`` is not a number.
        ValueError: it is outside 0 to 1, or ``model`` has no sparse layer. Nothing has changed then.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    selection = {}
    for name, layer in sparse_layers(model).items():
        count = max(math.floor(fraction * layer.channel_count + 0.5), 1 if fraction else 0)
        selection[name] = torch.randperm(layer.channel_count, generator=generator)[:count].sort().values
        layer.select(selection[name])
    return selection


# -- which module becomes which --------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [
        name for name, tensor in tensors if isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    ]
    if lazy:
        raise ValueError(
            f"model: got the uninitialised lazy parameter {lazy[0]!r}, expected a network that has run once"
        )


def _find_report(model: nn.Module) -> ConversionReport | None:
    return next((m.__dict__[_REPORT] for m in model.modules() if _REPORT in m.__dict__), None)


def _record(module: nn.Module) -> None:
    if _RECORD not in module.__dict__:
        flags = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        kind = type(module)
        if kind in _DENSE:  # built by hand, so it is frozen by nature
            kind, flags = _DENSE[kind], dict.fromkeys(flags, True)
        module.__dict__[_RECORD] = _Before(kind, flags)


def _all_calls(names: Mapping[nn.Module, str]) -> _Calls:
    layers = [
        name
        for module, name in names.items()
        # The output projection of nn.MultiheadAttention, whose weight is used without a call.
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    return _Calls(layers, head=layers[-1] if layers else None)


def _example_calls(model: nn.Module, names: Mapping[nn.Module, str], example_input: Example) -> _Calls:
    calls = _Calls()

    def layer_called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.layers.append(names[module])
        calls.norm_is_last = False
        # A view of an output keeps its base alive, and with it the weak reference.
        calls.outputs += [(names[module], weakref.ref(tensor)) for tensor in tensors_in(output)]

    def norm_called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.norm_is_last = True

    handles = []
    for module in names:
        if isinstance(module, _ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(layer_called))
        elif isinstance(module, _NORMS):
            handles.append(module.register_forward_hook(norm_called))
    try:
        with without_trace(model, training=False), torch.no_grad():
            output = call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(output)}
    for name, reference in calls.outputs:
        tensor = reference()
        if tensor is not None and tensor.untyped_storage().data_ptr() in storages:
            calls.head = name
    if calls.head is None and calls.layers and not calls.norm_is_last:
        calls.head = calls.layers[-1]
    return calls


def _modules_of_head(modules: Mapping[str, nn.Module], head: str | None) -> set[nn.Module]:
    if head is None:
        return set()
    if head not in modules or head == "":
        near = [name for name in modules if isinstance(head, str) and name and (head in name or name in head)]
        hint = f"; near it: {', '.join(near[-3:])}" if near else ""
        raise ValueError(
            f'head: got {head!r}, expected "auto", None or the name of a module of the network{hint}'
        )
    inside = set(modules[head].modules())
    if any(isinstance(module, SparseChannels) for module in inside):
        raise ValueError(
            f"head: got {head!r}, which is sparse already, expected a dense one: densify(model) first"
        )
    return inside


def _owners(names: Mapping[nn.Module, str]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for module, name in names.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _reasons_to_stay(names: Mapping[nn.Module, str], calls: _Calls) -> dict[str, str]:
    owners, called = _owners(names), set(calls.layers)
    reasons = {}
    for module, name in names.items():
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reasons[name] = "its weight is computed (parametrised), not a plain parameter"
        elif not weight.is_floating_point():
            reasons[name] = f"its weight is {weight.dtype}"
        elif len(owners[id(weight)]) > 1:
            others = ", ".join(repr(other) for other in owners[id(weight)] if other != name)
            reasons[name] = f"its weight is shared with {others}"
        elif name not in called:
            reasons[name] = "no call reaches it: its weight is used directly, or not at all"
        elif isinstance(module, tuple(_SPARSE)) and _base_in(_SPARSE, module) is None:
            reasons[name] = f"{type(module).__name__} has a forward of its own"
    return reasons


def _has_own_weights(module: nn.Module) -> bool:
    """Whether a module that is no layer we know computes with matrices of its own (attention, recurrence)."""
    if isinstance(module, (*_NORMS, nn.Embedding, nn.EmbeddingBag)):
        return False
    return any(
        "weight" in name and parameter is not None and parameter.dim() > 1
        for name, parameter in module._parameters.items()
    )


def _base_in(table: Mapping[type[nn.Module], Any], module: nn.Module) -> type[nn.Module] | None:
    """The class in ``table`` whose computation ``module`` does unchanged."""
    kind = type(module)
    for base in table:
        if isinstance(module, base) and all(
            getattr(kind, method, None) is getattr(base, method, None)
            for method in ("forward", "_conv_forward")
        ):
            return base
    return None


def _frozen_class(module: _BatchNorm) -> type[nn.Module] | None:
    if type(module) in _FROZEN.values() or isinstance(module, FrozenBatchNormAct2d):
        return type(module)
    if module.running_mean is None or module.running_var is None:
        return None
    # timm's norm and activation in one module; timm itself need not be installed.
    if type(module).__name__ == "BatchNormAct2d" and {name for name, _ in module.named_children()} == {
        "drop",
        "act",
    }:
        return FrozenBatchNormAct2d
    base = _base_in(_FROZEN, module)
    return _FROZEN[base] if base is not None else None
