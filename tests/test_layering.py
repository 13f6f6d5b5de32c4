from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_point_one_way_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contract is in pyproject.toml."""
    cli = pytest.importorskip(
        "importlinter.cli", reason="import-linter is not installed: pip install import-linter"
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    code = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out
