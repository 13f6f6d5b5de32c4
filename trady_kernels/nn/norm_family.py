"""The other batch norms, frozen as ``FrozenBatchNorm2d`` is."""

from __future__ import annotations

import torch
from torch import nn

from trady_kernels.nn.norm import FoldedBatchNorm2d, FrozenBatchNorm2d


class FrozenBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with fixed statistics and affine, under ``train()`` too; keeps no activation."""

    forward = FrozenBatchNorm2d.forward


class FrozenBatchNorm3d(nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with fixed statistics and affine, under ``train()`` too; keeps no activation."""

    forward = FrozenBatchNorm2d.forward


class FrozenSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` with fixed statistics and affine: nothing is left to synchronise."""

    forward = FrozenBatchNorm2d.forward


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's ``BatchNormAct2d`` with fixed statistics and affine: norm, ``drop`` and ``act`` in one module."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return self.act(self.drop(super().forward(input)))


class FoldedBatchNormAct2d(FoldedBatchNorm2d):
    """A ``FrozenBatchNormAct2d`` whose norm the convolution before it does: ``drop`` and ``act`` alone."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return self.act(self.drop(input))
