"""Modules: what drops in for ``torch.nn``'s."""

from trady_kernels.nn.activation import LeanHardsigmoid, LeanHardtanh, LeanLeakyReLU, LeanReLU, LeanReLU6
from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.dropout import LeanDropout
from trady_kernels.nn.linear import SparseLinear
from trady_kernels.nn.norm import FrozenBatchNorm2d
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

__all__ = [
    "FrozenBatchNorm2d",
    "LeanAdaptiveAvgPool1d",
    "LeanAdaptiveAvgPool2d",
    "LeanAdaptiveAvgPool3d",
    "LeanAdaptiveMaxPool2d",
    "LeanAvgPool1d",
    "LeanAvgPool2d",
    "LeanAvgPool3d",
    "LeanDropout",
    "LeanHardsigmoid",
    "LeanHardtanh",
    "LeanLeakyReLU",
    "LeanMaxPool2d",
    "LeanRMSNorm",
    "LeanReLU",
    "LeanReLU6",
    "SparseConv2d",
    "SparseLinear",
]
