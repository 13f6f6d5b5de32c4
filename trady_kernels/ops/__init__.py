"""Operators: ``torch.ops.trady.*`` and their Python fronts."""

from trady_kernels.ops.backend import available, backend, last_kernel, load_compiled
from trady_kernels.ops.conv2d_channel_grad import conv2d_channel_grad
from trady_kernels.ops.gather_channels import gather_channels
from trady_kernels.ops.linear_channel_grad import linear_channel_grad

load_compiled()

__all__ = [
    "available",
    "backend",
    "conv2d_channel_grad",
    "gather_channels",
    "last_kernel",
    "linear_channel_grad",
]
