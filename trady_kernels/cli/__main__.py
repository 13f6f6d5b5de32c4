"""``python -m trady_kernels.cli`` is ``trady``."""

from __future__ import annotations

import sys

from trady_kernels.cli import main

sys.exit(main())
