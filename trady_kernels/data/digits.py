"""scikit-learn's digits: 1,797 grey images of 8x8, from the CSV file in its package."""

from __future__ import annotations

from pathlib import Path

import torch

from trady_kernels.data.grey_csv import read_grey_csv
from trady_kernels.data.images import LabelledImages
from trady_kernels.data.packaged import find_packaged

_FILE = Path("datasets", "data", "digits.csv.gz")
_BRIGHTEST = 16
_INSTALL = "pip install --no-deps scikit-learn"


def find_digits() -> Path:
    """Path of the digits inside the installed package, which is not imported.

    Raises:
        FileNotFoundError: the package, or the file in it, is missing; the message has the install command.
    """
    return find_packaged(
        "sklearn",
        _FILE,
        "data: 'digits' needs the digits in the package scikit-learn, which is not here; "
        f"install it with: {_INSTALL}",
    )


def read_digits(path: Path) -> LabelledImages:
    """Read digits from a gzipped CSV file: 64 grey values of 0 to 16 and the label on each line.

    Returns:
        images uint8 ``(N, 1, 8, 8)``, stretched to 0..255, labels int64 ``(N,)``.

    Raises:
        ValueError: the file is no such CSV.
    """
    digits = read_grey_csv(path, side=8, brightest=_BRIGHTEST, install=_INSTALL)
    stretched = digits.images.float().mul_(255 / _BRIGHTEST).round_().to(torch.uint8)
    return LabelledImages(stretched, digits.labels)
