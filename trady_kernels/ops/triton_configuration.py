"""What one compiled variant of a Triton kernel is: enough to compile it where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One variant of a kernel, as a call of its host side may launch it.

    Args:
        kernel: the function under ``triton.jit``.
        signature: Triton's name of every argument's type that is not a constant, by argument, e.g. ``"*fp32"``,
            ``"i64"``.
        constexprs: value of every constant argument.
        num_warps, num_stages: as the launch passes them.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
