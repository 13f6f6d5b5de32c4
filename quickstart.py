"""Sets everything up in .venv beside this file, then runs one command. Standard library only.

    python3 quickstart.py finetune [arguments of trady finetune]
    python3 quickstart.py test [--slow] [arguments of pytest]

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


def requirements(name: str) -> list[str]:
    """The list ``name`` of pyproject.toml, the one place where requirements are written down."""
    found = re.search(
        rf"^{name} = (\[.*?\])$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"pyproject.toml has no list {name}"
    return list(ast.literal_eval(found.group(1)))


def build_inputs() -> str:
    """Digest of everything that the build of the package depends on."""
    digest = hashlib.sha256(
        repr([os.environ.get(k) for k in ("TRADY_CUDA", "TRADY_CUDA_ARCHS", "CXX")]).encode()
    )
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

    def prepare(self, extras: list[str], networks: bool) -> None:
        """Everything installed: torch, the package, and the requirements of ``extras``."""
        if not re.fullmatch(r"\d+\.\d+\.\d+\S*", TORCH):
            sys.exit(f"TRADY_TORCH: got {TORCH!r}, expected a version such as 2.13.0")
        self.environment()
        self.step(f"torch {TORCH}", TORCH, [f"torch=={TORCH}", "numpy"])
        pinned = [f"torch=={TORCH}"]
        tools = [r for r in requirements("requires") if not r.startswith("torch")]
        self.step("build tools", repr(tools), [*tools, "wheel"])
        installed = list((ROOT / "trady_kernels" / "_lib").glob("build.json"))
        if not installed:
            self.done.pop("trady_kernels", None)
        self.step(
            "trady_kernels", f"{build_inputs()} {TORCH}", ["--no-build-isolation", "--no-deps", "-e", "."]
        )
        for extra in extras:
            wanted = requirements(extra)
            # Of the data package one table is wanted, not the machine-learning stack that it depends on.
            options = ["--no-deps"] if extra == "data" else pinned
            self.step(f"requirements for {extra}", repr((wanted, TORCH)), [*options, *wanted])
        if networks:
            # torchvision 0.15 belongs to torch 2.0, and so on up; a build for another torch would replace ours.
            vision = f"torchvision==0.{int(TORCH.split('.')[1]) + 15}.*"
            self.step("timm and torchvision (optional)", TORCH, [*pinned, "timm", vision], required=False)
            self.step("transformers (optional)", TORCH, [*pinned, "transformers"], required=False)


def finetune(arguments: list[str]) -> None:
    if arguments not in (["-h"], ["--help"]):
        print("Set-up: .venv beside quickstart.py; a second run skips what is done.", flush=True)
    Setup().prepare(["cli", "models", "data"], networks=False)
    trady = VENV / "bin" / "trady"
    os.execv(trady, [str(trady), "finetune", *arguments])


def test(arguments: list[str]) -> None:
    slow = "--slow" in arguments
    arguments = [a for a in arguments if a != "--slow"]
    Setup().prepare(["cli", "models", "data", "test"], networks=True)
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*")) if p.is_file()]
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
        [PYTHON, "-m", "pytest", *(["-m", "slow"] if slow else []), *arguments], cwd=ROOT
    ).returncode
    # 5: no test was selected, which a stage of slow tests may well be.
    sys.exit(bool(failed) or (0 if slow and code == 5 else code))


COMMANDS = {"finetune": finetune, "test": test}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit("quickstart.py: interrupted; run the same command again to go on")
