"""Padding modules whose zeros the convolution behind them adds (``SparseConv2d.fold``)."""

from __future__ import annotations

import torch
from torch import nn


class FoldedConstantPad2d(nn.ConstantPad2d):
    """``nn.ConstantPad2d`` of zeros folded into a convolution: the identity."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class FoldedZeroPad2d(nn.ZeroPad2d):
    """``nn.ZeroPad2d`` folded into a convolution: the identity."""

    forward = FoldedConstantPad2d.forward
