"""Whether a call still runs: torch calls no hooks after a ``KeyboardInterrupt``, and a notebook goes on."""

from __future__ import annotations

import sys
from types import FrameType


def is_running(call: FrameType) -> bool:
    """Whether what asks runs inside of ``call``, which has neither returned nor been cut off."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False
