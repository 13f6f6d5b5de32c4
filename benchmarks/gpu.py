"""Everything that only a machine with an NVIDIA GPU can say: build, tests, benchmarks, goals, in under 8 minutes.

Each stage is a process under a time limit of its own; what a stage does not use goes to those after it. A stage that
fails, hangs or lacks a tool is written down with its reason, and the next one runs. The summary is written anew after
each, so that a run that is killed leaves what it had. Nothing is installed or fetched: the extension is built in
place, and the package is used from this checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package may not be installed, and what is installed may be older
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # that nothing is compiled: the first stage sees to it
    import training_step

    from trady_kernels.atomic_write import write_atomically, write_json
    from trady_kernels.benchmark import goals
    from trady_kernels.benchmark.report import conditions

EPILOG = """\
examples:
  python benchmarks/gpu.py --out gpu-results
  python benchmarks/gpu.py --out gpu-results --stage build --stage tests --limit 2"""

#: Seconds that a stage at its limit has from the interrupt to the end of all its processes.
GRACE = 3.0
#: Bytes of a stage's output that logs.txt keeps of its start and of its end.
LOG_HEAD, LOG_TAIL = 1 << 18, 3 << 18
MOST_FAILURES, MOST_REASONS, TAIL_LINES = 40, 10, 25


@dataclass(frozen=True)
class Stage:
    """A process of a run.

    Attributes:
        name: on the command line and in the summary.
        command: with ``{python}``, ``{folder}`` (for what it writes) and the names of :func:`places`.
        limit: seconds, all its processes' end included.
        programs, modules: what must be on PATH or in the toolkit, and what Python must be able to import.
        environment: on top of this process's.
        beside: the stage that it runs at the same time as.
        instead_of: the stage that must not have passed.
        kept_in: file of the results, without its suffix, that its JSON is kept in under its name.
        plots: of the PNGs that it writes, whose name has this in it is kept.
        reports: whether it runs tests and writes down what became of them.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: str | None = None
    instead_of: str | None = None
    kept_in: str | None = None
    plots: str | None = None
    reports: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "passed", "failed", "skipped" or "not run", why, and after how long."""

    stage: str
    status: str = "not run"
    reason: str = ""
    seconds: float = 0.0


# ---- the stages ---------------------------------------------------------------------------------------------

_BUILD = ("{python}", "setup.py", "-q", "build_ext", "--inplace")
#: A file that cannot be imported stops no other.
PYTEST = (
    *("{python}", "-m", "pytest", "-q", "-p", "report_tests", "-p", "no:cacheprovider"),
    "--continue-on-collection-errors",
)
_TRADY = ("{python}", "-m", "trady_kernels.cli")
_BENCH = (*_TRADY, "bench", "--device", "cuda", "--rounds", "5")
_JSON = ("--json", "{folder}/{name}.json")
_GPU_SETTINGS = (
    *("--device", "cuda", "--batch-size", "128", "--image-size", "224", "--autocast", "bfloat16"),
    *("--format", "channels_last", "--contender", training_step.FIVE_PERCENT),
)
STEP_NETWORKS = ("ResNet-50", "MobileNetV2")


def _tests(limit: float) -> Stage:
    command: tuple[str, ...] = (*PYTEST, "-o", "faulthandler_timeout=60")
    if importlib.util.find_spec("xdist") is None:
        command += ("--only", "kernels")  # one process would not get through the whole suite
    else:
        command += ("-n", "{workers}", "--dist", "worksteal")
    command += ("--report-to", "{folder}/{name}.tests")
    return Stage("tests", command, limit, modules=("pytest",), reports=True)


def _sanitizer(tool: str, seconds: int, limit: float) -> Stage:
    """Some of the tests that launch kernels, as many as there is time for, under one of the toolkit's checkers."""
    checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no")
    processes = (
        "--target-processes",
        "application-only",
    )  # a test's own may fail a device assertion on purpose
    tests = ("--only", "launches", "--seconds", str(seconds), "--report-to", "{folder}/{name}.tests")
    return Stage(
        tool,
        (*checker, *processes, *PYTEST, *tests),
        limit,
        programs=("compute-sanitizer",),
        modules=("pytest",),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        beside="tests",
        reports=True,
    )


def _step(name: str, network: str, limit: float, *arguments: str, **changes: Any) -> Stage:
    command = ("{python}", "benchmarks/training_step.py", "--network", network, *_GPU_SETTINGS, *arguments)
    needs = ("torchvision", *(("triton",) if "--compile" in arguments else ()))
    return Stage(name, (*command, *_JSON), limit, modules=needs, **changes)


def _steps(compiled: bool, limit: float, *arguments: str, **changes: Any) -> Iterator[Stage]:
    for network in STEP_NETWORKS:
        options = ("--contender", training_step.FULL, *(("--compile",) if compiled else ()), *arguments)
        yield _step(
            _step_name(network, compiled), network, limit, *options, kept_in="training_step", **changes
        )


def _step_name(network: str, compiled: bool) -> str:
    return f"{network}{' compiled' if compiled else ''}"


def table() -> tuple[Stage, ...]:
    """The stages in order. Those that run beside one another measure nothing: timed ones are alone."""
    plot = ("--plot", "{folder}/{name}.png") if importlib.util.find_spec("matplotlib") else ()
    float32 = ("--dtype", "float32", "--operator")
    return (
        Stage(
            "build",
            _BUILD,
            75,
            programs=("nvcc", "cmake", "ninja"),
            modules=("pybind11", "setuptools"),
            environment={"TRADY_CUDA": "1"},
        ),
        Stage(
            "build without CUDA",
            _BUILD,
            20,
            programs=("cmake", "ninja"),
            modules=("pybind11", "setuptools"),
            environment={"TRADY_CUDA": "0"},
            instead_of="build",
        ),
        _tests(90),
        Stage("doctor", (*_TRADY, "doctor", *_JSON), 60, modules=("rich",), beside="tests", kept_in="doctor"),
        _sanitizer("memcheck", 45, 90),
        _sanitizer("racecheck", 45, 90),
        # Fills torch.compile's cache: to compile a network takes far longer than to time its steps.
        *(
            _step(
                f"compile {network}",
                network,
                90,
                *("--contender", training_step.FULL, "--compile", "--rounds", "1"),
                beside="tests",
            )
            for network in STEP_NETWORKS
        ),
        Stage(
            "operators",
            (
                *_BENCH,
                "--format",
                "channels_last",
                "--dtype",
                "bfloat16",
                "--selected",
                "1,4,16",
                *plot,
                *_JSON,
            ),
            70,
            modules=("rich",),
            kept_in="operators",
            plots="conv2d_channel_grad",
        ),
        Stage(
            "input gradient",
            ("{python}", "benchmarks/conv2d_input_grad.py", "--device", "cuda", *_JSON),
            15,
            modules=("triton",),
            kept_in="operators",
        ),
        *_steps(False, 30),
        Stage(
            "operators float32",
            (*_BENCH, *float32, "conv2d_channel_grad", "--selected", "1,16", *_JSON),
            35,
            modules=("rich",),
            kept_in="operators",
        ),
        Stage(
            "linear float32",
            (*_BENCH, *float32, "linear_channel_grad", "--selected", "1,4,16", *_JSON),
            10,
            modules=("rich",),
            kept_in="operators",
        ),
        _step("profile", "ResNet-50", 20, "--rounds", "1", "--profile", "15", kept_in="training_step"),
        # Last, with all the time that others have left: each traces its networks anew, which nothing caches.
        *_steps(True, 40),
    )


def together(stages: Iterable[Stage]) -> list[list[Stage]]:
    """The stages in turn, those that run at the same time in one list."""
    turns: dict[str, list[Stage]] = {}
    for stage in stages:
        turns.setdefault(stage.beside or stage.name, []).append(stage)
    return list(turns.values())


def longest(stages: Iterable[Stage]) -> float:
    """Seconds after which the last of the stages has ended, whatever they do."""
    return sum(max(stage.limit for stage in turn) for turn in together(stages))


# ---- running ------------------------------------------------------------------------------------------------


def search_path() -> str:
    """PATH, with this Python's programs before it and the CUDA toolkit's behind."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.pathsep.join(
        [sysconfig.get_path("scripts"), os.environ.get("PATH", ""), str(Path(home, "bin"))]
    )


def places() -> dict[str, str]:
    """What stands for what in all commands."""
    # Some cores are left to what runs beside the tests.
    return {"python": sys.executable, "workers": str(max(1, min((os.cpu_count() or 1) - 6, 12)))}


def stage_environment(cuda_archs: str | None) -> dict[str, str]:
    """Of every stage: this process's, with the checkout to import from and the GPU that is there to compile for."""
    inherited = os.environ.get("PYTHONPATH")
    folders = [str(ROOT), str(ROOT / "benchmarks"), *([inherited] if inherited else [])]
    found = {
        **os.environ,
        "PATH": search_path(),
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
    }
    found.pop("TRITON_INTERPRET", None)
    return found if cuda_archs is None else {**found, "TRADY_CUDA_ARCHS": cuda_archs}


def lacking(stage: Stage) -> str | None:
    """What a stage needs and does not find here, in a few words."""
    path = search_path()
    missing = [
        *(f"{name} is not on PATH" for name in stage.programs if shutil.which(name, path=path) is None),
        *(f"{name} is not installed" for name in stage.modules if importlib.util.find_spec(name) is None),
    ]
    return "; ".join(missing) or None


class Process:
    """A stage that runs, in a process group of its own."""

    def __init__(self, stage: Stage, folder: Path, environment: Mapping[str, str], limit: float) -> None:
        self.stage, self.limit = stage, limit
        self.log = folder / f"{stage.name}.log"
        self.command = [part.format(**places(), folder=folder, name=stage.name) for part in stage.command]
        self.command[0] = shutil.which(self.command[0], path=environment["PATH"]) or self.command[0]
        self.started = time.monotonic()
        self._interrupted = False
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**environment, **stage.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def outcome(self) -> Outcome | None:
        """What became of it; None while it runs. Ends it at its limit."""
        code = self._process.poll()
        if code is None:
            if self.seconds < self.limit - min(GRACE, self.limit / 2):
                return None
            if not self._interrupted:  # Python then says where it was
                self._interrupted = True
                self._signal(signal.SIGINT)
            if self.seconds < self.limit:
                return None
        self.end()
        if self._interrupted:
            return self._found("failed", f"stopped at its limit of {self.limit:.0f} s")
        if code == 0:
            return self._found("passed", "")
        words = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        lines = tail(self.log, 1)
        return self._found("failed", f"{words}: {lines[0].strip()[:200]}" if lines else words)

    def end(self) -> None:
        """End every process of the group, those that outlived the first one too."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _found(self, status: str, reason: str) -> Outcome:
        return Outcome(self.stage.name, status, reason, round(self.seconds, 1))

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody is left
            pass


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a file that say something."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


class Run:
    """Runs stages and keeps what they find in a folder: at most 8 files, none below another folder.

    Args:
        stages: in order.
        out: folder of the results.
        facts: of the machine.
        environment: of every stage.
        scale: of all limits.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        out: Path,
        facts: Mapping[str, Any],
        environment: Mapping[str, str],
        scale: float = 1.0,
    ) -> None:
        self.stages, self.out, self.facts, self.environment, self.scale = (
            stages,
            out,
            facts,
            environment,
            scale,
        )
        self.outcomes = {stage.name: Outcome(stage.name) for stage in stages}
        self.results: dict[str, dict[str, Any]] = {}
        self.tests: dict[str, dict[str, Any]] = {}
        self.tails: dict[str, list[str]] = {}
        self.logs = b""
        self.interrupted = False

    def __call__(self) -> int:
        """Run all of them; 0 where those that could run passed."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.write_summary()
        planned = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                for turn in together(self.stages):
                    # Nobody ends later than where all before had taken all of their time.
                    spare = max(0.0, planned - time.monotonic())
                    planned += self.scale * max(stage.limit for stage in turn)
                    self._turn(turn, Path(folder), spare)
            except KeyboardInterrupt:
                self.interrupted = True
                self.write_summary()
                print(f"interrupted; what there was is in {self.out}", flush=True)
                return 130
        failed = [outcome.stage for outcome in self.outcomes.values() if outcome.status == "failed"]
        print(f"{len(failed)} of {len(self.stages)} stages failed; see {self.out / 'summary.md'}", flush=True)
        return 1 if failed else 0

    def _turn(self, stages: Sequence[Stage], folder: Path, spare: float) -> None:
        running: list[Process] = []
        try:
            for stage in stages:
                reason = self._reason_to_skip(stage)
                if reason is not None:
                    self._record(Outcome(stage.name, "skipped", reason))
                    continue
                try:
                    limit = stage.limit * self.scale + spare
                    running.append(Process(stage, folder, self.environment, limit))
                except OSError as error:
                    self._record(Outcome(stage.name, "failed", str(error)))
            while running:
                time.sleep(0.02)
                for process in list(running):
                    outcome = process.outcome()
                    if outcome is not None:
                        running.remove(process)
                        self._keep(process, folder)
                        self._record(outcome, process)
        finally:
            for process in running:
                process.end()

    def _reason_to_skip(self, stage: Stage) -> str | None:
        other = self.outcomes.get(stage.instead_of or "")
        if other is not None and other.status == "passed":
            return f"{other.stage} passed"
        return lacking(stage)

    def _keep(self, process: Process, folder: Path) -> None:
        """Take over what a stage wrote."""
        stage = process.stage
        written = folder / f"{stage.name}.json"
        if stage.kept_in is not None and written.exists():
            try:
                content = json.loads(written.read_text(encoding="utf-8"))
            except ValueError:  # cut short
                content = None
            if isinstance(content, dict):
                kept = self.results.setdefault(stage.kept_in, {})
                kept[stage.name] = content
                write_json(self.out / f"{stage.kept_in}.json", kept)
        if stage.plots is not None:
            for plot in sorted(folder.glob(f"{stage.name}*.png")):
                if stage.plots in plot.name:
                    shutil.copyfile(plot, self.out / f"{stage.name}.png")
        if stage.reports:
            self.tests[stage.name] = count_tests(folder / f"{stage.name}.tests")

    def _record(self, outcome: Outcome, process: Process | None = None) -> None:
        self.outcomes[outcome.stage] = outcome
        if process is not None:
            if outcome.status == "failed":
                self.tails[outcome.stage] = tail(process.log, TAIL_LINES)
            content = process.log.read_bytes()
            if len(content) > LOG_HEAD + LOG_TAIL:
                content = content[:LOG_HEAD] + b"\n[...]\n" + content[-LOG_TAIL:]
            title = (
                f"==== {outcome.stage}: {outcome.status} {outcome.reason}\n$ {shlex.join(process.command)}\n"
            )
            self.logs += title.encode() + content + b"\n"
            write_atomically(self.out / "logs.txt", lambda file: file.write(self.logs))
        self.write_summary()
        seconds = f"{outcome.seconds:6.1f} s" if process is not None else f"{'':8}"
        print(f"{outcome.stage:<24}{outcome.status:<8}{seconds}  {outcome.reason}".rstrip(), flush=True)

    def write_summary(self) -> None:
        """Write summary.json and summary.md as of now."""
        content = self.summary()
        write_json(self.out / "summary.json", content)
        text = in_markdown(content)
        write_atomically(self.out / "summary.md", lambda file: file.write(text.encode()))

    def summary(self) -> dict[str, Any]:
        """Everything that was found so far, as JSON takes it."""
        kernels = self.results.get("training_step", {}).get("profile", {}).get("kernels", {})
        return {
            **self.facts,
            "interrupted": self.interrupted,
            "stages": [asdict(outcome) for outcome in self.outcomes.values()],
            "goals": verdicts(self.results),
            "tests": self.tests,
            "kernels": kernels,
            "tails": self.tails,
        }


# ---- what was found -----------------------------------------------------------------------------------------


def count_tests(path: Path) -> dict[str, Any]:
    """Counts by outcome, the tests that failed with what they say, and why tests were skipped, by number."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if not line.endswith("\n"):  # the process was killed as it wrote
            break
        found = json.loads(line)
        counts[found["outcome"]] += 1
        if found["outcome"] == "skipped":
            reasons[found["message"]] += 1
        elif found["outcome"] != "passed" and len(failures) < MOST_FAILURES:
            failures.append({"test": found["test"], "message": found["message"]})
    return {"counts": dict(counts), "failures": failures, "skipped": dict(reasons.most_common(MOST_REASONS))}


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal on a GPU, with the figure where one was measured."""
    found = []
    of_operators = [v for report in results.get("operators", {}).values() for v in report.get("goals", ())]
    for goal in goals.GOALS["cuda"]:
        about = [v for v in of_operators if v["goal"] == goal.text]
        found += [_verdict(v) for v in about] or [
            _not_measured(goal.text, "every format and dtype", goal.bound)
        ]
    of_steps = results.get("training_step", {})
    for network in STEP_NETWORKS:
        for compiled in (False, True):
            measured = of_steps.get(_step_name(network, compiled), {}).get("goals", ())
            rows = f"{network}, torch.compile {'on' if compiled else 'off'}"
            for step_goal in training_step.GOALS["cuda"]:
                about = [v for v in measured if v["goal"] == step_goal.text]
                found += [_verdict(v) for v in about] or [_not_measured(step_goal.text, rows, step_goal.most)]
    return found


def _verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    words = "reached" if found["reached"] else "MISSED"
    return {**{name: found[name] for name in ("goal", "rows", "bound", "figure")}, "verdict": words}


def _not_measured(goal: str, rows: str, bound: float) -> dict[str, Any]:
    return {"goal": goal, "rows": rows, "bound": bound, "figure": None, "verdict": "not measured"}


def in_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as people read it."""
    machine = summary.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    parts = [
        "# On a machine with a GPU" + (" (interrupted)" if summary["interrupted"] else ""),
        _bullets(
            {
                "device": machine.get("name"),
                "driver": summary.get("driver"),
                "versions": versions,
                "nvcc": summary.get("nvcc"),
                "compiled for": summary.get("cuda_archs"),
                "commit": summary.get("commit"),
                "started": summary.get("started"),
            }
        ),
        "## Stages\n\n"
        + _markdown_table(
            ("stage", "outcome", "s", "reason"),
            [(s["stage"], s["status"], f"{s['seconds']:.1f}", s["reason"]) for s in summary["stages"]],
        ),
        "## Goals\n\n"
        + _markdown_table(
            ("goal", "of", "bound", "figure", ""),
            [
                (v["goal"], v["rows"], f"{v['bound']:g}", _figure(v["figure"]), v["verdict"])
                for v in summary["goals"]
            ],
        ),
    ]
    parts += [_tests_in_markdown(name, found) for name, found in summary["tests"].items()]
    for of, kernels in summary["kernels"].items():
        rows = [
            (k["name"][:100], str(k["calls"]), f"{k['microseconds']:.0f}", f"{k['share']:.1%}")
            for k in kernels
        ]
        parts.append(
            f"## Costliest kernels of a step: {of}\n\n"
            + _markdown_table(("kernel", "calls", "us", "share"), rows)
        )
    parts += [
        f"## End of the output of {name}\n\n```\n" + "\n".join(lines) + "\n```"
        for name, lines in summary["tails"].items()
    ]
    return "\n\n".join(parts) + "\n"


def _tests_in_markdown(name: str, found: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()) or "none ran"
    lines = [f"## Tests: {name}", "", counts, ""]
    for failure in found["failures"]:
        lines += [f"* `{failure['test']}`", *(f"      {line}" for line in failure["message"].splitlines())]
    if found["skipped"]:
        lines += ["", "Skipped, the most frequent reasons:", ""]
        lines += [f"* {count} times: {reason}" for reason, count in found["skipped"].items()]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bullets(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"* {name}: {value or 'unknown'}" for name, value in facts.items())


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


# ---- the machine --------------------------------------------------------------------------------------------


def no_gpu() -> str | None:
    """What is missing here, in one sentence."""
    if torch.version.cuda is None:
        return (
            "torch.version.cuda is None, so torch.cuda.is_available() is False: this needs an NVIDIA GPU and a CUDA "
            "build of torch"
        )
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: this needs an NVIDIA GPU and its driver, see nvidia-smi"
    return None


def line_of(*command: str, having: str = "") -> str | None:
    """The first line with this in it that a program prints, or nothing where it is missing or fails."""
    program = shutil.which(command[0], path=search_path())
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if having in line), None)


def machine_facts() -> dict[str, Any]:
    """Command, versions, commit and device, with driver, nvcc and the architecture to compile for."""
    major, minor = torch.cuda.get_device_capability()
    return {
        **conditions("cuda"),
        "driver": line_of("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"),
        "nvcc": line_of("nvcc", "--version", having="release"),
        "cuda_archs": f"{major}{minor}-real",
    }


# ---- command line -------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="of the results: at most 8 files"
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=[stage.name for stage in stages],
        metavar="NAME",
        help=f"only this one, may be repeated: {', '.join(stage.name for stage in stages)}",
    )
    parser.add_argument(
        "--limit", type=float, default=1.0, metavar="SCALE", help="of all time limits (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if not 0 < args.limit < float("inf"):
        parser.error(f"--limit: got {args.limit:g}, expected a number above 0 such as 2")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file, expected a folder")
    return args


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    stages = table()
    args = parse(arguments, stages)
    missing = no_gpu()
    if missing is not None:
        print(f"gpu.py: {missing}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    facts = machine_facts()
    wanted = [stage for stage in stages if not args.stage or stage.name in args.stage]
    print(f"{facts['machine']['name']}: at most {args.limit * longest(wanted):.0f} s", flush=True)
    return Run(wanted, args.out, facts, stage_environment(facts["cuda_archs"]), args.limit)()


if __name__ == "__main__":
    sys.exit(main())
