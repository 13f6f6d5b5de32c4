"""A folder with one folder of images for each class."""

from __future__ import annotations

from pathlib import Path

import torch

from trady_kernels.data.images import LabelledImages

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class folder in ``folder``, classes and files in order of their names.

    Raises:
        ValueError: there are fewer than two class folders, or one has no images.
    """
    classes = {
        entry.name: sorted(
            path
            for path in entry.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if len(classes) < 2:
        raise ValueError(
            f"data: {folder} has {len(classes)} class folders, expected at least 2, "
            "each named after its class and full of images"
        )
    for name, files in classes.items():
        if not files:
            raise ValueError(
                f"data: class folder {folder / name} has no images ({', '.join(sorted(SUFFIXES))}); "
                "add some or remove the folder"
            )
    return classes


def read_images(classes: dict[str, list[Path]], size: int) -> LabelledImages:
    """Decode images, cut them to a square about their centre and resize them.

    Args:
        classes: image files by class, the class numbers being the order of the keys.
        size: side of the images in pixels.

    Returns:
        images uint8 ``(N, 3, size, size)``, labels int64 ``(N,)``.

    Raises:
        ValueError: a file could not be decoded; the message names it.
        ModuleNotFoundError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data: a folder of images needs pillow to decode them; install it with: pip install pillow"
        ) from error
    images, labels = [], []
    for label, files in enumerate(classes.values()):
        for path in files:
            try:
                with Image.open(path) as image:
                    upright = ImageOps.exif_transpose(image).convert("RGB")
                    pixels = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR).tobytes()
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(
                    f"data: image {path} could not be decoded ({reason}); repair it or remove it"
                ) from error
            images.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3))
            labels.append(label)
    return LabelledImages(torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
