"""Sets everything up in .venv beside this file, then runs one command. Standard library only.

    python3 quickstart.py finetune [arguments of trady finetune]
    python3 quickstart.py test [--slow] [arguments of pytest]
    python3 quickstart.py sanitize [arguments of pytest]
    python3 quickstart.py arm

``TRADY_TORCH=2.10.0`` in the environment takes another version of torch than the pinned one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(
        f"quickstart.py: got Python {sys.version.split()[0]}, expected 3.10 or newer; run it with a newer python3"
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "quickstart.json"
LOG = VENV / "quickstart.log"
TORCH = os.environ.get("TRADY_TORCH", "2.13.0")

#: Of pytest: every one has a torch of its own in memory.
WORKERS = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]


def requirements(name: str) -> list[str]:
    """The list ``name`` of pyproject.toml, the one place where requirements are written down."""
    found = re.search(
        rf"^{name} = (\[.*?\])$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"pyproject.toml has no list {name}"
    return list(ast.literal_eval(found.group(1)))


def compiler() -> str | None:
    """The C++ compiler that setup.py takes."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    """The one that setup.py takes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [str(Path(home, "bin"))] if home else [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def build_inputs() -> str:
    """Digest of everything that the build of the package depends on."""
    settings = [os.environ.get(k) for k in ("TRADY_CUDA", "TRADY_CUDA_ARCHS", "TRADY_ISAS", "CXX")]
    # Also whether there are any: a build without them installs the package without compiled code.
    digest = hashlib.sha256(repr([*settings, compiler(), nvcc()]).encode())
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in (*(ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt")), *sources):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


class Setup:
    """Steps towards a working environment; each is done once and remembered with what it depended on."""

    def __init__(self) -> None:
        try:
            self.done: dict[str, str] = json.loads(STAMP.read_text("utf-8"))
        except (OSError, ValueError):
            self.done = {}
        self.fresh = True

    def remember(self) -> None:
        # Whole or not at all: an interrupted write must not leave half a file.
        temporary = STAMP.with_suffix(".new")
        temporary.write_text(json.dumps(self.done, indent=1), "utf-8")
        temporary.replace(STAMP)

    def environment(self) -> None:
        """A virtual environment whose pip works; made anew where a set-up was killed half-way."""
        version = f"{sys.version.split()[0]} {VENV}"
        if self.done.get("environment") == version and "running" not in self.done and PYTHON.exists():
            return
        ours = not VENV.exists() or bool(self.done)
        if not ours and self.run([PYTHON, "-m", "pip", "--version"]) == 0:
            self.done = {"environment": version}
            self.remember()
            return
        print(f"making {VENV.relative_to(ROOT)} ...", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit(
                f"{made.stdout}{made.stderr}quickstart.py: {sys.executable} -m venv failed; where ensurepip is missing, "
                f"install it (Debian and Ubuntu: apt install python3-venv) and run this again"
            )
        self.done = {"environment": version}
        self.remember()

    def run(self, command: list[str | Path]) -> int:
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            try:
                return subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
            except OSError as error:
                log.write(f"{error}\n")
                return 1

    def step(self, name: str, inputs: str, arguments: list[str], required: bool = True) -> None:
        """``pip install`` with ``arguments`` unless that was done for the same ``inputs``."""
        if self.done.get(name) == inputs:
            return
        print(f"{name} ...", end=" ", flush=True)
        started = time.monotonic()
        size = LOG.stat().st_size if LOG.exists() else 0
        self.done.pop(name, None)
        # Stays behind when this process is killed: then what pip left is not to be believed.
        self.done["running"] = name
        self.remember()
        failed = self.run([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments])
        del self.done["running"]
        if not failed or not required:
            self.done[name] = inputs
        self.remember()
        print(f"{'not available' if failed else 'done'} ({time.monotonic() - started:.0f} s)", flush=True)
        if failed and required:
            with LOG.open(encoding="utf-8", errors="replace") as log:
                log.seek(size)
                print(*log.readlines()[-60:], sep="")
            sys.exit(f"quickstart.py: the step '{name}' failed; the whole output is in {LOG}")

    def tools(self) -> None:
        """What a build needs beside a compiler."""
        self.environment()
        tools = [r for r in requirements("requires") if not r.startswith("torch")]
        self.step("build tools", repr(tools), [*tools, "wheel"])

    def prepare(self, extras: list[str], networks: bool) -> None:
        """Everything installed: torch, the package, and the requirements of ``extras``."""
        if not re.fullmatch(r"\d+\.\d+\.\d+\S*", TORCH):
            sys.exit(f"TRADY_TORCH: got {TORCH!r}, expected a version such as 2.13.0")
        self.tools()
        self.step(f"torch {TORCH}", TORCH, [f"torch=={TORCH}", "numpy"])
        pinned = [f"torch=={TORCH}"]
        installed = list((ROOT / "trady_kernels" / "_lib").glob("build.json"))
        if not installed:
            self.done.pop("trady_kernels", None)
        self.step(
            "trady_kernels", f"{build_inputs()} {TORCH}", ["--no-build-isolation", "--no-deps", "-e", "."]
        )
        for extra in extras:
            wanted = requirements(extra)
            # Of these packages one file each is wanted, not the machine-learning stacks that they depend on.
            options = ["--no-deps"] if extra in ("data", "text") else pinned
            self.step(f"requirements for {extra}", repr((wanted, TORCH)), [*options, *wanted])
        if networks:
            # torchvision 0.15 belongs to torch 2.0, and so on up; a build for another torch would replace ours.
            vision = f"torchvision==0.{int(TORCH.split('.')[1]) + 15}.*"
            self.step("timm and torchvision (optional)", TORCH, [*pinned, "timm", vision], required=False)
            self.step("transformers (optional)", TORCH, [*pinned, "transformers"], required=False)
            self.step("peft (optional)", TORCH, [*pinned, "peft"], required=False)


def finetune(arguments: list[str]) -> None:
    if arguments not in (["-h"], ["--help"]):
        print("Set-up: .venv beside quickstart.py; a second run skips what is done.", flush=True)
    Setup().prepare(["cli", "models", "data"], networks=False)
    trady = VENV / "bin" / "trady"
    os.execv(trady, [str(trady), "finetune", *arguments])


def test(arguments: list[str]) -> None:
    slow = "--slow" in arguments
    arguments = [a for a in arguments if a != "--slow"]
    Setup().prepare(["cli", "models", "data", "text", "test"], networks=True)
    folders = (ROOT / "csrc", ROOT / "tests" / "cpp", ROOT / "tests" / "cuda_on_host")
    found = sorted(
        path for folder in folders for ending in ("h", "cpp", "cu") for path in folder.rglob(f"*.{ending}")
    )
    sources = [str(path.relative_to(ROOT)) for path in found]
    checks = (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        ["clang-format", "--dry-run", "--Werror", *sources],
    )
    failed = []
    for tool, *options in () if slow else checks:
        print(f"{' '.join([tool, *options[:2]])} ...", end=" ", flush=True)
        done = subprocess.run([VENV / "bin" / tool, *options], cwd=ROOT, capture_output=True, text=True)
        print("failed" if done.returncode else "passed", flush=True)
        if done.returncode:
            failed.append(tool)
            print(done.stdout + done.stderr, flush=True)
    if failed:
        print(f"failed before the tests: {', '.join(failed)}", flush=True)
    code = subprocess.run(
        [PYTHON, "-m", "pytest", *WORKERS, *(["-m", "slow"] if slow else []), *arguments], cwd=ROOT
    ).returncode
    # 5: no test was selected, which a stage of slow tests may well be.
    sys.exit(bool(failed) or (0 if slow and code == 5 else code))


def checked(command: list[str | Path], **environment: str) -> None:
    """Run ``command`` in view; stop with its exit code where it fails."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code:
        sys.exit(code)


def preloaded(name: str) -> str:
    """Path of a library that Python has to load first where extensions were built with a sanitizer."""
    asked = [compiler() or "c++", f"-print-file-name={name}"]
    try:
        path = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        path = ""
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {asked[0]} has no {name}; install g++ with its sanitizers, or name another CXX")
    return path


def sanitize(arguments: list[str]) -> None:
    libraries = [preloaded("libasan.so"), preloaded("libstdc++.so")]
    Setup().prepare(["cli", "models", "data", "test"], networks=False)
    build, site = ROOT / "build" / "sanitized", ROOT / "build" / "sanitized-site"
    shutil.rmtree(site, ignore_errors=True)
    # Of this CPU's sets the first and the last: those between are the same files with fewer options, minutes of compiling each.
    code = "from trady_kernels import _C; print(*_C.available_isas())"
    found = subprocess.run([PYTHON, "-c", f"import torch; {code}"], cwd=ROOT, capture_output=True, text=True)
    sets = [isa for isa in found.stdout.split() if isa != "baseline"]
    checked(
        [PYTHON, "setup.py", "-q", "build", "--build-lib", site],
        TRADY_SANITIZE="1",
        TRADY_CUDA="0",
        TRADY_ISAS=";".join(dict.fromkeys([*sets[:1], *sets[-1:]])),
    )
    checked([build / "trady_tests"])
    stems = sorted({path.name.partition(".")[0] for path in (ROOT / "csrc" / "cpu").iterdir()})
    tests = [path for stem in stems if (path := ROOT / "tests" / f"test_{stem}.py").exists()]
    # Leaks are those of Python and torch. Not python -m pytest: it would import the package of this folder. A sanitizer
    # ends the process, and a report that pytest had captured would be lost.
    checked(
        [VENV / "bin" / "pytest", "--capture=sys", *WORKERS, *(arguments or ["-q"]), *tests],
        PYTHONPATH=str(site),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


#: The emulated CPU that each instruction set is tried on.
ARM_CPUS = {
    "baseline": "cortex-a72",
    "neon_bf16": "max,sve-default-vector-length=16",
    "sve256": "max,sve-default-vector-length=32",
}


def arm(arguments: list[str]) -> None:
    if arguments:
        sys.exit(f"arm: got {' '.join(arguments)!r}, expected no arguments")
    missing = [name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"arm: {' and '.join(missing)} not found; install the cross compiler and the emulator "
            "(Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user) and run this again"
        )
    Setup().tools()
    cmake, folder = VENV / "bin" / "cmake", ROOT / "build" / "aarch64"
    ninja = f"-DCMAKE_MAKE_PROGRAM={VENV / 'bin' / 'ninja'}"
    toolchain = ROOT / "tests" / "cpp" / "aarch64.cmake"
    options: list[str | Path] = ["-G", "Ninja", ninja, "--toolchain", toolchain, "-DTRADY_TESTS=ON"]
    checked([cmake, "-S", ROOT, "-B", folder, *options])
    checked([cmake, "--build", folder])
    for isa, cpu in ARM_CPUS.items():
        checked(["qemu-aarch64", "-cpu", cpu, folder / "trady_tests", isa])


COMMANDS = {"finetune": finetune, "test": test, "sanitize": sanitize, "arm": arm}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit("quickstart.py: interrupted; run the same command again to go on")
