"""Labelled images in memory: resized once, kept as bytes, made into network input batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

#: Images resized at a time; the float32 copy that resizing needs then stays below 200 MiB at 224x224.
_RESIZE_CHUNK = 512


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with their class numbers.

    Args:
        images: uint8 ``(N, C, H, W)``, C = 1 (grey) or 3.
        labels: int64 ``(N,)``.
    """

    kind: ClassVar[str] = "images"
    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> LabelledImages:
        """The images at ``indices`` (int64 ``(n,)``), in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])

    def checksum(self) -> int:
        """A number that changes when an image, a label or their order does."""
        position = torch.arange(1, len(self) + 1)
        brightness = self.images.flatten(1).sum(1, dtype=torch.int64)
        return int(((brightness * 1009 + self.labels) * position).sum())


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize square-ish byte images to ``size`` x ``size`` pixels, bilinear with anti-aliasing.

    Args:
        images: uint8 ``(N, C, H, W)``.
        size: side of the result in pixels.

    Returns:
        uint8 ``(N, C, size, size)``.
    """
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat(
        [
            F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for chunk in images.split(_RESIZE_CHUNK)
        ]
    )


def to_network_input(
    images: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Turn byte images into the float32 three-channel input of a network.

    Args:
        images: uint8 ``(N, C, H, W)``, C = 1 or 3.
        mean: of each of the three channels, as the network was trained with, on a 0..1 scale.
        std: standard deviation, likewise.
        device: where the result lies.

    Returns:
        float32 ``(N, 3, H, W)``.
    """
    shift = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    return images.to(device).float().div_(255).sub(shift).div_(scale)  # grey broadcasts to three channels
