"""Schemes with ingredients, presets and budgets of their own in the commands that do not train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the commands need the extra 'cli'")

from trady_kernels.cli import main
from trady_kernels.cost import measure_layers
from trady_kernels.models import MobileNetV2
from trady_kernels.selection.schemes.late import Late

NETWORK = ["--model", "mobilenet_v2_w035", "--image-size", "32", "--batch-size", "2"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, *NETWORK]) == 0
    return capsys.readouterr().out


def test_a_preset_is_planned_as_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    layers = measure_layers(MobileNetV2(10, width=0.35), torch.zeros(2, 3, 32, 32))
    reached = len(Late().reach({name: layers[name] for name in layers if name != "classifier"}))
    by_hand = [
        "--scheme",
        "late",
        "--budget",
        "20KiB",
        "--lean",
        "8bit",
        "--stored",
        "8bit",
        "--biases",
        str(reached),
    ]
    assert 0 < reached < len(layers) - 1
    expected = printed(capsys, "plan", *by_hand)
    assert printed(capsys, "plan", "--scheme", "frugal@20KiB") == expected
    assert printed(capsys, "plan", "--scheme", "late+bias+8bit", "--budget", "20KiB") == expected


def test_memory_of_a_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trady_kernels.resident.unavailable", lambda: "not measured here")
    saved = {}
    for scheme in ("frugal@5%", "late@5%", "late+bias@5%"):
        file = tmp_path / f"{scheme}.json"
        printed(capsys, "memory", "--scheme", scheme, "--json", str(file))
        saved[scheme] = json.loads(file.read_text())["sparse"]["saved_bytes"]
    assert saved["frugal@5%"] < saved["late@5%"] == saved["late+bias@5%"]


def test_a_total_has_the_state_of_momentum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    shown = printed(capsys, "plan", "--total", "4MiB", "--scheme", "frugal", "--json", str(file))
    assert "sgd-momentum, frugal: what fits" in shown
    content = json.loads(file.read_text())
    assert content["settings"]["optimizer"] == "sgd-momentum"
    for step in content["steps"]:
        assert step["channels"] and step["optimizer_bytes"] == step["gradient_bytes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--scheme", "late+bais"), "'bais' is no ingredient, expected one of bias"),
        (
            ("--scheme", "velocity"),
            "got 'velocity', which trains something else than channels, expected one of trady",
        ),
        (("--scheme", "trady+accumulate"), "expected it without accumulate, which is for trady finetune"),
        (("--scheme", "full+checkpoint"), "expected it without checkpoint, which is for trady finetune"),
        (("--scheme", "frugal", "--lean", "off"), "lean: got 'off' beside frugal, which sets it"),
        (("--scheme", "trady+bias", "--biases", "3"), "biases: got '3' beside trady+bias, which sets it"),
        (("--scheme", "frugal@5%", "--total", "4MiB"), "expected one of the two"),
    ],
)
def test_bad_usage_is_one_sentence(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *NETWORK, *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
