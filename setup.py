"""Builds the compiled part through CMake; metadata is in pyproject.toml.

Environment: ``TRADY_CUDA=0`` or ``1`` leaves the CUDA library out or insists on it (default: built where
nvcc is found), ``TRADY_CUDA_ARCHS`` its architectures as CMake spells them ("80-real;90"), ``CXX`` the
compiler, ``TRADY_ISAS`` the instruction sets beside the baseline ("avx2;avx512"; default: all that the compiler takes),
``TRADY_SANITIZE=1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer, the C++ tests too. Without a C++ compiler
the package is installed without compiled code.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
#: Code for Turing, Ampere and Ada (8.x run 8.0), Hopper, and what later GPUs compile for themselves.
DEFAULT_CUDA_ARCHS = "75-real;80-real;90-real;90-virtual"


def program(name: str) -> str | None:
    """Path of ``name``, looked for beside this Python first: an environment need not be activated."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def compiler() -> str | None:
    wanted = os.environ.get("CXX")
    if wanted:
        found = shutil.which(wanted)
        if not found:
            raise SystemExit(f"CXX: got {wanted!r}, expected a C++ compiler on this machine")
        return found
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """The one of CUDA_HOME where that is set; otherwise on PATH or in the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wanted_nvcc() -> str | None:
    """nvcc where the CUDA library is to be built, None where it is to be left out."""
    wanted = os.environ.get("TRADY_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"TRADY_CUDA: got {wanted!r}, expected 0, 1, or unset (built where nvcc is found)")
    found = None if wanted == "0" else nvcc()
    if wanted == "1" and found is None:
        raise SystemExit(
            "TRADY_CUDA: got 1, but there is no nvcc under CUDA_HOME or on PATH; install the CUDA toolkit "
            "or leave TRADY_CUDA unset"
        )
    return found


def sanitized() -> bool:
    value = os.environ.get("TRADY_SANITIZE", "0")
    if value not in ("0", "1"):
        raise SystemExit(f"TRADY_SANITIZE: got {value!r}, expected 0, 1, or unset")
    return value == "1"


def standard_library() -> Path | None:
    """The C++ standard library in this process, which is the one of an imported torch; None where /proc does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = (Path(line.split(maxsplit=5)[-1]) for line in lines)
    return next((path for path in paths if path.name.startswith("libstdc++.so")), None)


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


class BuildThroughCMake(build_ext):
    def package_dir(self) -> Path:
        return ROOT / "trady_kernels" if self.inplace else Path(self.build_lib).resolve() / "trady_kernels"

    def run(self) -> None:
        package = self.package_dir()
        cxx = compiler()
        if cxx is None:
            wanted_nvcc()
            self.clear(package)
            facts = {"missing": "no C++ compiler (c++, g++ or clang++) was found on PATH at installation"}
        else:
            facts = self.build(package, cxx)
        (package / "_lib" / "build.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def build(self, package: Path, cxx: str) -> dict[str, str]:
        for tool in ("cmake", "ninja"):
            if program(tool) is None:
                raise SystemExit(
                    f"{tool}: not found; install the build requirements: pip install cmake ninja pybind11"
                )
        import pybind11
        import torch

        torch_root = Path(torch.__file__).parent
        cuda_compiler = wanted_nvcc()
        archs = os.environ.get("TRADY_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
        settings = {
            "CMAKE_CXX_COMPILER": cxx,
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "TORCH_INCLUDE": torch_root / "include",
            "TORCH_LIB": torch_root / "lib",
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE": pybind11.get_include(),
            "MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "TRADY_CUDA": "ON" if cuda_compiler else "OFF",
            "TRADY_SANITIZE": "ON" if sanitized() else "OFF",
            "TRADY_TESTS": "ON" if sanitized() else "OFF",
            "TRADY_ISAS": os.environ.get("TRADY_ISAS", ""),
        }
        library = standard_library()
        if library is not None:
            settings["STANDARD_LIBRARY"] = library
        if cuda_compiler:
            settings |= {"CMAKE_CUDA_COMPILER": cuda_compiler, "TRADY_CUDA_ARCHS": archs}
        # One folder for each Python, torch and compiler, so that going back and forth rebuilds nothing.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{Path(cxx).name}"
        folder = ROOT / "build" / ("sanitized" if sanitized() else f"cmake-{tag}")
        cmake = str(program("cmake"))
        self.command(
            [cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in settings.items())]
        )
        self.command([cmake, "--build", folder])
        self.clear(package)
        self.command([cmake, "--install", folder, "--prefix", package])
        facts = {
            "compiler": first_line([cxx, "--version"]),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        if cuda_compiler:
            release = subprocess.run([cuda_compiler, "--version"], capture_output=True, text=True).stdout
            facts |= {
                "nvcc": next((line for line in release.splitlines() if "release" in line), ""),
                "cuda_archs": archs,
            }
        elif os.environ.get("TRADY_CUDA") == "0":
            facts["cuda_missing"] = "TRADY_CUDA was 0 at installation"
        else:
            facts["cuda_missing"] = "no nvcc was found under CUDA_HOME or on PATH at installation"
        return facts

    @staticmethod
    def clear(package: Path) -> None:
        """Remove what an earlier build installed: a library left out this time must not stay."""
        shutil.rmtree(package / "_lib", ignore_errors=True)
        for module in package.glob("_C.*.so"):
            module.unlink()
        (package / "_lib").mkdir(parents=True)

    @staticmethod
    def command(arguments: list[object]) -> None:
        done = subprocess.run(
            [str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SystemExit(
                f"{done.stdout}\nthe build failed: {shlex.join(map(str, arguments))}\n"
                "TRADY_CUDA=0 in the environment leaves the CUDA library out, CXX names another compiler"
            )
        print(done.stdout, flush=True)

    def get_outputs(self) -> list[str]:
        package = self.package_dir()
        return [str(p) for p in (*package.glob("_C.*.so"), *package.glob("_lib/*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("trady_kernels._C", sources=[])], cmdclass={"build_ext": BuildThroughCMake})
