"""Functions with a lean backward: what is kept, and what is computed."""

from trady_kernels.functional.activation import hardsigmoid, hardtanh, leaky_relu, relu, relu6
from trady_kernels.functional.attention import scaled_dot_product_attention
from trady_kernels.functional.conv2d import sparse_conv2d
from trady_kernels.functional.dropout import dropout
from trady_kernels.functional.linear import sparse_linear
from trady_kernels.functional.norm import FrozenNorm, frozen_batch_norm
from trady_kernels.functional.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool2d,
)
from trady_kernels.functional.rms_norm import frozen_rms_norm

__all__ = [
    "FrozenNorm",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "dropout",
    "frozen_batch_norm",
    "frozen_rms_norm",
    "hardsigmoid",
    "hardtanh",
    "leaky_relu",
    "max_pool2d",
    "relu",
    "relu6",
    "scaled_dot_product_attention",
    "sparse_conv2d",
    "sparse_linear",
]
