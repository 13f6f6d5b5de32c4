"""Every .cu file compiles for every GPU it is meant for, and its kernels keep what they compute in registers."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
#: Compute capabilities: of every run, and of the slow set, with the code that later GPUs compile for themselves.
USUAL, OTHERS = ("sm_80", "sm_90"), ("sm_75", "sm_86", "sm_89", "sm_100", "sm_120", "compute_90")

#: Of a kernel as cuobjdump has it.
IN_REGISTERS = re.compile(r"\bSTACK:0\b.*\bLOCAL:0\b")


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return found or pytest.skip("nvcc is not on PATH: install the CUDA toolkit")


def compile(source: Path, architectures: tuple[str, ...], output: Path, stage: str = "-c") -> str:
    """What the compiler says about each kernel on each architecture."""
    targets = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in architectures]
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = [nvcc(), *options, "-isystem", include, "-I", ROOT / "csrc", *targets, stage]
    done = subprocess.run(
        [*map(str, command), "-Xptxas=-v", str(source), "-o", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line]
    assert not warnings, warnings
    return done.stdout + done.stderr


def outside_registers(report: str) -> dict[str, str]:
    """Kernels that keep something in memory which should be in registers, with the compiler's words."""
    found = {}
    pattern = r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    matches = re.findall(pattern, report)
    assert matches, report
    for kernel, *numbers in matches:
        if any(map(int, numbers)):
            found[kernel] = "{} bytes of stack, {} spilled, {} loaded again".format(*numbers)
    return found


def has_kernels(source: Path) -> bool:
    """linear_channel_grad calls those of products."""
    return "__global__" in source.read_text()


def check(stem: str, architectures: tuple[str, ...], folder: Path) -> None:
    source = ROOT / "csrc" / "cuda" / f"{stem}.cu"
    report = compile(source, architectures, folder / "object.o")
    if has_kernels(source):
        assert outside_registers(report) == {}


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton comes with."""
    triton = importlib.util.find_spec("triton")
    inside = "" if triton is None or triton.origin is None else str(Path(triton.origin).parent)
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{inside}/backends/nvidia/bin")


def taken(tool: str, binary: Path) -> dict[str, dict[str, str]]:
    """By architecture, the kernels of an object or a library, with what each takes."""
    command = [tool, "--dump-resource-usage", binary]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, str]] = {}
    for part in done.stdout.split("Fatbin elf code:")[1:]:
        (architecture,) = re.findall(r"^arch = (\w+)$", part, re.MULTILINE)
        found.setdefault(architecture, {}).update(re.findall(r"Function (\w+):\s*(REG.*)", part))
    return found


@functools.cache
def built() -> dict[str, dict[str, str]]:
    """The same of the library that was built in place; nothing where a source is newer."""
    library, tool = ROOT / "trady_kernels" / "_lib" / "libtrady_cuda.so", disassembler()
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc").glob("*.h")]
    changed = max(path.stat().st_mtime for path in sources)
    if tool is None or not library.exists() or library.stat().st_mtime < changed:
        return {}
    return taken(tool, library)


@pytest.mark.parametrize("stem", SOURCES)
def test_usual(stem: str, tmp_path: Path) -> None:
    """What the library was built for is looked at there, where minutes of compiling have been done already."""
    if missing := tuple(architecture for architecture in USUAL if architecture not in built()):
        check(stem, missing, tmp_path)
    for architecture in set(USUAL) & set(built()):
        kernels = {name: took for name, took in built()[architecture].items() if f"_{stem}_cu_" in name}
        assert bool(kernels) == has_kernels(ROOT / "csrc" / "cuda" / f"{stem}.cu")
        assert {name: took for name, took in kernels.items() if not IN_REGISTERS.search(took)} == {}


def test_kernels_of_headers_that_were_built() -> None:
    if not built():
        pytest.skip("no library of these sources, or no cuobjdump: install the CUDA toolkit and build again")
    of_headers = [
        took for kernels in built().values() for name, took in kernels.items() if "_cu_" not in name
    ]
    assert [took for took in of_headers if not IN_REGISTERS.search(took)] == []
    assert len(of_headers) == 2 * len(built())  # add_parts in float and double


@pytest.mark.slow
@pytest.mark.parametrize("stem", SOURCES)
def test_others(stem: str, tmp_path: Path) -> None:
    check(stem, OTHERS, tmp_path)


@pytest.mark.parametrize(
    ("stem", "kernels"),
    (
        ("conv2d_channel_grad", {"staged_sums", "direct_sums", "general_sums"}),
        ("products", {"point_sums", "row_sums"}),
    ),
)
def test_a_kernel_that_starts_early_waits_before_it_reads(
    stem: str, kernels: set[str], tmp_path: Path
) -> None:
    """Parts that a kernel reads while another one may still write them: not before the wait, nor as constants."""
    output = tmp_path / "kernels.ptx"
    compile(ROOT / "csrc" / "cuda" / f"{stem}.cu", ("compute_90",), output, "-ptx")
    pattern = rf"\.entry \w*?({'|'.join({*kernels, 'add_parts'})})I.*?\{{\n(.*?)\n\}}"
    entries = re.findall(pattern, output.read_text(), re.DOTALL)
    assert {name for name, _ in entries} == {*kernels, "add_parts"}
    for name, body in entries:
        if name == "add_parts":
            before, after = body.split("griddepcontrol.wait")
            assert "ld.global" not in before and "ld.global" in after and "ld.global.nc" not in after
        else:
            assert "griddepcontrol.launch_dependents" in body


_SPILLED = """
__global__ void __launch_bounds__(1024) spilled(float* x, int count) {
  float sums[128] = {};
  for (int n = 0; n < count; ++n) {
#pragma unroll
    for (int k = 0; k < 128; ++k) sums[k] += x[n * 128 + k] * x[n];
  }
#pragma unroll
  for (int k = 0; k < 128; ++k) x[k] = sums[k];
}
"""


def test_what_is_spilled_is_seen(tmp_path: Path) -> None:
    """The check can fail: a thread of 1024 has 64 registers, not 128."""
    source = tmp_path / "spilled.cu"
    source.write_text(_SPILLED)
    output = tmp_path / "object.o"
    (found,) = outside_registers(compile(source, USUAL[:1], output)).items()
    assert "spilled" in found[0] and " 0 spilled" not in found[1]
    if tool := disassembler():
        (took,) = taken(tool, output)[USUAL[0]].values()
        assert not IN_REGISTERS.search(took)
