"""Modules: what drops in for ``torch.nn``'s."""

from trady_kernels.nn.conv2d import SparseConv2d
from trady_kernels.nn.linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLinear"]
