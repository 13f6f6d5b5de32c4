"""Which layers take part, which of their channels train, and when that changes."""

from trady_kernels.selection.channel_norms import NotFinite, channel_norms
from trady_kernels.selection.layer_fractions import LayerFractions
from trady_kernels.selection.pool import Pool
from trady_kernels.selection.ranking import LayerRanking, rank_layers
from trady_kernels.selection.resampling import Resampling
from trady_kernels.selection.sampler import ChannelSampler, NothingSelected
from trady_kernels.selection.schemes import SCHEMES, Scheme, SparseUpdate

__all__ = [
    "SCHEMES",
    "ChannelSampler",
    "LayerFractions",
    "LayerRanking",
    "NotFinite",
    "NothingSelected",
    "Pool",
    "Resampling",
    "Scheme",
    "SparseUpdate",
    "channel_norms",
    "rank_layers",
]
