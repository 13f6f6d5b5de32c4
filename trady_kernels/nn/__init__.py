"""Modules: what drops in for ``torch.nn``'s."""

from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.linear import SparseLinear
from trady_kernels.nn.norm import FrozenBatchNorm2d

__all__ = ["FrozenBatchNorm2d", "SparseConv2d", "SparseLinear"]
