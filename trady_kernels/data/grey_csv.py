"""Small grey images in a gzipped CSV file, one a line: grey values row by row, then the label."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch

from trady_kernels.data.images import LabelledImages


def read_grey_csv(path: Path, *, side: int, brightest: int, install: str) -> LabelledImages:
    """Read square images of digits.

    Args:
        path: the file.
        side: of an image in pixels.
        brightest: grey values are 0 to this one, at most 255; they are returned as they are.
        install: command that brings the file back where it is damaged.

    Returns:
        images uint8 ``(N, 1, side, side)``, labels int64 ``(N,)``.

    Raises:
        ValueError: the file is no such CSV.
    """
    again = f"install it again with: {install} --force-reinstall"
    try:
        with gzip.open(path) as file:
            rows = [bytes(map(int, line.split(b","))) for line in file]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"data: {path} could not be read as a gzipped CSV of digits ({error}); {again}"
        ) from error
    pixels = side * side
    for number, row in enumerate(rows, start=1):
        if len(row) != pixels + 1 or row[-1] > 9 or max(row[:-1]) > brightest:
            raise ValueError(
                f"data: {path} line {number} has {len(row)} values, expected {pixels} grey values of 0 to "
                f"{brightest} and a label 0 to 9; {again}"
            )
    if not rows:
        raise ValueError(f"data: {path} is empty; {again}")
    table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, pixels + 1)
    return LabelledImages(table[:, :-1].reshape(-1, 1, side, side), table[:, -1].long())
