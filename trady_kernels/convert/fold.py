"""What a graph allows: norms and padding done by their convolution, activations in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trady_kernels.batch import without_trace
from trady_kernels.convert.classes import FOLDED_NORMS, FOLDED_PADDING, SPARSE, base_in
from trady_kernels.convert.graph import Flow, trace_flow
from trady_kernels.convert.tracer import Others
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.norm_family import FoldedBatchNormAct2d, FrozenBatchNormAct2d

_NORM_AND_ACT = (FrozenBatchNormAct2d, FoldedBatchNormAct2d)


def trace(
    model: nn.Module,
    names: Mapping[nn.Module, str],
    becomes: Mapping[str, type[nn.Module]],
    counts: Mapping[nn.Module, int] | None,
    others: Others,
) -> Flow:
    """What the graphs of a network prove.

    Args:
        model: the network, not converted yet.
        names: its modules.
        becomes: the class of those that change it.
        counts: how often an example run calls each module; None without an example.
        others: what it gives modules besides tensors.
    """

    def is_fresh(module: nn.Module) -> bool:
        known = names[module] in becomes or type(module) in (*SPARSE, nn.BatchNorm2d)
        kind = becomes.get(names[module], type(module))
        if not known or _is_watched(module) or issubclass(kind, _NORM_AND_ACT):
            return False  # the output of norm and activation in one is the activation's
        return issubclass(kind, (nn.Conv2d, nn.Linear, _BatchNorm))

    leaves = {module for module in names if isinstance(module, _BatchNorm)}
    with without_trace(model):  # buffers are no proxies: a forward that counts its calls writes to them
        return trace_flow(
            model, leaves=leaves, fresh=set(filter(is_fresh, names)), calls=counts, others=others
        )


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of the instance's own, see what goes in or comes out."""
    return any(
        (
            "forward" in module.__dict__,
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def fold(names: Mapping[nn.Module, str], flow: Flow) -> dict[str, str]:
    """Fold norms and paddings into their convolutions where that is exact; ``{name: name of the convolution}``."""
    folded = {}
    padding_of: dict[nn.Module, nn.Module] = {}
    for module in names:
        user = flow.user_of(module)
        if base_in(FOLDED_PADDING, module) is not None and user is not None and not _is_watched(module):
            padding_of[user] = module
    for conv, name in names.items():
        if not isinstance(conv, SparseConv2d) or _is_watched(conv):
            continue
        norm = flow.user_of(conv)
        if not isinstance(norm, nn.BatchNorm2d) or type(norm) not in FOLDED_NORMS or _is_watched(norm):
            norm = None
        padding = padding_of.get(conv)
        margins = None if padding is None else _margins_of(padding)
        if margins is not None and not conv.can_fold_margins(margins):
            margins = padding = None
        if norm is None and margins is None:
            continue
        conv.fold(norm, margins)
        if norm is not None:
            norm.__class__ = FOLDED_NORMS[type(norm)]  # type: ignore[assignment]
            folded[names[norm]] = name
        if padding is not None and margins is not None:
            base = base_in(FOLDED_PADDING, padding)
            assert base is not None
            padding.__class__ = FOLDED_PADDING[base]
            folded[names[padding]] = name
    return folded


def _margins_of(padding: nn.Module) -> tuple[int, int, int, int] | None:
    """What a padding module adds (left, right, top, bottom); None unless it adds zeros."""
    assert isinstance(padding, nn.ConstantPad2d)
    return padding.padding if padding.value == 0 else None


def overwrite(names: Mapping[nn.Module, str], flow: Flow) -> None:
    """Let the lean activations work in place whose input nobody else needs."""
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in names:
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    for module in names:
        if not hasattr(type(module), "overwrites_input") or _is_watched(module):
            continue
        owners = parents.get(module, [])
        inside_norm = len(owners) == 1 and isinstance(owners[0], _NORM_AND_ACT)
        if inside_norm or flow.may_overwrite(module):
            module.__dict__["overwrites_input"] = True
