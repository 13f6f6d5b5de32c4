"""Files that are either the old one or the whole new one, whenever the process dies, and written by one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder inside the block: of two processes that bring the same files up to date, one would undo the other.

    Leaves nothing behind, also where the process is killed. Does nothing where the system has no such locks.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output: another trady is writing to {folder}, expected one at a time; wait for it to end, or give another "
                "folder"
            ) from error
        yield
    finally:
        os.close(held)
