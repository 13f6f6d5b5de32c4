"""``trady rank``: the file it writes is a ranking that ``trady finetune`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_folders import write_images

from trady_kernels.cli import main
from trady_kernels.selection import LayerRanking


@pytest.mark.parametrize("command", ["rank", "search"])
def test_bad_devices(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "gpu", "--output", str(tmp_path / "made.json")]
    assert main([command, *arguments, *(["--budget", "1000"] if command == "search" else [])]) == 2
    assert "device: got 'gpu', expected 'cpu' or 'cuda'" in capsys.readouterr().err


def test_rank_writes_a_ranking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pets = write_images(tmp_path / "pets", {"cat": 6, "dog": 6})
    file = tmp_path / "ranking.json"
    small = ["--model", "mobilenet_v2_w035", "--image-size", "32", "--batch-size", "4"]
    arguments = ["rank", *small, "--data", str(pets), "--steps", "2", "--output", str(file)]
    assert main(arguments) == 0
    assert "layers hold 97% of the cumulative score" in capsys.readouterr().out
    ranking = LayerRanking.load(file)
    assert len(ranking) == 52 and ranking.metric == "rgn"
    assert json.loads(file.read_text())["provenance"]["versions"]["torch"]
    before = list(ranking.items())
    assert main(arguments) == 0
    assert list(LayerRanking.load(file).items()) == before
    assert main([*arguments, "--steps", "3", "--budget", "50%"]) == 0
    inside = LayerRanking.load(file)
    assert set(inside) == set(ranking) and list(inside.items()) != before
    assert main([*arguments, "--steps", "2", "--budget", "5%"]) == 2
    assert "batches: got 2, expected at least 2" in capsys.readouterr().err
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--steps", "0"]) == 2
    assert main([*arguments, "--metric", "size"]) == 2
    assert main([*arguments, "--output", str(tmp_path / "no" / "file.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert list(LayerRanking.load(file).items()) == before
