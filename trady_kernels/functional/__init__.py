"""Functions with a lean backward: what is kept, and what is computed."""

from trady_kernels.functional.conv2d import sparse_conv2d
from trady_kernels.functional.linear import sparse_linear
from trady_kernels.functional.norm import FrozenNorm, frozen_batch_norm

__all__ = ["FrozenNorm", "frozen_batch_norm", "sparse_conv2d", "sparse_linear"]
