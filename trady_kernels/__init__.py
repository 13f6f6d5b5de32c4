"""Sparse-channel fine-tuning whose memory saving is real."""

from trady_kernels.ops import backend

__version__ = "0.1.0"

__all__ = ["backend"]
