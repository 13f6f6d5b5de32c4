"""What was built, and how building behaves where a tool is missing or fails."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from trady_kernels import _C
from trady_kernels.ops.backend import build_record

ROOT = Path(__file__).parent.parent
PACKAGE = Path(_C.__file__).parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "trady_kernels")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source folder that nothing was ever built in."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run beside no setup.py")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("_lib", "*.so", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def program(name: str) -> str:
    """A tool of the build, beside this Python or on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: pip install {name}")


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, **environment)


# ---- what was built ---------------------------------------------------------------------------------------


def test_record() -> None:
    record = build_record()
    assert {"compiler", "torch", "python"} <= set(record)
    assert (
        ("nvcc" in record) == (PACKAGE / "_lib" / "libtrady_cuda.so").exists() != ("cuda_missing" in record)
    )
    assert _C.build_facts()["isas"][0] == "baseline"


def test_libraries_name_no_python_and_the_cpu_one_no_cuda() -> None:
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    for library in (PACKAGE / "_lib").glob("*.so"):
        undefined = run(nm, "-D", "--undefined-only", library).stdout
        assert "aoti_torch" in undefined
        assert not re.search(r"\b_?Py[A-Z_]", undefined), library
        if library.name == "libtrady_cpu.so":
            assert not re.search(r"cuda_stream|\bcuda[A-Z]", undefined)


def test_hot_objects_export_no_weak_symbols() -> None:
    """A weak function compiled for AVX-512 may replace the baseline's at link time."""
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    folder = next(ROOT.glob(f"build/cmake-{tag}-*"), None) or pytest.skip(
        "the package was not built in this folder"
    )
    for isa in _C.build_facts()["isas"]:
        objects = list((folder / "CMakeFiles" / f"trady_cpu_{isa}.dir" / "csrc" / "cpu").glob("*.o"))
        assert len(objects) == len(HOT_FILES) or isa != "baseline"
        for path in objects:
            exported = run(nm, "-C", "--defined-only", "--extern-only", path).stdout.splitlines()
            assert exported
            for line in exported:
                kind, name = line.split(maxsplit=2)[1:]
                assert kind in "TRDB" and name.startswith(f"trady::{isa}::"), f"{path.name}: {line}"


HOT_FILES = {path.name.removesuffix(".isa.cpp"): path for path in ROOT.glob("csrc/cpu/*.isa.cpp")}


def mentioned(pattern: str) -> set[str]:
    """Hot files in which the pattern occurs, or in a header of theirs other than the one of vectors, which has everything."""
    found = set()
    for name, path in HOT_FILES.items():
        headers = set(re.findall(r'#include "(.+)"', path.read_text())) - {"vector.h"}
        texts = [file.read_text() for file in (path, *(path.parent / header for header in headers))]
        if any(re.search(pattern, text) for text in texts):
            found.add(name)
    return found


def test_sets_have_the_hot_files_that_their_instructions_are_for() -> None:
    lists = re.findall(r"set\(FILES_OF_(\w+)([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    files = {isa: set(names.split()) for isa, names in lists}
    assert files["avx512_amx"] == mentioned("__AMX")
    assert files["avx512_bf16"] | files["avx512_amx"] == mentioned(
        r"OPERANDS|_operand\b|operand_of|MULTIPLIES_BFLOAT16|AVX512BF16"
    )


#: In /proc/cpuinfo's words, what each set of x86-64 asks of a CPU.
X86_FLAGS = {
    "baseline": {"sse2"},
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}
X86_FLAGS["avx512_amx"] = X86_FLAGS["avx512_bf16"] | {"amx_tile", "amx_bf16"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
def test_every_set_of_this_cpu_is_listed() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("there is no /proc/cpuinfo to compare with")
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    compiled = _C.build_facts()["isas"]
    assert _C.available_isas() == [isa for isa in compiled if X86_FLAGS[isa] <= set(flags)]
    left_out = re.findall(r"(\w+) \(the compiler", _C.build_facts()["missing_isas"])
    assert sorted([*compiled, *left_out]) == sorted(X86_FLAGS)


def test_the_best_set_is_the_default() -> None:
    code = "import trady_kernels.ops; from trady_kernels import _C; print(_C.isa())"
    environment = {name: value for name, value in os.environ.items() if name != "TRADY_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{_C.available_isas()[-1]}\n"


def test_instruction_set_is_chosen_and_checked() -> None:
    before = _C.isa()
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            assert _C.isa() == isa
        with pytest.raises(
            ValueError, match="instruction set: got 'sse9', expected one that this CPU has: baseline"
        ):
            _C.set_isa("sse9")
    finally:
        _C.set_isa(before)


def test_instruction_set_from_the_environment() -> None:
    code = "import trady_kernels.ops; from trady_kernels import _C; print(_C.isa())"
    assert run(sys.executable, "-c", code, TRADY_ISA="baseline").stdout == "baseline\n"
    failed = run(sys.executable, "-c", code, TRADY_ISA="sse9")
    assert failed.returncode == 1
    assert (
        "ValueError: TRADY_ISA: instruction set: got 'sse9', expected one that this CPU has" in failed.stderr
    )


def test_roofline_probes() -> None:
    assert _C.copy_bandwidth(1 << 16, threads=2) > 1e8
    assert _C.fma_peak() > 1e8
    with pytest.raises(ValueError, match="threads: got 0, expected at least 1"):
        _C.fma_peak(0)


# ---- how building behaves ---------------------------------------------------------------------------------


def test_without_a_compiler(source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It installs, says so once, and computes the same by other means; forcing C++ is refused."""
    done = build(source, PATH=str(tmp_path_factory.mktemp("empty")), CXX="")
    assert done.returncode == 0, done.stderr
    record = json.loads((source / "trady_kernels" / "_lib" / "build.json").read_text())
    assert record == {"missing": "no C++ compiler (c++, g++ or clang++) was found on PATH at installation"}
    code = """
import torch, trady_kernels.ops as ops, trady_kernels.nn
x, channels = torch.randn(2, 5, 3, 4), torch.tensor([1, 3])
assert torch.equal(ops.gather_channels(x, channels), x[:, channels])
assert ops.last_kernel("gather_channels") == "reference"
ops.linear_channel_grad(torch.randn(4, 2), torch.randn(4, 3))
assert ops.last_kernel("linear_channel_grad") == "aten"
try:
    with ops.backend("cpp"):
        pass
except RuntimeError as error:
    print(error)
"""
    ran = run(sys.executable, "-W", "always", "-c", code, cwd=source, PYTHONPATH=str(source))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == (
        "backend 'cpp' cannot run here: no C++ compiler (c++, g++ or clang++) was found on PATH at installation: "
        "install a C++ compiler and install the package again\n"
    )
    assert ran.stderr.count("trady_kernels runs without compiled code") == 1


def test_compiler_that_fails_stops_the_build(source: Path) -> None:
    compiler = source / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'internal error: segmentation fault' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(source, CXX=str(compiler), TRADY_CUDA="0")
    assert done.returncode != 0
    assert "the build failed: " in done.stderr and "internal error: segmentation fault" in done.stderr
    assert not (source / "trady_kernels" / "_lib").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86-64")
def test_compiler_that_does_not_know_a_set(source: Path) -> None:
    """The set is left out of the build, and the record says so; the others are there."""
    compiler = source / "older-compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    cmake, ninja = program("cmake"), program("ninja")
    folder = source / "build"
    options = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}")
    torch_paths = (f"-DTORCH_INCLUDE={source}", f"-DTORCH_LIB={source}")
    done = run(cmake, "-S", source, "-B", folder, *options, *torch_paths)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = (folder / "build.ninja").read_text()
    assert re.search(r"TRADY_MISSING_ISAS=\S*avx512_bf16 \(the compiler does not take .*-mavx512bf16\)", plan)
    sets = set(re.findall(r"CMakeFiles/trady_cpu_(\w+)\.dir", plan))
    assert sets == {"baseline", "avx2", "avx512"}
    assert "apply(avx512,__VA_ARGS__)" in plan and "apply(avx512_bf16" not in plan


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86-64")
def test_sets_that_are_asked_for(source: Path) -> None:
    cmake, ninja = program("cmake"), program("ninja")
    options = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DTRADY_ISAS=avx2;avx512_amx")
    torch_paths = (f"-DTORCH_INCLUDE={source}", f"-DTORCH_LIB={source}")
    done = run(cmake, "-S", source, "-B", source / "build", *options, *torch_paths)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = (source / "build" / "build.ninja").read_text()
    assert set(re.findall(r"CMakeFiles/trady_cpu_(\w+)\.dir", plan)) <= {"baseline", "avx2", "avx512_amx"}
    assert "avx512 (left out by TRADY_ISAS)" in plan and "apply(avx2,__VA_ARGS__)" in plan


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86-64")
@pytest.mark.parametrize(
    ("asked", "unknown"), [("avx3", "avx3"), ("avx2;sve256", "sve256"), ("baseline", None)]
)
def test_sets_that_no_cpu_of_this_kind_has(source: Path, asked: str, unknown: str | None) -> None:
    options = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}", f"-DTRADY_ISAS={asked}")
    done = run(program("cmake"), "-S", source, "-B", source / "build", *options)
    assert (done.returncode == 0) == (unknown is None), done.stdout + done.stderr
    known = "baseline;avx2;avx512;avx512_bf16;avx512_amx"
    sentence = f"TRADY_ISAS: got {unknown}, expected some of {known}"
    assert (sentence in " ".join(done.stderr.split())) == (unknown is not None)


def test_compiler_that_links_a_static_standard_library(source: Path) -> None:
    """The libraries run on torch's all the same: with another, exceptions of the operators would crash the process."""
    program("c++")
    if not Path(run("c++", "-print-file-name=libstdc++.a").stdout.strip()).is_absolute():
        pytest.skip("the compiler has no static standard library")
    for path in source.glob("csrc/cpu/*.cpp"):  # one operator, compiled for one instruction set, is enough
        if path.name.partition(".")[0] not in ("isa", "roofline", "pack_bits"):
            path.unlink()
    compiler = source / "static-compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'for argument; do case "$argument" in -mavx2|-march=*) exit 1;; esac; done\n'
        'exec c++ "$@" -static-libstdc++ -static-libgcc\n'
    )
    compiler.chmod(0o755)
    done = build(source, CXX=str(compiler), TRADY_CUDA="0")
    assert done.returncode == 0, done.stderr
    code = """
import torch, trady_kernels.ops
try:
    torch.ops.trady.pack_bits(torch.zeros(2, 3))
except RuntimeError as error:
    print(error)
"""
    ran = run(sys.executable, "-c", code, cwd=source, PYTHONPATH=str(source))
    assert re.search(r"pack_bits\.cpp:\d+, mask: got Float, expected bool", ran.stdout), ran.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"TRADY_SANITIZE": "yes"}, "TRADY_SANITIZE: got 'yes', expected 0, 1, or unset"),
        ({"TRADY_CUDA": "yes"}, "TRADY_CUDA: got 'yes', expected 0, 1, or unset"),
        ({"CXX": "no-such-compiler"}, "CXX: got 'no-such-compiler', expected a C++ compiler on this machine"),
    ],
    ids=str,
)
def test_bad_settings(source: Path, environment: dict[str, str], sentence: str) -> None:
    done = build(source, **environment)
    assert done.returncode != 0 and sentence in done.stderr


def test_cuda_asked_for_without_nvcc(source: Path) -> None:
    done = build(source, TRADY_CUDA="1", CUDA_HOME=str(source))
    assert done.returncode != 0 and "TRADY_CUDA: got 1, but there is no nvcc under CUDA_HOME" in done.stderr


@pytest.mark.slow
def test_wheel(source: Path, tmp_path: Path) -> None:
    """A built wheel holds the libraries, and its operators run from where it is unpacked."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-q")
    done = run(sys.executable, "-m", "pip", "wheel", ".", *options, "-w", tmp_path / "wheels", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").glob("trady_kernels-*.whl")
    site = tmp_path / "site"
    done = run(sys.executable, "-m", "pip", "install", *options, "--target", site, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    code = """
import torch, trady_kernels.ops as ops
ops.linear_channel_grad(torch.randn(4, 2), torch.randn(4, 3))
print(ops.last_kernel("linear_channel_grad"), ops.__file__)
"""
    ran = run(sys.executable, "-W", "error", "-c", code, cwd=site, PYTHONPATH=str(site))
    assert ran.stdout == f"cpp {site / 'trady_kernels' / 'ops' / '__init__.py'}\n", ran.stderr
