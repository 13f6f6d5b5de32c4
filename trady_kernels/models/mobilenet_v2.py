"""MobileNetV2 of any width, its last convolution narrowed with the rest as in the on-device papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Stage:
    """One row of the architecture's table."""

    expansion: int
    out_channels: int
    repeats: int
    stride: int


STAGES = (
    Stage(expansion=1, out_channels=16, repeats=1, stride=1),
    Stage(expansion=6, out_channels=24, repeats=2, stride=2),
    Stage(expansion=6, out_channels=32, repeats=3, stride=2),
    Stage(expansion=6, out_channels=64, repeats=4, stride=2),
    Stage(expansion=6, out_channels=96, repeats=3, stride=1),
    Stage(expansion=6, out_channels=160, repeats=3, stride=2),
    Stage(expansion=6, out_channels=320, repeats=1, stride=1),
)


def _scaled(channels: int, width: float) -> int:
    """Nearest multiple of 8, never more than 10% below ``channels * width``."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class ConvNormReLU(nn.Sequential):
    """Convolution with 'half' padding, batch norm, ReLU6."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(),
        )


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, pointwise projection, and a skip where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = ConvNormReLU(in_channels, hidden, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNormReLU(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C', H', W')
        x = self.norm(self.project(self.depthwise(self.expand(input))))
        return x + input if self.skips else x


class MobileNetV2(nn.Module):
    """MobileNetV2 whose stem, blocks and last convolution all scale with the width.

    At ``width=0.35`` the last convolution has 448 channels, as in the on-device training papers
    (torchvision's keeps 1280).

    Args:
        num_classes: outputs of the classifier.
        width: multiplier of all channel counts, which are rounded to multiples of 8.
        in_channels: channels of the input image.
        dropout: probability of dropping a feature before the classifier.

    Raises:
        ValueError: ``width`` is not a positive number.

    Source: Sandler et al., arXiv 1801.04381.
    """

    def __init__(
        self, num_classes: int = 1000, width: float = 1.0, in_channels: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
            raise ValueError(f"width: got {width!r}, expected a positive number such as 0.35")
        channels = _scaled(32, width)
        self.stem = ConvNormReLU(in_channels, channels, 3, stride=2)
        blocks: list[nn.Module] = []
        for stage in STAGES:
            for repeat in range(stage.repeats):
                out_channels = _scaled(stage.out_channels, width)
                stride = stage.stride if repeat == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, stride, stage.expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNormReLU(channels, _scaled(1280, width), 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_scaled(1280, width), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        x = self.last(self.blocks(self.stem(input)))
        return self.classifier(self.dropout(self.pool(x).flatten(1)))
