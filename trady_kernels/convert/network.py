"""``sparsify`` and ``densify``: a network's modules change their class in place, and back."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trady_kernels.batch import Example, call, without_trace
from trady_kernels.convert import fold, report
from trady_kernels.convert.all_or_nothing import all_or_nothing
from trady_kernels.convert.biases import biases_to_train, check_biases
from trady_kernels.convert.classes import (
    DENSE,
    LEAN,
    SPARSE,
    added_names,
    base_in,
    frozen_class,
)
from trady_kernels.convert.example_run import NORMS, Calls, all_calls, example_calls
from trady_kernels.convert.report import (
    ConversionReport,
    biases_of_reports,
    folded_of_reports,
    head_of_part,
)
from trady_kernels.functional.stored import Stored, check_stored
from trady_kernels.memory import saved_by_module
from trady_kernels.nn.attention import keep_attention, recompute_attention
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.nn.eight_bit import keep_in_eight_bits, keep_in_full

_RECORD = "_before_sparsify"

Lean = bool | Literal["8bit"]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Before:
    """A module as it was before ``sparsify``."""

    kind: type[nn.Module]
    requires_grad: Mapping[str, bool]


@dataclass
class _Plan:
    """What becomes of each module, by name; nothing has changed yet."""

    sparse: dict[str, type[nn.Module]] = field(default_factory=dict)
    norms: dict[str, type[nn.Module]] = field(default_factory=dict)
    lean: dict[str, type[nn.Module]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def becomes(self) -> dict[str, type[nn.Module]]:
        """The class of every module that changes it, by name."""
        return {**self.sparse, **self.norms, **self.lean}


def sparsify(
    model: Model,
    example_input: Example | None = None,
    *,
    head: str | None = "auto",
    freeze_norm: bool = True,
    lean: Lean = True,
    biases: bool | int = False,
    stored: Stored = "exact",
) -> Model:
    """Make a network's convolutions and linears sparse, in place, with no channel selected yet.

    Afterwards only ``channel_weight``s, the head and the ``biases`` asked for require gradients, and what stands
    between the layers keeps as little as it can: frozen batch norms are folded into the convolution before them
    wherever a ``torch.fx`` graph proves that its output goes nowhere else, and are an affine that keeps nothing
    elsewhere; ReLU-like activations and dropout keep one bit an element, max pooling a byte; attention whose
    probabilities torch would keep (on the CPU: with dropout) computes them again. Modules stay the same
    objects under the same names, with their hooks, modes, devices and dtypes, and ``state_dict()`` keeps its
    keys and values. What stays as it was, and why, is in ``conversion_report(model)``. A second call changes
    nothing more.

    An activation works in place where the graph proves that nothing else needs its input: a hook that keeps
    the output of the layer before it then sees it overwritten, as with ``inplace=True``. Layers that have hooks
    already are left out of this and of folding. What ``torch.compile`` has taken over already runs uncompiled here,
    and is compiled anew at its next call.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments. The network
            runs on it twice and is left as it was: in eval mode, whose layers become sparse, and in the mode
            it is in, with gradients, for the bytes in the report. Without it: all layers, in the order of their
            definition, also those whose weight the network uses directly (a tied decoder's), which then loses that
            part of its gradient; nothing folded in a network that fx cannot trace whole, and no bytes.
        head: name of the module that stays dense and trains as a whole; "auto" for the last layer whose
            output is the network's (the last layer called where an operation without layers follows); None
            for no head.
        freeze_norm: fix the statistics and affine of batch norms, under ``train()`` too, and the affine of
            other norms. False leaves norms as they are, and trainable as they were.
        lean: False leaves activations, pooling and dropout as they are. "8bit" also packs what all other
            operations keep for backward (GELU, SiLU, Hardswish, layer norm, attention, gates) into one byte
            an element, which costs exactness: see ``trady_kernels.functional.eight_bit``.
        biases: True trains the biases of all sparse layers and of the frozen batch norms behind them, an int those
            of that many last layers in the order of calls (Sparse Update, arXiv 2206.15472). Their gradients keep
            no activation and no budget counts them, but the backward pass goes down to the lowest of them, which
            keeps the bits of the activations on its way. Biases of other norms (layer norms) stay frozen.
        stored: how the sparse layers keep their selected channels: "exact", or in a quarter of float32's bytes as
            "8bit", with gradients that are less exact (``SparseConv2d``). Budgets in bytes then hold more channels.
            Layers that are sparse already stay as they are.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or has layers whose parameters are sharded or packed (``DTensor``);
            ``example_input`` is of another type or not what its forward takes.
        ValueError: ``head`` names no module, or one that is sparse already; ``freeze_norm``, ``lean``, ``biases`` or
            ``stored`` is none of these; ``model`` has no layer that can become sparse, is itself one, or has lazy
            parameters. Nothing has changed then, nor where the network raises in one of its two runs.
    """
    _check_model(model)
    if isinstance(model, _ConvNd | nn.Linear | _BatchNorm):
        raise ValueError(
            f"model: got a single {type(model).__name__}, expected a network that contains layers, such as "
            "nn.Sequential(layer)"
        )
    if not isinstance(freeze_norm, bool):
        raise ValueError(f"freeze_norm: got {freeze_norm!r}, expected True or False")
    if not isinstance(lean, bool) and lean != "8bit":
        raise ValueError(f'lean: got {lean!r}, expected True, False or "8bit"')
    check_biases(biases)
    check_stored(stored)
    names = {module: name for name, module in model.named_modules()}
    _check_tensors(names)
    trained_before = biases_of_reports(model)
    calls = example_calls(model, names, example_input) if example_input is not None else all_calls(names)
    if head == "auto":
        head = _last_layer(model, names, calls)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside_head = _modules_of_head(modules, head)
    plan = _plan(names, inside_head, calls, freeze_norm=freeze_norm, lean=bool(lean))
    if not plan.sparse:
        raise ValueError(
            f"model: got {type(model).__name__} in which no nn.Conv2d or nn.Linear besides the head can become "
            "sparse, expected at least one"
        )
    flow = fold.trace(model, names, plan.becomes, calls.counts, calls.others)

    with all_or_nothing(model):
        kept = set(inside_head)
        if not freeze_norm:  # with what computes their parameters
            kept.update(*(module.modules() for module in names if isinstance(module, NORMS)))
        for module in names:  # all of them before the first change: parameters may be shared
            _record(module)
        for module, name in names.items():
            if name in plan.norms:
                module.__class__ = plan.norms[name]
            if module not in kept and not isinstance(module, SparseChannels):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
                    parameter.grad = None  # an optimiser would still step on it
            if name in plan.sparse and not isinstance(module, SparseChannels):
                layer_class = plan.sparse[name]
                assert issubclass(layer_class, SparseChannels)
                layer_class.take_over(module, channels=(), stored=stored)  # a count would draw at random
            if name in plan.lean:
                module.__class__ = plan.lean[name]
        for module in inside_head:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
        folded = {**folded_of_reports(model, names), **fold.fold(names, flow)}
        fold.overwrite(names, flow)
        trained = biases_to_train(names, plan.sparse, plan.norms, calls, folded, biases)
        for bias in trained_before:
            if id(bias) not in map(id, trained.values()):
                bias.requires_grad_(False)
                bias.grad = None  # an optimiser would still step on it
        for bias in trained.values():
            bias.requires_grad_(True)
        for module in calls.attention if lean else ():
            if module not in inside_head:
                recompute_attention(module)
        if lean == "8bit":
            keep_in_eight_bits(model, exact=[modules[head]] if head is not None else [])
        known = {*plan.becomes, *(names[module] for module in inside_head)}
        model.__dict__[report.ATTRIBUTE] = ConversionReport(
            head,
            tuple(plan.sparse),
            tuple(plan.norms),
            plan.dense,
            folded,
            tuple(plan.lean),
            {} if example_input is None else _kept_elsewhere(model, example_input, known),
            {name: bias.numel() for name, bias in trained.items()},
        )
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
        ValueError: a module that would change its class was given a forward of its own. Nothing has changed then.
    """
    _check_model(model)
    for name, module in model.named_modules():
        if "forward" in module.__dict__ and _dense_class(module) is not type(module):
            raise ValueError(
                f"model: got a forward of the instance's own in {name!r}, put on a {type(module).__name__}, expected "
                "that of its class: take hooks and wrappers off again before densify(model)"
            )
    keep_in_full(model)
    for module in list(model.modules()):
        dense = _dense_class(module)
        changes = dense is not type(module)
        before = module.__dict__.pop(_RECORD, None)
        module.__dict__.pop(report.ATTRIBUTE, None)
        module.__dict__.pop("overwrites_input", None)
        keep_attention(module)
        if isinstance(module, SparseChannels):
            module.hand_back(dense)
        elif changes:
            module.__class__ = dense
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if before is not None:
                parameter.requires_grad_(before.requires_grad.get(name, parameter.requires_grad))
            elif changes:
                parameter.requires_grad_(True)
    return model


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


def _check_tensors(names: Mapping[nn.Module, str]) -> None:
    for module, name in names.items():
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        for key, parameter in module._parameters.items():
            if is_traceable_wrapper_subclass(parameter):
                raise TypeError(
                    f"model: got a {type(parameter).__name__} as {name}.{key}, expected a plain parameter: shard no "
                    "sparse layer (FSDP2, tensor parallelism), DistributedDataParallel trains them"
                )


def _plan(
    names: Mapping[nn.Module, str],
    inside_head: Set[nn.Module],
    calls: Calls,
    *,
    freeze_norm: bool,
    lean: bool,
) -> _Plan:
    reasons = _reasons_to_stay(names, calls)
    plan = _Plan()
    for module, name in names.items():
        if module in inside_head:
            continue
        lean_base = base_in(LEAN, module) if lean else None
        if isinstance(module, SparseChannels):
            plan.sparse[name] = type(module)
        elif isinstance(module, _ConvNd | nn.Linear):
            base = base_in(SPARSE, module)
            if name in reasons:
                plan.dense[name] = reasons[name]
            elif base is None:
                plan.dense[name] = f"{type(module).__name__} has no sparse form"
            else:
                plan.sparse[name] = SPARSE[base]
        elif isinstance(module, _BatchNorm) and freeze_norm:
            frozen = frozen_class(module)
            if frozen is None:
                why = (
                    "parameters are computed (parametrised)"
                    if is_parametrized(module)
                    else "statistics follow train()"
                )
                plan.dense[name] = f"{type(module).__name__} cannot be frozen: its {why}"
            else:
                plan.norms[name] = frozen
        elif type(module) in LEAN.values():
            plan.lean[name] = type(module)
        elif lean_base is not None:
            plan.lean[name] = LEAN[lean_base]
        elif _has_own_weights(module):
            plan.dense[name] = f"{type(module).__name__} has no sparse form"
    return plan


def _record(module: nn.Module) -> None:
    if _RECORD not in module.__dict__:
        flags = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        kind = type(module)
        if kind in DENSE:  # built by hand, so it is frozen by nature
            kind, flags = DENSE[kind], dict.fromkeys(flags, True)
        module.__dict__[_RECORD] = _Before(kind, flags)


def _dense_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``densify`` gives a module."""
    before = module.__dict__.get(_RECORD)
    return before.kind if before else DENSE.get(type(module), type(module))


def _last_layer(model: nn.Module, names: Mapping[nn.Module, str], calls: Calls) -> str | None:
    """What ``head="auto"`` means: the head of before, or the layer whose output is the network's."""
    before = model.__dict__.get(report.ATTRIBUTE)
    if before is not None:
        return before.head
    layer = next((module for module, name in names.items() if name == calls.head), None)
    if isinstance(layer, SparseChannels):  # of a part that has a head elsewhere, or none: a wrapper's network
        with suppress(LookupError):
            return head_of_part(model, names, layer)
    return calls.head


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


def _reasons_to_stay(names: Mapping[nn.Module, str], calls: Calls) -> dict[str, str]:
    owners, called = _owners(names), set(calls.layers)
    reasons = {}
    for module, name in names.items():
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reasons[name] = "its weight is computed (parametrised), not a plain parameter"
        elif is_parametrized(module):
            reasons[name] = "one of its parameters is computed (parametrised)"
        elif not weight.is_floating_point():
            reasons[name] = f"its weight is {weight.dtype}"
        elif len(owners[id(weight)]) > 1:
            others = ", ".join(repr(other) for other in owners[id(weight)] if other != name)
            reasons[name] = f"its weight is shared with {others}"
        elif name not in called:
            reasons[name] = "no call reaches it: its weight is used directly, or not at all"
        elif name in calls.bypassed:
            reasons[name] = "its weight is also used directly"
        elif isinstance(module, tuple(SPARSE)):
            base = base_in(SPARSE, module)
            if base is None:
                reasons[name] = f"{type(module).__name__} has a forward of its own"
            elif added := added_names(module, base):
                reasons[name] = f"{type(module).__name__} has a {added[0]!r}, which sparse layers lack"
    return reasons


def _has_own_weights(module: nn.Module) -> bool:
    """Whether a module that is no layer we know computes with matrices of its own (attention, recurrence)."""
    if isinstance(module, (*NORMS, nn.Embedding, nn.EmbeddingBag)):
        return False
    return any(
        "weight" in name and parameter is not None and parameter.dim() > 1
        for name, parameter in module._parameters.items()
    )


def _kept_elsewhere(model: nn.Module, example_input: Example, known: Set[str]) -> dict[str, int]:
    """Bytes that modules not in ``known`` keep when everything before them trains."""

    def train(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.requires_grad:
            return output.requires_grad_().clone()  # no leaf, which nothing may overwrite
        return None

    handles = [
        layer.register_forward_hook(train) for layer in model.modules() if isinstance(layer, SparseChannels)
    ]
    try:
        with without_trace(model), torch.enable_grad(), saved_by_module(model, example_input) as saved:
            for module in model.modules():
                if isinstance(module, NORMS):
                    module.training = False  # batch statistics of a small example may not exist
            call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return {name: size for name, size in saved.by_module.items() if name not in known}
