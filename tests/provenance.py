"""What the cells of studies in tests were made with."""

from __future__ import annotations

from typing import Any

PROVENANCE: dict[str, Any] = {
    "command": "trady study all",
    "commit": "0123456789abcdef",
    "versions": {"python": "3.11", "torch": "2.13"},
    "machine": {"device": "cpu", "name": "a CPU", "threads": 2, "instruction_set": "avx2"},
}
