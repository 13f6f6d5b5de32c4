"""Operators: ``torch.ops.trady.*`` and their Python fronts."""

from trady_kernels.ops import choice
from trady_kernels.ops.backend import available, backend, last_kernel, load_compiled
from trady_kernels.ops.conv2d_channel_grad import (
    conv2d_channel_grad,
    conv2d_channel_grad_squares,
    conv2d_channel_grad_with_bias,
)
from trady_kernels.ops.conv2d_input_grad import conv2d_input_grad
from trady_kernels.ops.fold_norm import fold_norm
from trady_kernels.ops.gather_channels import gather_channels
from trady_kernels.ops.linear_channel_grad import linear_channel_grad, linear_channel_grad_squares
from trady_kernels.ops.max_pool2d import max_pool2d_offsets, max_pool2d_offsets_backward
from trady_kernels.ops.pack_bits import pack_bits
from trady_kernels.ops.quantize_blocks import dequantize_blocks, quantize_blocks
from trady_kernels.ops.rectify import rectify, rectify_
from trady_kernels.ops.scale_by_bits import scale_by_bits
from trady_kernels.ops.scatter_channels import scatter_channels_
from trady_kernels.ops.shift_channels import shift_channels_

load_compiled()
choice.load()

__all__ = [
    "available",
    "backend",
    "conv2d_channel_grad",
    "conv2d_channel_grad_squares",
    "conv2d_channel_grad_with_bias",
    "conv2d_input_grad",
    "dequantize_blocks",
    "fold_norm",
    "gather_channels",
    "last_kernel",
    "linear_channel_grad",
    "linear_channel_grad_squares",
    "max_pool2d_offsets",
    "max_pool2d_offsets_backward",
    "pack_bits",
    "quantize_blocks",
    "rectify",
    "rectify_",
    "scale_by_bits",
    "scatter_channels_",
    "shift_channels_",
]
