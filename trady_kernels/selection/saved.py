"""Reading back what a class of this package saved as JSON."""

from __future__ import annotations

import json
from typing import Any


def parse_saved(
    content: bytes, origin: str, *, format: str, version: int, words: str, made_by: str
) -> dict[str, Any]:
    """The object in a file, once it says that it is of that format and version.

    Args:
        content: of the file.
        origin: its name, for messages.
        format, version: what it has to say of itself.
        words: what such a file holds, in words.
        made_by: name of the class whose ``save`` writes it.

    Raises:
        ValueError: it is no JSON, or of another format or version.
    """
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ValueError(f"path: {origin} is not JSON ({error}), expected a saved {made_by}") from None
    if not isinstance(data, dict) or data.get("format") != format or data.get("version") != version:
        raise ValueError(
            f"path: {origin} is not a {words} of version {version}, expected a file that {made_by}.save wrote"
        )
    return data
