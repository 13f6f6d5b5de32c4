"""``LeanRMSNorm``: RMS norm that keeps its input in the input's own dtype, once."""

from __future__ import annotations

import torch
from torch import nn

from trady_kernels.functional.rms_norm import frozen_rms_norm


class LeanRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` that, its weight frozen, keeps the input and nothing else of its size.

    With a weight that trains it is ``nn.RMSNorm``. It has no attributes of its own, so that setting ``__class__``
    on an ``nn.RMSNorm`` makes it lean, and setting it back undoes that.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., *normalized_shape)
        if self.weight is not None and self.weight.requires_grad:
            return super().forward(x)
        return frozen_rms_norm(x, self.normalized_shape, self.weight, self.eps)
