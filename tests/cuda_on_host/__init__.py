"""CUDA kernels on the CPU, for tests on a machine without a GPU: ``cuda_runtime.h`` beside this file says how."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from trady_kernels.ops.backend import _DEVICES, OPERATORS, _reasons

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent.parent / "build" / f"cuda_on_host-torch{torch.__version__}"
NAMESPACE = "trady_cuda_on_host"


def _program(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


@functools.cache
def library() -> torch.library.Library | str:
    """Build the kernels and load them as operators of their own; why that cannot be, where a tool is missing."""
    missing = [name for name in ("cmake", "ninja", "c++") if _program(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: CUDA kernels run on the CPU once they are compiled for it"
    torch_root = Path(torch.__file__).parent
    settings = {
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "TORCH_INCLUDE": torch_root / "include",
        "TORCH_LIB": torch_root / "lib",
    }
    cmake = str(_program("cmake"))
    configure = ["-G", "Ninja", "-S", FOLDER, "-B", BUILD, *(f"-D{k}={v}" for k, v in settings.items())]
    for arguments in (configure, ["--build", BUILD]):
        done = subprocess.run([cmake, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    schemas = torch.library.Library(NAMESPACE, "DEF")
    for operator in OPERATORS.values():
        schemas.define(str(operator.overload._schema).removeprefix("trady::"))
    torch.ops.load_library(BUILD / f"lib{NAMESPACE}.so")
    return schemas


class Kernels:
    """Puts them in the place of the CUDA kernels of every operator that has some, while it lasts."""

    def __enter__(self) -> None:
        assert isinstance(library(), torch.library.Library)
        self._reason = _reasons.pop("cuda", None)
        self._device = _DEVICES["cuda"]
        _DEVICES["cuda"] = "cpu"
        for name, operator in OPERATORS.items():
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"):
                operator.kernels["cuda"] = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __exit__(self, *_: object) -> None:
        _DEVICES["cuda"] = self._device
        if self._reason is not None:
            _reasons["cuda"] = self._reason
        for operator in OPERATORS.values():
            operator.kernels.pop("cuda", None)
