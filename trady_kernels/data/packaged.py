"""Files inside installed packages that are not imported: their data is wanted, not what they depend on."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_packaged(package: str, file: Path, missing: str) -> Path:
    """Path of a file inside an installed package.

    Args:
        package: name by which Python would import it.
        file: path inside it.
        missing: the sentence for a package or a file that is not there, with the command that installs it.

    Raises:
        FileNotFoundError: with that sentence.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    raise FileNotFoundError(missing)
