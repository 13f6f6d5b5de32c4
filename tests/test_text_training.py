"""Sentences through the training loop and the commands, with a network small enough for that."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from image_folders import write_images
from networks import as_trained
from rated_sentences import opinions, write_archive, write_tokenizer

from trady_kernels.cli import main
from trady_kernels.data import load_data
from trady_kernels.models import MiniLM, loading
from trady_kernels.models.front import TokenFront
from trady_kernels.models.loading import Sizes, load_model
from trady_kernels.selection import LayerRanking
from trady_kernels.training.loop import train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.settings import RATES, Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="tokenizers is not installed"
)


class TinyText(MiniLM):
    """MiniLM with values as after training, on the words of ``rated_sentences``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            num_classes, vocabulary=12, positions=16, blocks=1, width=16, hidden=24, heads=2, dropout=0.1
        )
        as_trained(self)


@pytest.fixture(autouse=True)
def tiny_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "data", opinions(60))
    monkeypatch.setenv("TRADY_DATA", str(tmp_path / "data"))
    file = write_tokenizer(tmp_path / "tokenizer.json")
    entry = loading._Embedded(
        __name__, "TinyText", {}, None, lambda sizes: TokenFront(lambda: file, sizes.max_length, 12, 16)
    )
    monkeypatch.setitem(loading.EMBEDDED, "tiny-text", entry)


SMALL = ["--model", "tiny-text", "--data", "tweets", "--max-length", "10"]


@dataclasses.dataclass
class Recorder(Observer):
    """An observer that may interrupt as a user would."""

    interrupt_at_step: int = 0
    steps: int = 0

    def on_step(self, loss: float, accuracy: float) -> None:
        self.steps += 1
        if self.steps == self.interrupt_at_step:
            raise KeyboardInterrupt


def settings_of(**options: object) -> Settings:
    return Settings(
        model="tiny-text", data="tweets", max_length=10, budget="20%", epochs=3, batch_size=8, threads=1, **options
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("scheme", ["trady", "medyate", "full"])
def test_resumed_run_has_the_same_numbers(tmp_path: Path, scheme: str) -> None:
    settings, data = settings_of(), load_data("tweets")
    whole = train_scheme(scheme, settings, data, tmp_path / "whole.pt", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train_scheme(scheme, settings, data, tmp_path / "parts.pt", Recorder(interrupt_at_step=9))
    torch.manual_seed(99)
    resumed = train_scheme(scheme, settings, data, tmp_path / "parts.pt", Recorder(), resume=True)
    for ours, theirs in zip(resumed.epochs, whole.epochs, strict=True):
        assert dataclasses.replace(ours, step_ms=0, seconds=0) == dataclasses.replace(
            theirs, step_ms=0, seconds=0
        )
    states = [torch.load(tmp_path / name)["model"] for name in ("whole.pt", "parts.pt")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_learns_and_moves_nothing_but_the_selected_weights(tmp_path: Path) -> None:
    settings, data = settings_of(learning_rate=0.4), load_data("tweets")
    settings = dataclasses.replace(settings, epochs=20)
    result = train_scheme("trady", settings, data, tmp_path / "c.pt", Recorder())
    assert result.top1 > 0.8 and result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss
    start = load_model("tiny-text", 2, seed=settings.seed, sizes=Sizes(max_length=10)).model.state_dict()
    state = torch.load(tmp_path / "c.pt")["model"]
    assert state.keys() == start.keys()
    moved = {name for name in state if not torch.equal(state[name], start[name])}
    linears = {
        name
        for name in state
        if name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight"))
    }
    assert (
        {"classifier.weight", "classifier.bias"} < moved <= linears | {"classifier.weight", "classifier.bias"}
    )


def test_sentences_have_rates_of_their_own(tmp_path: Path) -> None:
    rates, rate_of_samplers = RATES["sentences"]
    assert rates.keys() == RATES["images"][0].keys(), "the samplers' rate is too high for these schemes"
    settings = dataclasses.replace(settings_of(), epochs=1, warmup_epochs=0)
    for scheme, rate in (("full", rates["full"]), ("trady", rate_of_samplers)):
        result = train_scheme(scheme, settings, load_data("tweets"), tmp_path / f"{scheme}.pt", Recorder())
        assert result.learning_rate == rate
    images = dataclasses.replace(settings, data="mnist", learning_rate=None)
    assert images.learning_rate_of("full") == RATES["images"][0]["full"]


def test_finetune_and_its_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    small = [*SMALL, "--epochs", "1", "--batch-size", "8", "--threads", "1"]
    assert main(["finetune", *small, "--budget", "20%", "--train-samples", "32", "--output", run]) == 0
    shown = capsys.readouterr().out
    assert "32 training and 12 test sentences of 10 tokens in 2 classes" in shown
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert tuple(content["schemes"]) == ("trady", "head-only", "full")
    assert content["data"]["classes"] == ["negative", "positive"]
    rows = content["schemes"]
    assert rows["head-only"]["saved_bytes"] < rows["trady"]["saved_bytes"] < rows["full"]["saved_bytes"]
    assert main(["finetune", "--resume", run]) == 0
    write_archive(tmp_path / "data", [*opinions(59), "60\t1\tanother good film"])
    capsys.readouterr()
    assert main(["finetune", "--resume", run]) == 2
    assert "data: tweets is no longer what the run" in capsys.readouterr().err


def test_rank_memory_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "ranking.json")
    assert main(["rank", *SMALL, "--steps", "2", "--batch-size", "4", "--output", file]) == 0
    assert len(LayerRanking.load(file)) == 6
    network = ["--model", "tiny-text", "--max-length", "10", "--ranking", file, "--batch-size", "4"]
    capsys.readouterr()
    assert main(["plan", *network, "--budget", "20%"]) == 0
    assert "tiny-text, 4 sentences of 10 tokens" in capsys.readouterr().out
    assert main(["plan", *network, "--total", "1MiB"]) == 0
    shown = capsys.readouterr().out
    assert (
        "tiny-text, sentences of 10 tokens, sgd, trady" in shown and "sentences" in shown.split("--budget")[0]
    )


def test_memory_counts_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A process of its own knows no network of this file.
    monkeypatch.setattr("trady_kernels.resident.unavailable", lambda: "not measured here")
    arguments = ["--model", "tiny-text", "--max-length", "10", "--batch-size", "4", "--budget", "5%"]
    assert main(["memory", *arguments]) == 0
    assert "tiny-text, 4 sentences of 10 tokens, cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "mobilenet_v2_w035", "--data", "tweets"), "'tweets' holds sentences, but mobilenet_v2_w035 takes images; give a data set of images, or a network for sentences such as minilm"),
        (("--model", "tiny-text", "--data", "PETS", "--max-length", "10"), "'pets' holds images, but tiny-text takes sentences; give a data set of sentences, or a network for images such as efficientnet_lite0"),
        (("--model", "tiny-text", "--data", "tweets", "--max-length", "17"), "max_length: got 17, expected 3 to 16 tokens"),
        (("--model", "tiny-text", "--data", "tweets", "--max-length", "0"), "max_length: got 0, expected "),
        (("--model", "tiny-text", "--data", "editorials"), "has no readable nytEditorialSnippets_GroundTruth.txt"),
    ],
    ids=["sentences", "images", "too_long", "zero", "no_file"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["finetune", "rank"])
def test_bad_usage_gets_one_sentence(
    command: str, arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets = write_images(tmp_path / "pets", {"cat": 6, "dog": 6})
    given = [str(pets) if argument == "PETS" else argument for argument in arguments]
    assert main([command, *given, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
