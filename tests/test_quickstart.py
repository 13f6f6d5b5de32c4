"""The set-up behind the two commands: what is done once, and what an interruption leaves."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with an environment of its own, in which pip only notes what it was asked for."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name, path in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "stamp.json",
        "LOG": venv / "log",
    }.items():
        monkeypatch.setattr(module, name, path)
    module.calls = []
    module.answer = 0

    def run(self: object, command: list[str | Path]) -> int:
        module.calls.append(list(map(str, command[5:])))
        if module.answer < 0:
            raise KeyboardInterrupt
        return module.answer

    monkeypatch.setattr(module.Setup, "run", run)
    return module


def test_requirements_are_those_of_pyproject(quickstart: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert quickstart.requirements("requires") == project["build-system"]["requires"]
    for extra, wanted in project["project"]["optional-dependencies"].items():
        assert quickstart.requirements(extra) == wanted


def test_a_step_is_done_once_for_the_same_inputs(quickstart: ModuleType) -> None:
    for inputs in ("a", "a", "b"):
        quickstart.Setup().step("torch", inputs, ["torch"])
    assert quickstart.calls == [["torch"], ["torch"]]


def test_a_step_that_fails_is_not_believed(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.answer = 1
    quickstart.LOG.write_text("ERROR: no space left on device\n")
    with pytest.raises(SystemExit, match=r"quickstart\.py: the step 'torch' failed; the whole output is in"):
        quickstart.Setup().step("torch", "a", ["torch"])
    quickstart.answer = 0
    setup = quickstart.Setup()
    assert setup.done == {}
    setup.step("torch", "a", ["torch"])
    assert len(quickstart.calls) == 2


def test_an_optional_step_may_fail_and_is_not_tried_again(quickstart: ModuleType) -> None:
    quickstart.answer = 1
    for _ in range(2):
        quickstart.Setup().step("timm", "a", ["timm"], required=False)
    assert len(quickstart.calls) == 1


def test_a_killed_set_up_starts_anew(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = quickstart.Setup()
    setup.environment()
    quickstart.answer = -1
    with pytest.raises(KeyboardInterrupt):
        setup.step("torch", "a", ["torch"])
    made = []
    monkeypatch.setattr(
        quickstart.subprocess,
        "run",
        lambda command, **_: made.append(command) or quickstart.VENV.mkdir() or done(0),
    )
    setup = quickstart.Setup()
    assert setup.done["running"] == "torch"
    setup.environment()
    assert len(made) == 1 and list(setup.done) == ["environment"]


def done(code: int) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", "No module named ensurepip\n")


def test_missing_ensurepip_is_one_sentence(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "VENV", quickstart.VENV.parent / "none")
    monkeypatch.setattr(quickstart, "PYTHON", quickstart.VENV / "bin" / "python")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: done(1))
    with pytest.raises(
        SystemExit, match=r"No module named ensurepip\nquickstart\.py: .* apt install python3-venv"
    ):
        quickstart.Setup().environment()


def test_an_environment_of_ones_own_is_kept(quickstart: ModuleType) -> None:
    quickstart.Setup().environment()
    assert quickstart.PYTHON.exists() and "environment" in quickstart.Setup().done


def test_the_build_depends_on_its_sources(quickstart: ModuleType, tmp_path: Path) -> None:
    for name in ("setup.py", "CMakeLists.txt"):
        (tmp_path / name).touch()
    (tmp_path / "csrc").mkdir()
    digests = [quickstart.build_inputs()]
    (tmp_path / "csrc" / "new.cpp").touch()
    digests.append(quickstart.build_inputs())
    (tmp_path / "csrc" / "new.cpp").write_text("int x;")
    digests.append(quickstart.build_inputs())
    assert len(set(digests)) == 3


def test_the_build_depends_on_the_compilers_there_are(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("setup.py", "CMakeLists.txt"):
        (tmp_path / name).touch()
    for name in ("CXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    digests = [quickstart.build_inputs()]
    for program in ("bin/clang++", "bin/c++", "cuda/bin/nvcc"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(0o755)
        digests.append(quickstart.build_inputs())
    (tmp_path / "bin" / "g++").touch(0o755)  # c++ is taken as before
    assert len(set(digests)) == 4 and quickstart.build_inputs() == digests[-1]


def test_arm_says_what_to_install(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: None)
    sentence = (
        r"arm: aarch64-linux-gnu-g\+\+ and qemu-aarch64 not found; .*apt-get install g\+\+-aarch64-linux-gnu"
    )
    with pytest.raises(SystemExit, match=sentence):
        quickstart.arm([])
    with pytest.raises(SystemExit, match="arm: got '--slow', expected no arguments"):
        quickstart.arm(["--slow"])


def test_sanitize_says_what_is_missing(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler answers with the bare name where it has no such library."""
    answer = subprocess.CompletedProcess([], 0, "libasan.so\n", "")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(SystemExit, match=r"sanitize: .* has no libasan\.so; install g\+\+"):
        quickstart.sanitize([])


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["dance"], 2), (["--help"], 0)], ids=str)
def test_usage(arguments: list[str], code: int) -> None:
    ran = subprocess.run([sys.executable, ROOT / "quickstart.py", *arguments], capture_output=True, text=True)
    assert ran.returncode == code and "quickstart.py finetune" in ran.stdout
