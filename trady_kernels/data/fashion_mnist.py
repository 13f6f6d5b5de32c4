"""Fashion-MNIST and its likes: images and labels in IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

from trady_kernels.data.images import LabelledImages

#: Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_UNSIGNED_BYTE = 0x08


def is_idx_folder(folder: Path) -> bool:
    """Whether ``folder`` holds IDX files under the names that MNIST's authors gave them."""
    return _find(folder, "train-images-idx3-ubyte") is not None


def read_idx_folder(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """Read the training and the test images of a folder of IDX files.

    Returns:
        (train, test); images uint8 ``(N, 1, H, W)``, labels int64 ``(N,)``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no IDX file of bytes, or images and labels differ in number.
    """
    return _read_pair(folder, "train"), _read_pair(folder, "t10k")


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_pair(folder: Path, prefix: str) -> LabelledImages:
    tensors = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = _find(folder, name)
        if path is None:
            raise FileNotFoundError(
                f"data: {folder} has neither {name} nor {name}.gz; "
                "install them with: apt-get install dataset-fashion-mnist"
            )
        tensors.append(read_idx(path))
    images, labels = tensors
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(images):
        raise ValueError(
            f"data: the {prefix} files in {folder} hold images {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)}, expected (N, height, width) and (N,) with the same N > 0"
        )
    return LabelledImages(images.unsqueeze(1), labels.long())


def read_idx(path: Path) -> torch.Tensor:
    """Read one IDX file of unsigned bytes, gzipped when its name ends in .gz.

    Returns:
        uint8, of the shape that the file's header states.

    Raises:
        ValueError: the file is no IDX file of bytes or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(
            f"data: {path} could not be read as an IDX file ({error}); fetch it again"
        ) from error
    start = 4 + 4 * dimensions
    if zeros != 0 or kind != _UNSIGNED_BYTE or len(content) != start + math.prod(shape):
        raise ValueError(
            f"data: {path} is no whole IDX file of unsigned bytes "
            f"({len(content)} bytes, header says {shape}); fetch it again"
        )
    return torch.frombuffer(bytearray(content[start:]) or bytearray(1), dtype=torch.uint8)[
        : math.prod(shape)
    ].view(shape)
