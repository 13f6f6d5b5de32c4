"""Files that are either the old one or the whole new one, whenever the process dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside, bring it to the disk, and rename it into place.

    Args:
        path: file to make or replace.
        write: writes the content to the binary file that it is given.

    Raises:
        OSError: the disk is full or the folder not writable; ``path`` is then as before.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, as :func:`write_atomically` does."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values with ``torch.save``, as :func:`write_atomically` does."""
    write_atomically(path, lambda file: torch.save(content, file))
