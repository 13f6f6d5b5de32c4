"""Which layers take part, which of their channels train, and when that changes."""

from trady_kernels.selection.channel_norms import channel_norms
from trady_kernels.selection.ranking import LayerRanking, rank_layers
from trady_kernels.selection.resampling import Resampling
from trady_kernels.selection.sampler import ChannelSampler
from trady_kernels.selection.schemes import SCHEMES, Scheme, find_scheme

__all__ = [
    "SCHEMES",
    "ChannelSampler",
    "LayerRanking",
    "Resampling",
    "Scheme",
    "channel_norms",
    "find_scheme",
    "rank_layers",
]
