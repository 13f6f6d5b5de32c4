"""Sparse-channel fine-tuning whose memory saving is real."""

from trady_kernels.convert import (
    conversion_report,
    densify,
    select_fraction,
    sparsify,
    trainable_parameters,
)
from trady_kernels.functional import frozen_batch_norm, sparse_conv2d, sparse_linear
from trady_kernels.memory import MemoryReport, measure_memory
from trady_kernels.nn import FrozenBatchNorm2d, SparseConv2d, SparseLinear
from trady_kernels.ops import backend
from trady_kernels.selection import ChannelSampler, LayerRanking, channel_norms, rank_layers

__version__ = "0.1.0"

__all__ = [
    "ChannelSampler",
    "FrozenBatchNorm2d",
    "LayerRanking",
    "MemoryReport",
    "SparseConv2d",
    "SparseLinear",
    "backend",
    "channel_norms",
    "conversion_report",
    "densify",
    "frozen_batch_norm",
    "measure_memory",
    "rank_layers",
    "select_fraction",
    "sparse_conv2d",
    "sparse_linear",
    "sparsify",
    "trainable_parameters",
]
