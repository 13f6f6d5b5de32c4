"""Cells of a study: what is kept when one fails, when the whole process is killed, and when some are there already."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from image_folders import write_images

from trady_kernels.study.cells import CellFile, Listed, run_cells
from trady_kernels.training.settings import Settings

RECIPES = {"mnist": Settings(threads=1)}
PROVENANCE = {"command": "trady study", "commit": None, "versions": {}}


@dataclass(frozen=True)
class Number:
    """A cell.

    Attributes:
        task: name of its recipe.
        value: what it is about.
    """

    task: str
    value: int


@dataclass(frozen=True)
class Root:
    """Its outcome.

    Attributes:
        value: what came of it.
        provenance: index of what it was made with.
    """

    value: float
    provenance: int = 0


def plan_of(count: int, train: Callable[[Number, Settings], Root]) -> Listed[Number, Root]:
    cells = tuple(Number("mnist", value) for value in range(count))
    return Listed(RECIPES, cells, (Number, Root), train, lambda cell, outcome: str(cell.value))


def opened(path: Path) -> CellFile[Number, Root]:
    cells: CellFile[Number, Root] = CellFile(path, (Number, Root), RECIPES)
    cells.begin(PROVENANCE)
    return cells


def test_what_ran_beside_a_cell_that_fails_is_kept(tmp_path: Path) -> None:
    begun = threading.Event()

    def train(cell: Number, recipe: Settings) -> Root:
        if cell.value == 0:
            begun.wait(10)
            raise ValueError("no root")
        begun.set()
        time.sleep(0.2)
        return Root(math.sqrt(cell.value))

    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="no root"):
        run_cells(plan_of(5, train), opened(tmp_path / "cells.json"), executor, 2, lambda *told: None)
    kept: CellFile[Number, Root] = CellFile(tmp_path / "cells.json", (Number, Root))
    assert [cell.value for cell in kept] == [1]


def test_cells_that_are_there_are_told_before_the_first_one_ends(tmp_path: Path) -> None:
    """So that a progress bar knows what is left, whatever their order."""
    cells = opened(tmp_path / "cells.json")
    cells.add(Number("mnist", 3), Root(1.7))
    told: list[tuple[int, bool]] = []
    with ThreadPoolExecutor(1) as executor:
        run_cells(
            plan_of(4, lambda cell, recipe: Root(float(cell.value))),
            cells,
            executor,
            1,
            lambda cell, outcome, fresh: told.append((cell.value, fresh)),
        )
    assert told == [(3, False), (0, True), (1, True), (2, True)]


def test_no_number_is_written_that_json_has_none_for(tmp_path: Path) -> None:
    cells = opened(tmp_path / "cells.json")
    with pytest.raises(ValueError, match="JSON"):
        cells.add(Number("mnist", 0), Root(math.nan))
    assert not (tmp_path / "cells.json").exists()


def _runs(path: Path) -> int:
    return len(json.loads(path.read_text())["cells"]) if path.exists() else 0


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="lists the children of a process in /proc")
def test_a_killed_study_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """By SIGKILL, with two trainings at a time, which end with it; what was random in one run is not in the other."""
    write_images(tmp_path / "pets", {"cats": 300, "dogs": 300})
    task = f"mobilenet_v2_w035 on {tmp_path / 'pets'}"
    whole, parts = tmp_path / "whole" / "resampling.json", tmp_path / "parts" / "resampling.json"

    def command(folder: Path) -> list[str]:
        arguments = ["study", "resampling", "--quick", "--task", task, "--jobs", "2", "--output", str(folder)]
        return [sys.executable, "-m", "trady_kernels.cli", *arguments]

    killed = subprocess.Popen(command(parts.parent), stdout=subprocess.DEVNULL)
    children: list[int] = []
    try:
        while not _runs(parts):
            assert killed.poll() is None
            time.sleep(0.02)
        children = [
            int(child)
            for task_of in Path(f"/proc/{killed.pid}/task").iterdir()
            for child in (task_of / "children").read_text().split()
        ]
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    done = _runs(parts)
    deadline = time.monotonic() + 60
    while any(map(_is_there, children)):
        assert time.monotonic() < deadline, "workers go on without their parent"
        time.sleep(0.1)
    for folder in (parts.parent, whole.parent):
        subprocess.run(command(folder), check=True, stdout=subprocess.DEVNULL)
    contents = [json.loads(path.read_text()) for path in (whole, parts)]
    assert 0 < done < len(contents[0]["cells"]) and children
    for content in contents:
        for row in content["cells"]:
            for timing in ("seconds", "step_ms", "provenance"):
                del row["outcome"][timing]
    assert contents[0]["cells"] == contents[1]["cells"]
