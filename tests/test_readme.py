"""What README.md shows works, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trady_kernels.cli import COMMANDS
from trady_kernels.selection import SCHEMES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PROGRAMS = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith("import")
]


@pytest.fixture
def schemes_kept() -> Iterator[None]:
    """A program may add a scheme of its own, for itself alone."""
    before = dict(SCHEMES)
    yield
    SCHEMES.clear()
    SCHEMES.update(before)


@pytest.mark.usefixtures("schemes_kept")
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_print_what_they_say(program: str) -> None:
    promised = re.findall(r"^print\(.*\)  +# (.*)$", program, re.MULTILINE)
    assert promised
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == promised


def test_every_command_is_described() -> None:
    assert all(f"| `trady {name}` |" in README for name in COMMANDS)


def test_both_commands_of_quickstart_are_there() -> None:
    assert "python3 quickstart.py finetune" in README and "python3 quickstart.py test" in README
