"""Pooling modules that keep no input; each is its ``torch.nn`` class with another forward.

An object of the ``torch.nn`` class becomes lean by ``module.__class__ = LeanMaxPool2d``, and dense again the same way.
"""

from __future__ import annotations

import torch
from torch import nn

from trady_kernels.functional import pooling


class LeanMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps one byte for each pooled element; with ``return_indices`` as torch's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H', W')
        if self.return_indices:
            return super().forward(input)
        return pooling.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class LeanAdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """``nn.AdaptiveMaxPool2d`` that keeps one byte for each pooled element where the windows are of one size."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H', W')
        if self.return_indices:
            return super().forward(input)
        return pooling.adaptive_max_pool2d(input, self.output_size)


class LeanAvgPool1d(nn.AvgPool1d):
    """``nn.AvgPool1d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, L) -> (N, C, L')
        return pooling.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class LeanAvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H', W')
        window = (self.kernel_size, self.stride, self.padding)
        return pooling.avg_pool2d(
            input, *window, self.ceil_mode, self.count_include_pad, self.divisor_override
        )


class LeanAvgPool3d(nn.AvgPool3d):
    """``nn.AvgPool3d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, D, H, W) -> (N, C, D', H', W')
        window = (self.kernel_size, self.stride, self.padding)
        return pooling.avg_pool3d(
            input, *window, self.ceil_mode, self.count_include_pad, self.divisor_override
        )


class LeanAdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, L) -> (N, C, L')
        return pooling.adaptive_avg_pool1d(input, self.output_size)


class LeanAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H', W')
        return pooling.adaptive_avg_pool2d(input, self.output_size)


class LeanAdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` that keeps only its input's shape."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, D, H, W) -> (N, C, D', H', W')
        return pooling.adaptive_avg_pool3d(input, self.output_size)
