"""Small data sets on the disk, for tests."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from PIL import Image


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 8)) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour = (60 * label, 7 * index % 256, 128)
            Image.new("RGB", size, colour).save(folder / name / f"{index:02}.png")
    return folder


def write_idx(path: Path, content: torch.Tensor) -> None:
    header = struct.pack(f">HBB{content.dim()}I", 0, 8, content.dim(), *content.shape)
    body = header + bytes(content.flatten().tolist())
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


def write_idx_folder(folder: Path, suffix: str = "", samples: tuple[int, int] = (12, 6)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(("train", "t10k"), samples, strict=True):
        images = torch.randint(256, (count, 5, 4), dtype=torch.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", torch.arange(count).remainder(3))
    return folder
