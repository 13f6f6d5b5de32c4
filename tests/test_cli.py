"""The commands that do not train: plan, memory, bench, doctor; and what all commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the commands need the extra 'cli'")

from trady_kernels import cli
from trady_kernels.cli import COMMANDS, main

SMALL = ["--batch-size", "2", "--image-size", "32"]


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "example" in out and f"trady {command}" in out.split("example")[1]


BAD_USAGE = [
    (["nonsense"], "nonsense", "expected one of"),
    (["plann"], "plann", "did you mean plan"),
    (["plan", "--budget", "12 bananas"], "12 bananas", "256KiB"),
    (["plan", "--budget", "0"], "0", "positive"),
    (["plan", "--scheme", "nope"], "nope", "trady"),
    (["plan", "--model", "efficientnet_lite9"], "efficientnet_lite9", "such as efficientnet_lite"),
    (["plan", "--image-size", "0"], "0", "at least 1"),
    (["plan", "--ranking", "no/such/file"], "no/such/file", "No such file"),
    (["plan", "--json", "no/such/folder/plan.json"], "no/such/folder", "written"),
    (["memory", "--batch-size", "-1"], "-1", "at least 1"),
    (["bench", "--selected", "1,x"], "1,x", "1,4,16"),
    (["bench", "--rounds", "0"], "0", "at least 1"),
    (["bench", "--operator", "nope"], "nope", "conv2d_channel_grad"),
]


@pytest.mark.parametrize(("arguments", "value", "expected"), BAD_USAGE, ids=lambda value: str(value)[:40])
def test_bad_usage_is_one_sentence(
    arguments: list[str], value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert value in captured.err and expected in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *SMALL, "--budget", "20000", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert len(content["layers"]) == 49
    assert 0 < content["cost"]["elements"] <= 20000
    spent = sum(
        entry["selected"]
        * sum(entry["layer"]["channel"][part] for part in ("weight_elements", "activation_elements"))
        for entry in content["layers"]
    )
    assert spent == content["cost"]["elements"]
    assert all(entry["layer"]["name"] in out for entry in content["layers"])
    # the embedded network's ranking ships with the package
    ranks = [entry["rank"] for entry in content["layers"]]
    assert sorted(ranks) == list(range(1, 50))
    pool = [entry["rank"] for entry in content["layers"] if entry["in_pool"]]
    assert sorted(pool) == list(range(1, len(pool) + 1)) and len(pool) < 49
    assert all(entry["selected"] == 0 for entry in content["layers"] if not entry["in_pool"])


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.json"
    assert main(["memory", *SMALL, "--budget", "64KiB", "--modules", "3", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    dense, sparse, counted = content["dense"], content["sparse"], content["counted"]
    assert counted["bytes"] <= 64 * 1024
    assert sparse["by_kind"]["conv input"] < dense["by_kind"]["conv input"] / 10
    assert "norm" not in sparse["by_kind"] and dense["by_kind"]["norm"] > 0
    out = capsys.readouterr().out
    assert "conv input" in out and "module (3 of" in out


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trady_kernels.cli import bench

    monkeypatch.setattr(bench, "calm_malloc", lambda: None)  # it would restart the test run
    monkeypatch.setattr(bench, "LAYERS", [layer for layer in bench.LAYERS if layer.size == 7][:2])
    monkeypatch.setattr(bench, "LINEARS", bench.LINEARS[:1])
    file = tmp_path / "bench.json"
    assert main(["bench", "--selected", "1", "--rounds", "1", "--batch-size", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["operator"] for row in rows} == {
        "conv2d_channel_grad",
        "gather_channels",
        "linear_channel_grad",
    }
    assert all({"auto", "aten", "dense"} <= row["microseconds"].keys() for row in rows)
    assert all(time > 0 for row in rows for time in row["microseconds"].values())
    assert "aten/auto" in capsys.readouterr().out


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trady_kernels.ops.backend import OPERATORS, available

    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {finding["name"] for finding in content["operators"]} == set(OPERATORS)
    here = {name: reason is None for name, reason in available().items()}
    assert here.items() <= {f["name"]: f["present"] for f in content["backends"]}.items()
    if here["cpp"]:
        assert "instruction set" in capsys.readouterr().out


def test_doctor_notices_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from trady_kernels.ops.backend import OPERATORS

    operator = OPERATORS["gather_channels"]
    kernel = operator.choose(*_gather_arguments())
    name = kernel if kernel in operator.kernels else "reference"
    right = operator.kernels[name]
    monkeypatch.setitem(operator.kernels, "aten", lambda *args: right(*args) + 1)
    monkeypatch.setattr(operator, "choose", lambda *args: "aten")
    assert main(["doctor"]) == 1


def _gather_arguments() -> tuple[object, ...]:
    import torch

    return torch.randn(2, 8, 9, 9), torch.tensor([1, 4, 5])


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(cli.importlib, "import_module", refuse)
    assert main(["plan"]) == 2
    assert "pip install 'trady-kernels[cli]'" in capsys.readouterr().err
