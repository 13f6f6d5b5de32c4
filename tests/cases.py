"""Cases are data: odd shapes that every kernel of an operator has to get right."""

from __future__ import annotations

from dataclasses import dataclass


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
    ConvCase("all channels under 3x3", 1, 18, 10, (12, 13), 18, padding=SAME),
    ConvCase("batch 1", 1, 8, 16, (28, 28), 3, padding=SAME),
    ConvCase("empty batch", 0, 8, 16, (7, 7), 3, padding=SAME),
    ConvCase("several tiles an image", 2, 6, 8, (41, 67), 2, padding=SAME),
    ConvCase("rows longer than a tile", 1, 4, 5, (4, 2300), 2, padding=SAME),
    ConvCase("stride 2", 3, 8, 24, (15, 14), 4, stride=(2, 2), padding=SAME),
    ConvCase("1x1 stride 2", 2, 8, 16, (14, 13), 4, kernel_size=POINT, stride=(2, 2)),
    ConvCase("dilation 2", 2, 8, 16, (13, 14), 3, padding=(2, 2), dilation=(2, 2)),
    ConvCase("no padding", 2, 8, 16, (9, 8), 3),
    ConvCase("padding beyond the input", 2, 4, 8, (2, 3), 2, padding=(4, 5)),
    ConvCase("5x5", 2, 6, 9, (11, 12), 2, kernel_size=(5, 5), padding=(2, 2)),
    ConvCase("7x7 kernel, stride 2", 2, 3, 16, (23, 22), 3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase("kernel of many columns", 1, 3, 6, (6, 40), 2, kernel_size=(2, 21), padding=(1, 0)),
    ConvCase("patches", 2, 3, 12, (32, 32), 2, kernel_size=(16, 16), stride=(16, 16)),
    ConvCase("all asymmetric", 2, 8, 12, (17, 11), 5, (3, 2), (2, 1), (0, 2), (1, 3)),
    ConvCase("dilation beyond a tile", 1, 4, 6, (70, 45), 2, padding=(30, 1), dilation=(30, 1)),
    ConvCase("groups 4", 3, 16, 24, (9, 9), 6, padding=SAME, groups=4),
    ConvCase("groups 4, wide", 2, 16, 80, (9, 9), 9, kernel_size=POINT, groups=4),
    ConvCase("depthwise", 3, 19, 19, (14, 15), 7, padding=SAME, groups=19),
    ConvCase("depthwise, 7x7 map", 8, 24, 24, (7, 7), 24, padding=SAME, groups=24),
    ConvCase("depthwise, stride 2", 2, 24, 24, (15, 14), 5, stride=(2, 2), padding=SAME, groups=24),
    ConvCase("depthwise, large map", 2, 6, 6, (45, 61), 3, padding=SAME, groups=6),
    ConvCase("depthwise 5x5", 2, 10, 10, (14, 13), 4, (5, 5), (1, 1), (2, 2), (1, 1), 10),
    ConvCase("depthwise 5x5, stride 2", 2, 10, 10, (14, 13), 4, (5, 5), (2, 2), (2, 2), (1, 1), 10),
    ConvCase("depthwise, dilation 2", 2, 8, 8, (12, 13), 3, padding=(2, 2), dilation=(2, 2), groups=8),
    ConvCase("depthwise, multiplier 2", 2, 8, 16, (10, 11), 5, padding=SAME, groups=8),
)
