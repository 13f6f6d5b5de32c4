"""The folder of a run: ``results.json``, a checkpoint for each scheme, the plot."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trady_kernels.atomic_write import write_json

_FORMAT = "trady-finetune-run"
_VERSION = 3


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def results(self) -> Path:
        """Settings, provenance and every figure, as JSON; written before the training starts."""
        return self.path / "results.json"

    @property
    def plot(self) -> Path:
        """Accuracy against memory."""
        return self.path / "accuracy.png"

    def checkpoint(self, scheme: str) -> Path:
        """The last epoch of a scheme; ``torch.load(...)["model"]`` is the plain network's state dict."""
        return self.path / f"checkpoint-{scheme}.pt"

    def checkpoints(self) -> list[Path]:
        """Those that are there, whatever their scheme."""
        return sorted(self.path.glob(self.checkpoint("*").name))

    def create(self) -> None:
        """Make the folder, before any work, and prove that files can be written to it.

        Raises:
            FileExistsError: it holds a run already, or the checkpoints of one.
            OSError: it cannot be made or written to.
        """
        if self.results.exists():
            raise FileExistsError(
                f"output: {self.path} holds a run already; go on with it by --resume {self.path}, "
                "or give another folder"
            )
        if found := self.checkpoints():  # the new run would go on from them, or write over them
            raise FileExistsError(
                f"output: {self.path} holds {found[0].name} of a run without results.json; give another folder, or move "
                "the checkpoints away"
            )
        self._prove_writable()

    def read(self) -> dict[str, Any]:
        """What ``results.json`` says, of a run that is to go on.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: the file is damaged or another version's.
            OSError: the folder cannot be written to.
        """
        try:
            content = json.loads(self.results.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"resume: {self.path} holds no run, expected a folder with results.json"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"resume: {self.results} is damaged ({error}); start the run again in another folder"
            ) from error
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (
            _FORMAT,
            _VERSION,
        ):
            raise ValueError(f"resume: {self.results} was not written by this version of trady finetune")
        self._prove_writable()
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Replace ``results.json``."""
        write_json(self.results, {"format": _FORMAT, "version": _VERSION, **content})

    def _prove_writable(self) -> None:
        probe = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise type(error)(
                f"output: {self.path} cannot be written to ({error.strerror}); give another folder"
            ) from error
