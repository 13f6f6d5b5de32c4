"""``LeanDropout``: dropout that keeps one bit an element for backward."""

from __future__ import annotations

import torch
from torch import nn

from trady_kernels.functional.dropout import dropout


class LeanDropout(nn.Dropout):
    """``nn.Dropout`` that keeps one bit an element; the same seed drops the same elements."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return dropout(input, self.p, self.training, self.inplace)
