"""What a class of this package saves as JSON, reads back, and ships for the embedded networks."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trady_kernels.atomic_write import write_json

if TYPE_CHECKING:
    from typing_extensions import Self


class Saved(ABC):
    """Something with plain values that goes into a JSON file and comes back from it.

    Attributes:
        format, version: what a file says of itself.
        words: what a file is, in words.
        folder: of the package, where those of the embedded networks are.
    """

    format: ClassVar[str]
    version: ClassVar[int] = 1
    words: ClassVar[str]
    folder: ClassVar[str]

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything that :meth:`from_json` needs, as plain values."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            TypeError, ValueError: it is something else.
        """

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write a JSON file; an interrupted write leaves the file that was there.

        Args:
            path: of the file.
            more: entries beside, which :meth:`load` does not look at, such as a provenance.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(Path(path), {"format": self.format, "version": self.version, **self.to_json(), **more})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else, or is damaged.
        """
        return cls._parse(Path(path).read_bytes(), os.fspath(path))

    @classmethod
    def _shipped(cls, name: str, ending: str = "") -> Self:
        """What comes with the package under that name, in a file whose name ends so; KeyError of the known names."""
        folder = resources.files("trady_kernels.selection") / cls.folder
        file_ending = f"{ending}.json"
        files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        names = sorted(file.removesuffix(file_ending) for file in files if file.endswith(file_ending))
        if name not in names:
            raise KeyError(*names)
        return cls._parse((folder / f"{name}{file_ending}").read_bytes(), f"{name}{file_ending}")

    @classmethod
    def _parse(cls, content: bytes, origin: str) -> Self:
        try:
            data = json.loads(content)
        except ValueError as error:
            raise ValueError(
                f"path: {origin} is not JSON ({error}), expected a saved {cls.__name__}"
            ) from None
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (
            cls.format,
            cls.version,
        ):
            raise ValueError(
                f"path: {origin} is not a {cls.words} of version {cls.version}, expected a file that "
                f"{cls.__name__}.save wrote"
            )
        try:
            return cls.from_json(data)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"path: {origin} is damaged: {error}") from None
