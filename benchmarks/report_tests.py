"""A plugin of pytest for benchmarks/gpu.py: what became of each test, written down as it ends.

pytest -p report_tests --report-to FILE   a line of JSON a test, so that a run that is killed leaves what it had
pytest -p report_tests --only kernels     tests of operators and tests that need a GPU; launches: those alone that
                                          launch kernels of ours
pytest -p report_tests --seconds N        in random order, those that have not begun after N seconds skipped
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

OPERATORS = Path(__file__).parent.parent / "trady_kernels" / "ops"
#: Fixtures of tests/conftest.py that name the device which kernels run on.
DEVICES = {"cuda_device", "triton_device"}
#: Lines of an error that are kept.
MOST_LINES = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("report_tests")
    group.addoption("--report-to", type=Path, metavar="FILE")
    group.addoption("--only", choices=["kernels", "launches"])
    group.addoption("--seconds", type=float, metavar="N")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Chosen(config.getoption("only"), config.getoption("seconds")))
    path = config.getoption("report_to")
    # Workers of pytest-xdist hand their reports on to the process that began them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        config.pluginmanager.register(LostContext())
    elif path is not None:
        config.pluginmanager.register(Reports(path))


class Chosen:
    """Which tests run, and for how long."""

    def __init__(self, only: str | None, seconds: float | None) -> None:
        self.only, self.seconds = only, seconds
        self.started = time.monotonic()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.only is not None:
            wanted = _about_kernels if self.only == "kernels" else _launches
            left_out = [item for item in items if not wanted(item)]
            items[:] = [item for item in items if wanted(item)]
            config.hook.pytest_deselected(items=left_out)
        if self.seconds is not None:
            random.Random(0).shuffle(items)

    def pytest_runtest_setup(self) -> None:
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            pytest.skip(f"not begun after {self.seconds:g} s")


def _launches(item: pytest.Item) -> bool:
    return bool(DEVICES.intersection(getattr(item, "fixturenames", ())))


def _about_kernels(item: pytest.Item) -> bool:
    of_operator = (OPERATORS / item.path.stem.removeprefix("test_")).is_dir()
    return of_operator or _launches(item) or item.get_closest_marker("gpu") is not None


class Reports:
    """A line for each test, and for each file that could not be collected."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(report, "failed" if report.when == "call" else "error", _first_lines(report))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self._write(report, "skipped", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self._write(report, "passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, "error", _first_lines(report))

    def _write(self, report: pytest.TestReport | pytest.CollectReport, outcome: str, message: str) -> None:
        found = {"test": report.nodeid, "outcome": outcome, "message": message}
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()


class LostContext:
    """Ends a worker of pytest-xdist whose process can no longer use the GPU: a fresh one takes its place.

    After an illegal access every later call of the same process fails, and with it tests that are right.
    """

    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)
        self.failed = False


def _first_lines(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What an assertion or exception says, which pytest marks; otherwise the end of the whole."""
    lines = report.longreprtext.splitlines()
    said = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return "\n".join(said[:MOST_LINES] or lines[-MOST_LINES:])
