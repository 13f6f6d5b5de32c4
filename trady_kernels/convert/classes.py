"""Which class becomes which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from trady_kernels.nn.activation import (
    LeanHardsigmoid,
    LeanHardtanh,
    LeanLeakyReLU,
    LeanReLU,
    LeanReLU6,
)
from trady_kernels.nn.channels import SparseChannels
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.dropout import LeanDropout
from trady_kernels.nn.linear import SparseLinear
from trady_kernels.nn.norm import FoldedBatchNorm2d, FrozenBatchNorm2d
from trady_kernels.nn.norm_family import (
    FoldedBatchNormAct2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
    FrozenSyncBatchNorm,
)
from trady_kernels.nn.padding import FoldedConstantPad2d, FoldedZeroPad2d
from trady_kernels.nn.pooling import (
    LeanAdaptiveAvgPool1d,
    LeanAdaptiveAvgPool2d,
    LeanAdaptiveAvgPool3d,
    LeanAdaptiveMaxPool2d,
    LeanAvgPool1d,
    LeanAvgPool2d,
    LeanAvgPool3d,
    LeanMaxPool2d,
)
from trady_kernels.nn.rms_norm import LeanRMSNorm

SPARSE: Mapping[type[nn.Module], type[SparseChannels]] = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
FROZEN: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
#: A class stands before those it inherits from.
LEAN: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
    nn.Hardtanh: LeanHardtanh,
    nn.LeakyReLU: LeanLeakyReLU,
    nn.Hardsigmoid: LeanHardsigmoid,
    nn.Dropout: LeanDropout,
    nn.MaxPool2d: LeanMaxPool2d,
    nn.AdaptiveMaxPool2d: LeanAdaptiveMaxPool2d,
    nn.AvgPool1d: LeanAvgPool1d,
    nn.AvgPool2d: LeanAvgPool2d,
    nn.AvgPool3d: LeanAvgPool3d,
    nn.AdaptiveAvgPool1d: LeanAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: LeanAdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: LeanAdaptiveAvgPool3d,
    nn.RMSNorm: LeanRMSNorm,
}
#: What stands beside a convolution, and its class once the convolution does its work.
FOLDED_NORMS: Mapping[type[nn.Module], type[nn.Module]] = {
    FrozenBatchNorm2d: FoldedBatchNorm2d,
    FrozenBatchNormAct2d: FoldedBatchNormAct2d,
}
FOLDED_PADDING: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.ZeroPad2d: FoldedZeroPad2d,
    nn.ConstantPad2d: FoldedConstantPad2d,
}
#: The class that ``densify`` gives a module which nobody recorded: layers built by hand.
DENSE: Mapping[type[nn.Module], type[nn.Module]] = {
    ours: dense for table in (SPARSE, FROZEN, LEAN) for dense, ours in table.items()
}


def base_in(table: Mapping[type[nn.Module], Any], module: nn.Module) -> type[nn.Module] | None:
    """The class in ``table`` whose computation ``module`` does unchanged."""
    if is_parametrized(module):  # by properties of a class made for it, which another class would not have
        return None
    kind = type(module)
    for base in table:
        if isinstance(module, base) and all(
            method not in module.__dict__ and getattr(kind, method, None) is getattr(base, method, None)
            for method in ("forward", "_conv_forward")
        ):
            return base
    return None


def added_names(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """The public names that the class of ``module`` adds to ``base``'s: what another class would not have."""
    return [
        name
        for kind in type(module).__mro__
        if not issubclass(base, kind)
        for name in vars(kind)
        if not name.startswith("_") and not hasattr(base, name)
    ]


def frozen_class(module: _BatchNorm) -> type[nn.Module] | None:
    """The class of a batch norm once it is frozen; None where it cannot be."""
    if isinstance(module, (*FROZEN.values(), FrozenBatchNormAct2d)):
        return type(module)
    # A hook around a module's forward (accelerate's) keeps calling that of the class it had then.
    if module.running_mean is None or module.running_var is None or "forward" in module.__dict__:
        return None
    # timm's norm and activation in one module; timm itself need not be installed.
    if type(module).__name__ == "BatchNormAct2d" and {name for name, _ in module.named_children()} == {
        "drop",
        "act",
    }:
        return FrozenBatchNormAct2d
    base = base_in(FROZEN, module)
    return FROZEN[base] if base is not None else None
