"""The hot functions beside plain loops (tests/cpp), on every instruction set: of this CPU, and of 64-bit Arm emulated."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from trady_kernels import _C

ROOT = Path(__file__).parent.parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program() -> Path:
    """The test program, linked from the objects that the package was built from."""
    tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    folder = next(ROOT.glob(f"build/cmake-{tag}-*"), None) or pytest.skip(
        "the package was not built in this folder: run pip install -e . --no-build-isolation"
    )
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed: pip install cmake")
    for command in ([cmake, "-DTRADY_TESTS=ON", folder], [cmake, "--build", folder, "-t", "trady_tests"]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "trady_tests"


@pytest.mark.slow
def test_every_set_of_this_cpu(program: Path) -> None:
    done = run(program)
    assert done.returncode == 0, done.stdout
    *sets, total = done.stdout.splitlines()
    assert sets == [f"{isa}: passed" for isa in _C.available_isas()]
    count, words = total.split(maxsplit=1)
    assert words == "passed, 0 failed" and int(count) >= len(sets)


@pytest.mark.slow
def test_missing_set_is_refused(program: Path) -> None:
    done = run(program, "sse9")
    expected = "instruction set: got 'sse9', expected one that this CPU has: baseline"
    assert done.returncode == 2 and done.stdout.startswith(expected)


@pytest.mark.slow
def test_arm() -> None:
    for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install g++-aarch64-linux-gnu qemu-user")
    done = run(sys.executable, "quickstart.py", "arm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"baseline: passed", "neon_bf16: passed", "sve256: passed"} <= set(done.stdout.splitlines())
    for cpu, missing in (("cortex-a72", "neon_bf16"), ("max,sve-default-vector-length=64", "sve256")):
        refused = run("qemu-aarch64", "-cpu", cpu, "build/aarch64/trady_tests", missing)
        expected = f"instruction set: got '{missing}', expected one that this CPU has: baseline"
        assert refused.returncode == 2 and refused.stdout.startswith(expected)
