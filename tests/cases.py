"""Cases are data: odd shapes that every kernel of an operator has to get right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout.

    Args:
        tensor: at least 2-D; 4-D for the channels_last ones.
        layout: ``contiguous``; ``channels_last``; ``slice`` and ``channels_last slice``, a window in every
            dimension of a larger tensor that is NaN elsewhere; ``transposed``, the last two dimensions
            swapped in memory.
    """
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    memory_format = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    if not layout.endswith("slice"):
        return tensor.contiguous(memory_format=memory_format)
    poison = torch.nan if tensor.dtype.is_floating_point or tensor.dtype.is_complex else 99
    larger = tensor.new_full([size + 3 for size in tensor.shape], poison)
    window = larger.contiguous(memory_format=memory_format)
    for dimension, size in enumerate(tensor.shape):
        window = window.narrow(dimension, 2, size)
    return window.copy_(tensor)


@dataclass(frozen=True)
class ConvCase:
    """A convolution and how many of its input channels are selected."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    selected: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def out_size(self) -> tuple[int, int]:
        def axis(i: int) -> int:
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            return (self.size[i] + 2 * self.padding[i] - reach) // self.stride[i] + 1

        return axis(0), axis(1)


POINT, SAME = (1, 1), (1, 1)

CONV_CASES = (
    ConvCase("1x1 map", 3, 16, 24, (1, 1), 5, kernel_size=POINT),
    ConvCase("1x1 map under 3x3", 2, 8, 16, (1, 1), 8, padding=SAME),
    ConvCase("7x7", 3, 16, 24, (7, 7), 5, kernel_size=POINT),
    ConvCase("7x7 under 3x3", 8, 12, 19, (7, 7), 7, padding=SAME),
    ConvCase("no multiple of a vector", 2, 20, 21, (5, 9), 13, kernel_size=POINT),
    ConvCase("one channel", 2, 9, 35, (14, 14), 1, padding=SAME),
    ConvCase("one channel, many outputs", 2, 9, 150, (6, 5), 1, kernel_size=POINT),
    ConvCase("no channel", 2, 8, 12, (7, 7), 0, padding=SAME),
    ConvCase("all channels", 2, 26, 16, (12, 13), 26, kernel_size=POINT),
    ConvCase("many channels", 3, 160, 40, (7, 7), 150, kernel_size=POINT),
    ConvCase("many channels, larger map", 3, 80, 19, (13, 14), 70, kernel_size=POINT),
    ConvCase("many channels, strided", 2, 40, 20, (14, 13), 16, kernel_size=POINT, stride=(2, 2)),
    ConvCase("many channels under 3x3", 2, 50, 37, (9, 8), 42, padding=SAME),
    ConvCase("many channels under 3x3, strided", 3, 40, 35, (15, 14), 16, stride=(2, 2), padding=SAME),
    ConvCase("many channels, several tiles", 1, 20, 9, (41, 67), 16, padding=SAME),
    ConvCase("many channels under 5x5", 2, 9, 18, (11, 12), 6, kernel_size=(5, 5), padding=(2, 2)),
    ConvCase("many channels, groups 2", 2, 64, 34, (9, 9), 32, padding=SAME, groups=2),
    ConvCase("all channels under 3x3", 1, 18, 10, (12, 13), 18, padding=SAME),
    ConvCase("batch 1", 1, 8, 16, (28, 28), 3, padding=SAME),
    ConvCase("empty batch", 0, 8, 16, (7, 7), 3, padding=SAME),
    ConvCase("several tiles an image", 2, 6, 8, (41, 67), 2, padding=SAME),
    ConvCase("rows longer than a tile", 1, 4, 5, (4, 2300), 2, padding=SAME),
    ConvCase("stride 2", 3, 8, 24, (15, 14), 4, stride=(2, 2), padding=SAME),
    ConvCase("two outputs", 2, 5, 2, (9, 8), 3, padding=SAME),
    ConvCase("1x1 stride 2", 2, 8, 16, (14, 13), 4, kernel_size=POINT, stride=(2, 2)),
    ConvCase("dilation 2", 2, 8, 16, (13, 14), 3, padding=(2, 2), dilation=(2, 2)),
    ConvCase("no padding", 2, 8, 16, (9, 8), 3),
    ConvCase("padding beyond the input", 2, 4, 8, (2, 3), 2, padding=(4, 5)),
    ConvCase("5x5", 2, 6, 9, (11, 12), 2, kernel_size=(5, 5), padding=(2, 2)),
    ConvCase(
        "7x7 kernel, stride 2", 2, 3, 16, (23, 22), 3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3)
    ),
    ConvCase("7x7 kernel, several tiles", 1, 3, 9, (71, 70), 2, (7, 7), (2, 2), (3, 3)),
    ConvCase("kernel of many columns", 1, 3, 6, (6, 40), 2, kernel_size=(2, 21), padding=(1, 0)),
    ConvCase("kernel of one column", 2, 4, 9, (9, 8), 1, kernel_size=(3, 1), padding=(1, 0)),
    ConvCase("patches", 2, 3, 12, (32, 32), 2, kernel_size=(16, 16), stride=(16, 16)),
    ConvCase("all asymmetric", 2, 8, 12, (17, 11), 5, (3, 2), (2, 1), (0, 2), (1, 3)),
    ConvCase("dilation beyond a tile", 1, 4, 6, (70, 45), 2, padding=(30, 1), dilation=(30, 1)),
    ConvCase("groups 4", 3, 16, 24, (9, 9), 6, padding=SAME, groups=4),
    ConvCase("groups 4, wide", 2, 16, 80, (9, 9), 9, kernel_size=POINT, groups=4),
    ConvCase("depthwise", 3, 19, 19, (14, 15), 7, padding=SAME, groups=19),
    ConvCase("depthwise, 7x7 map", 8, 24, 24, (7, 7), 24, padding=SAME, groups=24),
    ConvCase("depthwise, stride 2", 2, 24, 24, (15, 14), 5, stride=(2, 2), padding=SAME, groups=24),
    ConvCase("depthwise, large map", 2, 6, 6, (45, 61), 3, padding=SAME, groups=6),
    ConvCase("depthwise, wide map", 2, 4, 4, (6, 293), 2, padding=SAME, groups=4),
    ConvCase("depthwise, several planes a task", 2, 90, 90, (7, 6), 70, padding=SAME, groups=90),
    ConvCase("depthwise, wide map, several planes a task", 1, 40, 80, (4, 270), 37, padding=SAME, groups=40),
    ConvCase("depthwise, several ranges", 1, 600, 600, (5, 4), 530, padding=SAME, groups=600),
    ConvCase("depthwise, little padding", 2, 4, 8, (9, 33), 3, stride=(2, 2), padding=(0, 1), groups=4),
    ConvCase("depthwise, one channel", 2, 9, 9, (45, 61), 1, padding=SAME, groups=9),
    ConvCase("depthwise, one channel, very wide map", 1, 5, 5, (4, 1100), 1, padding=SAME, groups=5),
    ConvCase("depthwise, one channel, two outputs", 2, 5, 10, (9, 8), 1, padding=SAME, groups=5),
    ConvCase("depthwise, two channels, stride 2", 2, 6, 6, (31, 23), 2, (5, 5), (2, 2), (2, 2), (1, 1), 6),
    ConvCase("depthwise, one channel, stride 3", 2, 6, 6, (22, 25), 1, (3, 4), (2, 3), (2, 3), (2, 2), 6),
    ConvCase("depthwise 5x5", 2, 10, 10, (14, 13), 4, (5, 5), (1, 1), (2, 2), (1, 1), 10),
    ConvCase("depthwise 5x5, stride 2", 2, 10, 10, (14, 13), 4, (5, 5), (2, 2), (2, 2), (1, 1), 10),
    ConvCase("depthwise 5x5, many images", 8, 6, 6, (14, 14), 3, (5, 5), (1, 1), (2, 2), (1, 1), 6),
    ConvCase("depthwise, dilation 2", 2, 8, 8, (12, 13), 3, padding=(2, 2), dilation=(2, 2), groups=8),
    ConvCase("depthwise, multiplier 2", 2, 8, 16, (10, 11), 5, padding=SAME, groups=8),
)


@dataclass(frozen=True)
class LinearCase:
    """A linear layer and the numbers of its input features to select."""

    name: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int
    selected: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Products in one element of the weight gradient."""
        return math.prod(self.leading)

    def __str__(self) -> str:
        return self.name


LINEAR_CASES = (
    LinearCase("plain", (8,), 20, 33, selected=(0, 1, 5, 20)),
    LinearCase("one row", (1,), 7, 10, selected=(1, 7)),
    LinearCase("one output", (9,), 7, 1, selected=(1, 7)),
    LinearCase("tokens", (3, 11), 31, 64, selected=(1, 13, 31)),
    LinearCase("four dimensions", (2, 3, 5), 9, 17, selected=(4, 9)),
    LinearCase("many rows few outputs", (700,), 26, 10, selected=(1, 26)),
    LinearCase("many outputs", (65,), 14, 515, selected=(2, 14)),
    LinearCase("empty batch", (0,), 6, 5, selected=(0, 3, 6)),
)
