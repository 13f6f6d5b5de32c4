"""The command for a machine with a GPU, and the training steps that it times: all that can be seen without one."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import training_step
from gpu import Run, Stage

from trady_kernels.cli import COMMANDS, bench, doctor

ROOT = Path(__file__).parent.parent
MACHINE = {"machine": {"name": "a GPU"}, "versions": {"torch": "2"}, "commit": "abc+"}
SHELL = shutil.which("sh")

pytestmark = pytest.mark.skipif(SHELL is None, reason="there is no sh, which the stages of these tests run")


def shell(name: str, script: str, limit: float = 60, **changes: Any) -> Stage:
    return Stage(name, ("sh", "-c", script), limit, **changes)


def run(stages: list[Stage], out: Path) -> tuple[int, dict[str, Any]]:
    code = Run(stages, out, MACHINE, gpu.stage_environment("90-real"))()
    return code, json.loads((out / "summary.json").read_text())


def stage_of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [stage for stage in summary["stages"] if stage["stage"] == name]
    return found


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ---- running stages ---------------------------------------------------------------------------------------------


def test_a_stage_that_fails_hangs_or_lacks_a_tool_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pid = tmp_path / "new" / "out", tmp_path / "pid"
    stages = [
        shell("fails", "echo before; echo what went wrong >&2; exit 3", 0.5),
        shell("hangs", f"trap '' INT; sleep 600 & echo $! > {pid}; echo held up; wait; wait", 2),
        shell("lacks a tool", "true", programs=("no-such-program",)),
        shell("lacks a module", "true", modules=("no_such_module",)),
        shell("leaves a child", f"sleep 600 & echo $! > {pid}.2; exit 0"),
        shell("passes", "echo '{{\"a\": 1}}' > {folder}/{name}.json", kept_in="figures"),
        shell(
            "measures",
            "echo '{{\"b\": 2}}' > {folder}/{name}.json; echo > {folder}/{name}-x.png",
            kept_in="figures",
            plots="x",
        ),
    ]
    code, summary = run(stages, out)
    assert code == 1
    found = {stage["stage"]: (stage["status"], stage["reason"]) for stage in summary["stages"]}
    assert found["fails"] == ("failed", "exit code 3: what went wrong")
    assert found["hangs"][0] == "failed" and found["hangs"][1].startswith("stopped at its limit of 2 s")
    assert found["lacks a tool"] == ("skipped", "no-such-program is not on PATH")
    assert found["lacks a module"] == ("skipped", "no_such_module is not installed")
    assert {found[name] for name in ("leaves a child", "passes", "measures")} == {("passed", "")}
    assert 1 < stage_of(summary, "hangs")["seconds"] < 4
    for file in (pid, Path(f"{pid}.2")):
        wait_for(lambda file=file: not lives(int(file.read_text())))
    assert {file.name for file in out.iterdir()} == {
        *("summary.json", "summary.md", "logs.txt", "figures.json", "measures.png"),
    }
    assert json.loads((out / "figures.json").read_text()) == {"passes": {"a": 1}, "measures": {"b": 2}}
    log = (out / "logs.txt").read_text()
    assert "before\nwhat went wrong" in log and "held up" in log
    text = (out / "summary.md").read_text()
    assert (
        "| fails | failed |" in text and "what went wrong" in text.partition("End of the output of fails")[2]
    )
    assert "* device: a GPU" in text and "* commit: abc+" in text
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [stage.name for stage in stages]
    assert "2 of 7 stages failed" in lines[-1]


def test_all_pass_or_cannot_run(tmp_path: Path) -> None:
    stages = [shell("passes", "true"), shell("lacks a tool", "true", programs=("no-such-program",))]
    assert run(stages, tmp_path)[0] == 0


def test_a_stage_may_take_what_those_before_it_left(tmp_path: Path) -> None:
    stages = [shell("short", "true", 30), shell("long", "sleep 1.5", 0.1)]
    assert run(stages, tmp_path)[0] == 0
    assert run(stages[1:], tmp_path)[0] == 1


def test_stages_run_beside_one_another(tmp_path: Path) -> None:
    meets = "touch {mine}; until [ -e {other} ]; do sleep 0.1; done"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stages = [
        shell("a", meets.format(mine=a, other=b), 30),
        shell("fails", "exit 1", 5, beside="a"),
        shell("b", meets.format(mine=b, other=a), 20, beside="a"),
        shell("after", f"rm {a} {b}", 7),
    ]
    code, summary = run(stages, tmp_path / "out")
    assert code == 1 and [s["status"] for s in summary["stages"]] == ["passed", "failed", "passed", "passed"]
    assert gpu.longest(stages) == 37
    assert gpu.together([stages[3], *stages[1:3]]) == [[stages[3]], stages[1:3]]


@pytest.mark.parametrize(("first", "second"), [("true", "skipped"), ("false", "passed")])
def test_a_stage_in_the_place_of_another(tmp_path: Path, first: str, second: str) -> None:
    stages = [shell("build", first), shell("build less", "true", instead_of="build")]
    assert stage_of(run(stages, tmp_path)[1], "build less")["status"] == second
    assert stage_of(run(stages[1:], tmp_path)[1], "build less")["status"] == "passed"


def test_limits_scale(tmp_path: Path) -> None:
    assert Run([shell("long", "sleep 1", 0.1)], tmp_path, MACHINE, gpu.stage_environment(None), 100)() == 0


def test_stages_import_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = 'echo "$PYTHONPATH $TRADY_CUDA_ARCHS $MORE [$TRITON_INTERPRET]"; pwd'
    stage = shell("says", script, environment={"MORE": "more"})
    assert run([stage], tmp_path)[0] == 0
    expected = f"{ROOT}:{ROOT / 'benchmarks'}:/before 90-real more []\n{ROOT}\n"
    assert expected in (tmp_path / "logs.txt").read_text()


_INTERRUPTED = """
import sys
import gpu
gpu.no_gpu = lambda: None
gpu.machine_facts = lambda: {"machine": {"name": "a GPU"}, "cuda_archs": "90-real"}
stages = (
    gpu.Stage("passes", ("sh", "-c", "true"), 60),
    gpu.Stage("hangs", ("sh", "-c", "echo $$ > " + sys.argv[2] + "; sleep 600"), 60),
    gpu.Stage("never", ("sh", "-c", "true"), 60),
)
gpu.table = lambda: stages
sys.exit(gpu.main(["--out", sys.argv[1]]))
"""


def test_an_interrupted_run_leaves_what_it_had(tmp_path: Path) -> None:
    out, pid = tmp_path / "out", tmp_path / "pid"
    command = [sys.executable, "-c", _INTERRUPTED, str(out), str(pid)]
    environment = gpu.stage_environment(None)
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
        # What a run leaves that nothing warned.
        before = json.loads((out / "summary.json").read_text())
        assert [s["status"] for s in before["stages"]] == ["passed", "not run", "not run"]
        running.send_signal(signal.SIGTERM)
        printed, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130 and "interrupted" in printed
    wait_for(lambda: not lives(int(pid.read_text())))
    after = json.loads((out / "summary.json").read_text())
    assert after["interrupted"] and after["stages"] == before["stages"]
    assert "(interrupted)" in (out / "summary.md").read_text()
    assert not [file for file in out.iterdir() if "partial" in file.name]


def test_without_a_gpu_one_sentence_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert gpu.main(["--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr()
        assert "torch.cuda.is_available() is False" in said.err and said.err.count("\n") == 1
        assert not said.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--out"),
        (("--out", "{file}"), "expected a folder"),
        (("--out", "x", "--limit", "0"), "expected a number above 0"),
        (("--out", "x", "--stage", "nope"), "nope"),
    ],
)
def test_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        gpu.main([part.format(file=tmp_path / "file") for part in arguments])
    assert says in capsys.readouterr().err


# ---- the real stages ----------------------------------------------------------------------------------------------


def test_all_stages_end_within_eight_minutes_and_leave_eight_files() -> None:
    stages = gpu.table()
    assert gpu.longest(stages) < 480
    assert len({stage.name for stage in stages}) == len(stages)
    kept = {stage.kept_in for stage in stages if stage.kept_in}
    assert 3 + len(kept) + sum(stage.plots is not None for stage in stages) <= 8
    assert {stage.instead_of for stage in stages} - {None} <= {stage.name for stage in stages}


def arguments_of(stage: Stage) -> list[str]:
    return [part.format(**gpu.places(), folder="/tmp", name=stage.name) for part in stage.command]


def test_commands_of_the_stages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument is one that the command takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_step.Network, "missing", None)
    for stage in gpu.table():
        command = arguments_of(stage)
        if stage.programs == ("compute-sanitizer",):
            command = command[command.index(sys.executable) :]
        assert command[0] == sys.executable
        if command[1:3] == ["-m", "trady_kernels.cli"]:
            assert command[3] in COMMANDS
            parser = argparse.ArgumentParser()
            {"bench": bench, "doctor": doctor}[command[3]].add_arguments(parser)
            parser.parse_args(command[4:])
        elif command[1] == "benchmarks/training_step.py":
            assert (ROOT / command[1]).exists()
            monkeypatch.setattr(sys, "argv", command[1:])
            settings, _ = training_step.parse()
            assert settings.device == "cuda" and settings.formats == ("channels_last",)
            assert settings.compiled == ("default" if "compile" in stage.name else None)
            assert len(settings.goals) == (0 if stage.name == "profile" else 3)
        elif command[1] in ("setup.py", "benchmarks/conv2d_input_grad.py"):
            assert (ROOT / command[1]).exists()
        else:
            assert command[: len(gpu.PYTEST)] == [sys.executable, *gpu.PYTEST[1:]]


def test_help_of_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "python benchmarks/gpu.py --out" in done.stdout
    for stage in gpu.table():
        assert stage.name in " ".join(done.stdout.split())


_TESTS = """
import pytest
@pytest.fixture
def cuda_device():
    return "cpu"
@pytest.fixture
def broken():
    raise ValueError("no fixture")
def test_right(): pass
def test_wrong(): assert [1] == [2], "one is not two"
def test_launches(cuda_device): pass
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
def test_without_a_fixture(broken): pass
"""


def run_tests(folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "tests"
    environment = {**gpu.stage_environment(None), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # It is no worker, even if this process is one.
    environment.pop("PYTEST_XDIST_WORKER", None)
    subprocess.run(
        [sys.executable, *gpu.PYTEST[1:], "--report-to", file, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
    )
    return gpu.count_tests(file)


def test_tests_are_counted_and_a_file_that_cannot_be_imported_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_of_it.py").write_text(_TESTS)
    (tmp_path / "test_imports.py").write_text("import no_such_module\n")
    found = run_tests(tmp_path)
    assert found["counts"] == {"error": 2, "passed": 2, "failed": 1, "skipped": 1}
    says = {failure["test"]: failure["message"] for failure in found["failures"]}
    assert "no_such_module" in says["test_imports.py"]
    assert says["test_of_it.py::test_wrong"].startswith("AssertionError: one is not two")
    assert "no fixture" in says["test_of_it.py::test_without_a_fixture"]
    assert found["skipped"] == {"not today": 1}
    text = gpu.in_markdown(
        {
            **MACHINE,
            "interrupted": False,
            "stages": [],
            "goals": [],
            "tests": {"tests": found},
            "kernels": {},
            "tails": {},
        }
    )
    assert "2 error, 2 passed, 1 failed, 1 skipped" in text and "`test_of_it.py::test_wrong`" in text
    assert "* 1 times: not today" in text
    assert run_tests(tmp_path, "--only", "launches")["counts"] == {"error": 1, "passed": 1}
    late = run_tests(tmp_path, "--seconds", "0")
    assert late["counts"]["skipped"] == 5 and "passed" not in late["counts"]


def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "tests"
    file.write_text('{"test": "a", "outcome": "passed", "message": ""}\n{"test": "b", "outc')
    assert gpu.count_tests(file)["counts"] == {"passed": 1}
    assert gpu.count_tests(tmp_path / "nothing")["counts"] == {}


# ---- goals --------------------------------------------------------------------------------------------------------


def test_what_was_not_measured_says_so() -> None:
    goals = gpu.verdicts({})
    assert {goal["verdict"] for goal in goals} == {"not measured"} and not any(
        goal["figure"] for goal in goals
    )
    assert (
        len(goals) == len(gpu.goals.GOALS["cuda"]) + 3 * 2 * 2
    )  # steps: figures, networks, compiled and not
    committed = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())["goals"]
    if {goal["verdict"] for goal in committed} == {"not measured"}:
        assert committed == goals, "write gpu.verdicts({}) into benchmarks/results/gpu.json"


def test_goals_take_the_figures_that_were_measured() -> None:
    step = training_step.GOALS["cuda"][0]
    operator = gpu.goals.GOALS["cuda"][0]
    found = gpu.verdicts(
        {
            "operators": {"operators": {"goals": [
                {"goal": operator.text, "rows": "channels_last bfloat16", "figure": 9.0, "bound": operator.bound, "reached": True, "limit": None},
            ]}},
            "training_step": {"ResNet-50 compiled": {"goals": [training_step.verdict(step, "ResNet-50, all of it", 0.61)]}},
        }
    )  # fmt: skip
    assert found[0] == {
        "goal": operator.text,
        "rows": "channels_last bfloat16",
        "bound": operator.bound,
        "figure": 9.0,
        "verdict": "reached",
    }
    (missed,) = [goal for goal in found if goal["verdict"] == "MISSED"]
    assert missed["rows"] == "ResNet-50, all of it" and missed["figure"] == 0.61
    assert sum(goal["verdict"] == "not measured" for goal in found) == len(gpu.verdicts({})) - 2


# ---- training steps -----------------------------------------------------------------------------------------------

SMALL = ("--image-size", "32", "--batch-size", "2", "--rounds", "1", "--threads", "1")
BOTH = ("--contender", training_step.FULL, "--contender", training_step.FIVE_PERCENT)


def train(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    if (reason := training_step.IMAGE_NETWORKS["MobileNetV2"].missing) is not None:
        pytest.skip(reason)
    file = folder / "step.json"
    command = [sys.executable, "benchmarks/training_step.py", *SMALL, *arguments, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=gpu.stage_environment(None), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_a_step_under_autocast_in_one_format(tmp_path: Path) -> None:
    # A network without groups: the profiler reads half a million events of a grouped layer in bfloat16 on a CPU without it.
    options = ("--network", "ResNet-18", "--autocast", "bfloat16", "--format", "channels_last")
    options = (*options, "--profile", "3")
    content, printed = train(tmp_path, *options, *BOTH)
    full, sparse = content["rows"]
    assert [row["contender"] for row in (full, sparse)] == [training_step.FULL, training_step.FIVE_PERCENT]
    assert full["memory_format"] == sparse["memory_format"] == "channels_last"
    assert full["by_kind"]["other"] > 2 * 10_000_000  # the copies of weights that autocast makes
    assert sparse["by_kind"]["activation"] < 0.1 * full["by_kind"]["activation"]
    assert "peak_bytes" not in full and set(content["best_of_full"]) == {
        full["contender"],
        sparse["contender"],
    }
    kernels = content["kernels"][f"{training_step.FULL}, channels_last"]
    assert len(kernels) == 3 and kernels[0]["microseconds"] >= kernels[1]["microseconds"] > 0
    assert 0 < sum(kernel["share"] for kernel in kernels) <= 1
    assert "aten::" in printed and "reached" not in printed and "MISSED" not in printed


@pytest.mark.slow
def test_a_compiled_step(tmp_path: Path) -> None:
    options = ("--network", "MobileNetV2", "--compile", "--format", "channels_last")
    content, _ = train(tmp_path, *options, "--contender", training_step.FIVE_PERCENT)
    (row,) = content["rows"]
    assert row["milliseconds"] > 0 and content["best_of_full"] == {}
    assert row["first_step_seconds"] > row["milliseconds"] / 1e3


def test_a_step_refuses_what_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(says: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["training_step.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            training_step.parse()
        assert says in capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_step.Network, "missing", None)
    refuses("torch.cuda.is_available() is False", "--device", "cuda")
    refuses("expected at least 1", "--rounds", "0")
    monkeypatch.setattr(
        training_step.Network, "missing", "torchvision is not installed: pip install torchvision"
    )
    refuses("got 'ResNet-50', but torchvision is not installed", "--network", "ResNet-50")


class Event:
    """A GPU's event on a clock that steps turn."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_steps_on_a_gpu_are_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def make(name: str, milliseconds: float) -> Callable[[], None]:
        def step() -> None:
            first = not calls or calls[-1] != name
            calls.append(name)
            Event.now += milliseconds + 100 * first  # another contender's caches

        return step

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("|") if calls[-1:] != ["|"] else None)
    steps = {("slow", ""): make("slow", 3.0), ("fast", ""): make("fast", 1.5)}
    times = training_step.between_events(steps, 4)
    assert times == {("slow", ""): pytest.approx(3000), ("fast", ""): pytest.approx(1500)}
    runs = [run.split() for run in " ".join(calls).split("|") if run.split()]
    assert len(runs) == 8 and all(len(run) == training_step.RUN + 1 and len(set(run)) == 1 for run in runs)
    assert {runs[i][0] for i in range(0, 8, 2)} == {"slow", "fast"}


def test_shares_of_full(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        (name, memory_format): training_step.Row(name, memory_format, 1, {}, milliseconds, graph, peak)
        for name, memory_format, milliseconds, graph, peak in (
            (training_step.FULL, "contiguous", 4.0, 3.0, 100),
            (training_step.FULL, "channels_last", 2.0, 1.6, 80),
            (training_step.FIVE_PERCENT, "contiguous", 1.0, 0.9, 40),
            (training_step.FIVE_PERCENT, "channels_last", 3.0, 0.8, 20),
        )
    }
    figures = training_step.Figures(rows, {})
    times = training_step.of_full(figures.best(lambda row: row.milliseconds))
    graph_times = training_step.of_full(figures.best(lambda row: row.graph_milliseconds))
    peaks = training_step.of_full(figures.best(lambda row: row.peak_bytes))
    assert times == {training_step.FULL: 1.0, training_step.FIVE_PERCENT: 0.5}
    assert graph_times == {training_step.FULL: 1.0, training_step.FIVE_PERCENT: 0.5}
    assert peaks == {training_step.FULL: 1.0, training_step.FIVE_PERCENT: 0.25}
    assert training_step.of_full({training_step.FIVE_PERCENT: 1.0}) == {}
    training_step.print_rows(figures)
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0].split("saved MiB")[1].split()
        == "share ms a step of full in a graph of full peak MiB of full".split()
    )
    assert printed[4].split()[5:] == ["0.0", "100.0%", "3.0", "1.50", "0.8", "0.50", "0.0", "0.25"]


def test_a_step_that_cannot_be_captured_leaves_the_other_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    network = training_step.IMAGE_NETWORKS["MobileNetV2"]
    if network.missing is not None:
        pytest.skip(network.missing)
    monkeypatch.setattr(training_step, "captured", refuses)
    monkeypatch.setattr(training_step, "between_events", lambda steps, rounds: dict.fromkeys(steps, 1000.0))
    monkeypatch.setattr(training_step, "held_on_gpu", lambda: 0)
    monkeypatch.setattr(training_step, "peak_on_gpu", lambda step: 7)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: tensor)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **how: module)
    full = training_step.CONTENDERS[:1]
    settings = training_step.Settings(network, "cuda", 2, 64, 1, None, None, ("contiguous",), full)
    (row,) = training_step.measure(settings).rows.values()
    assert (row.milliseconds, row.graph_milliseconds, row.peak_bytes) == (1.0, None, 7)
    assert "stream is capturing" in capsys.readouterr().err
