"""The layers that benchmarks run on: every distinct convolution and linear layer of some networks, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class ConvLayer:
    """A convolution of a network, at the size its input has there."""

    network: str
    in_channels: int
    out_channels: int
    size: int  # input height and width
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def dense(self) -> bool:
        """Whether every output channel reads every input channel."""
        return self.groups == 1

    @property
    def family(self) -> str:
        return f"{'depthwise ' if self.groups > 1 else ''}{self.kernel}x{self.kernel}"

    @property
    def label(self) -> str:
        channels = f"{self.in_channels}" if self.groups > 1 else f"{self.in_channels}->{self.out_channels}"
        return f"{self.family} {channels} @{self.size}" + (f" /{self.stride}" if self.stride > 1 else "")


def _layers(network: str, rows: Iterable[tuple[int, ...]]) -> tuple[ConvLayer, ...]:
    return tuple(ConvLayer(network, *row) for row in rows)


def _depthwise(channels: int, size: int, kernel: int = 3, stride: int = 1) -> tuple[int, ...]:
    return (channels, channels, size, kernel, stride, channels)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a network, and how many rows each image or text gives it."""

    network: str
    rows: int
    in_features: int
    out_features: int

    @property
    def in_channels(self) -> int:
        return self.in_features

    @property
    def family(self) -> str:
        return "linear"

    @property
    def label(self) -> str:
        return f"linear {self.in_features}->{self.out_features} x{self.rows}"


#: The distinct convolutions of each network at 224x224.
CONVS: tuple[ConvLayer, ...] = (
    *_layers(
        "mobilenet_v2",
        (
            (3, 32, 224, 3, 2),
            _depthwise(32, 112),
            (32, 16, 112),
            (16, 96, 112),
            _depthwise(96, 112, stride=2),
            (96, 24, 56),
            (24, 144, 56),
            _depthwise(144, 56),
            (144, 24, 56),
            _depthwise(144, 56, stride=2),
            (144, 32, 28),
            (32, 192, 28),
            _depthwise(192, 28),
            (192, 32, 28),
            _depthwise(192, 28, stride=2),
            (192, 64, 14),
            (64, 384, 14),
            _depthwise(384, 14),
            (384, 64, 14),
            (384, 96, 14),
            (96, 576, 14),
            _depthwise(576, 14),
            (576, 96, 14),
            _depthwise(576, 14, stride=2),
            (576, 160, 7),
            (160, 960, 7),
            _depthwise(960, 7),
            (960, 160, 7),
            (960, 320, 7),
            (320, 1280, 7),
        ),
    ),
    *_layers(
        "resnet18",
        (
            (3, 64, 224, 7, 2),
            (64, 64, 56, 3),
            (64, 128, 56, 3, 2),
            (64, 128, 56, 1, 2),
            (128, 128, 28, 3),
            (128, 256, 28, 3, 2),
            (128, 256, 28, 1, 2),
            (256, 256, 14, 3),
            (256, 512, 14, 3, 2),
            (256, 512, 14, 1, 2),
            (512, 512, 7, 3),
        ),
    ),
    *_layers(
        "resnet50",
        (
            (3, 64, 224, 7, 2),
            (64, 64, 56),
            (64, 64, 56, 3),
            (64, 256, 56),
            (256, 64, 56),
            (256, 128, 56),
            (128, 128, 56, 3, 2),
            (256, 512, 56, 1, 2),
            (128, 512, 28),
            (512, 128, 28),
            (128, 128, 28, 3),
            (512, 256, 28),
            (256, 256, 28, 3, 2),
            (512, 1024, 28, 1, 2),
            (256, 1024, 14),
            (1024, 256, 14),
            (256, 256, 14, 3),
            (1024, 512, 14),
            (512, 512, 14, 3, 2),
            (1024, 2048, 14, 1, 2),
            (512, 2048, 7),
            (2048, 512, 7),
            (512, 512, 7, 3),
        ),
    ),
    *_layers(
        "efficientnet_lite0",
        (
            (3, 32, 224, 3, 2),
            _depthwise(32, 112),
            (32, 16, 112),
            (16, 96, 112),
            _depthwise(96, 112, stride=2),
            (96, 24, 56),
            (24, 144, 56),
            _depthwise(144, 56),
            (144, 24, 56),
            _depthwise(144, 56, 5, 2),
            (144, 40, 28),
            (40, 240, 28),
            _depthwise(240, 28, 5),
            (240, 40, 28),
            _depthwise(240, 28, 3, 2),
            (240, 80, 14),
            (80, 480, 14),
            _depthwise(480, 14),
            (480, 80, 14),
            _depthwise(480, 14, 5),
            (480, 112, 14),
            (112, 672, 14),
            _depthwise(672, 14, 5),
            (672, 112, 14),
            _depthwise(672, 14, 5, 2),
            (672, 192, 7),
            (192, 1152, 7),
            _depthwise(1152, 7, 5),
            (1152, 192, 7),
            _depthwise(1152, 7),
            (1152, 320, 7),
            (320, 1280, 7),
        ),
    ),
)

#: The distinct linear layers of ViT-tiny at 197 tokens an image and of BERT-base at 128 tokens a text, and the
#: classifiers, which see one row an image.
LINEARS: tuple[LinearLayer, ...] = (
    LinearLayer("vit_tiny", 197, 192, 576),
    LinearLayer("vit_tiny", 197, 192, 192),
    LinearLayer("vit_tiny", 197, 192, 768),
    LinearLayer("vit_tiny", 197, 768, 192),
    LinearLayer("vit_tiny", 1, 192, 1000),
    LinearLayer("bert_base", 128, 768, 768),
    LinearLayer("bert_base", 128, 768, 3072),
    LinearLayer("bert_base", 128, 3072, 768),
    LinearLayer("bert_base", 1, 768, 768),
    LinearLayer("mobilenet_v2", 1, 1280, 1000),
    LinearLayer("efficientnet_lite0", 1, 1280, 1000),
    LinearLayer("resnet18", 1, 512, 1000),
    LinearLayer("resnet50", 1, 2048, 1000),
)

Layer = ConvLayer | LinearLayer

LAYERS: tuple[Layer, ...] = (*CONVS, *LINEARS)
NETWORKS = tuple(dict.fromkeys(layer.network for layer in LAYERS))

#: Numbers of selected channels of each layer, beside the shares.
FEW = (1, 2, 4, 8, 12)
SHARES = (16, 4, 2, 1)


def selections(channels: int) -> tuple[int, ...]:
    """The numbers of selected channels that a layer of ``channels`` is measured at: few, and shares of them."""
    wanted = {*FEW, *(channels // share for share in SHARES)}
    return tuple(sorted(k for k in wanted if 1 <= k <= channels))


Kind = TypeVar("Kind", ConvLayer, LinearLayer)


def distinct(layers: Iterable[Kind]) -> list[Kind]:
    """Layers that two networks share, once: the first one's."""
    found: dict[str, Kind] = {}
    for layer in layers:
        found.setdefault(layer.label, layer)
    return list(found.values())
