"""The fine-tuning loop: what trains, what a checkpoint holds, and that a resumed run has the same numbers."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import inspect
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from image_folders import write_images

from trady_kernels.atomic_write import alone_in, write_atomically
from trady_kernels.convert import sparse_layers
from trady_kernels.data import DataSet, load_data, to_network_input
from trady_kernels.models import loading
from trady_kernels.models.loading import classifier_name, load_model
from trady_kernels.selection import SCHEMES, Pool, Resampling, channel_norms
from trady_kernels.selection.resampling import SinceDraw
from trady_kernels.study.trainings import Training, train
from trady_kernels.training import run as run_module
from trady_kernels.training.ingredients import INGREDIENTS
from trady_kernels.training.loop import Diverged, learning_rate_factor, train_scheme
from trady_kernels.training.observer import Observer
from trady_kernels.training.regime import Batches, Regime
from trady_kernels.training.regimes import find_ranking, metric_of
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.run import _Recording, resume_run, start_run
from trady_kernels.training.run_folder import RunFolder
from trady_kernels.training.settings import Settings


@dataclass
class Recorder(Observer):
    """An observer that keeps what it is told, and may interrupt as a user would."""

    interrupt_at_step: int | None = None
    epochs: list[EpochFigures] = field(default_factory=list)
    steps: int = 0

    def on_scheme(self, scheme: str, result: SchemeResult, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch

    def on_step(self, loss: float, accuracy: float) -> None:
        self.steps += 1
        if self.steps == self.interrupt_at_step:
            raise KeyboardInterrupt

    def on_epoch(self, figures: EpochFigures) -> None:
        self.epochs.append(figures)


class TinyNetwork(torch.nn.Module):
    """Convolutions dense, depthwise and strided, with norms whose statistics and affines are random."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(8)
        self.pointwise = torch.nn.Conv2d(8, 12, 1)
        self.norm3 = torch.nn.BatchNorm2d(12)
        self.dropout = torch.nn.Dropout(0.5)
        self.classifier = torch.nn.Linear(12, num_classes)
        for norm in (self.norm1, self.norm2, self.norm3):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, 3, H, W) -> (N, num_classes)
        x = F.relu(self.norm1(self.stem(input)))
        x = F.relu(self.norm2(self.depthwise(x)))
        x = F.relu(self.norm3(self.pointwise(x)))
        return self.classifier(self.dropout(x.mean((2, 3))))


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = loading._Embedded(
        __name__, "TinyNetwork", {}, None, loading.images((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    )
    monkeypatch.setitem(loading.EMBEDDED, "tiny", entry)


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = write_images(tmp_path / "pets", {"cat": 18, "dog": 12, "eel": 10})
    return Settings(
        model="tiny",
        data=str(folder),
        image_size=8,
        budget=150,
        schemes=("trady",),
        epochs=3,
        warmup_epochs=1,
        batch_size=5,
        learning_rate=0.1,
        threads=1,
    )


def data_of(settings: Settings) -> DataSet:
    return load_data(settings.data, image_size=settings.image_size)


def start_state(settings: Settings) -> dict[str, torch.Tensor]:
    return load_model(settings.model, 3, seed=settings.seed).model.state_dict()


def numbers(result: SchemeResult) -> list[dict[str, Any]]:
    """What must not depend on the machine's load."""
    rows = [dataclasses.asdict(epoch) for epoch in result.epochs]
    return [
        {name: value for name, value in row.items() if name not in ("step_ms", "seconds")} for row in rows
    ]


# -- schedule and files ----------------------------------------------------------------------------


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(step, 20, 4) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        assert math.isclose(factors[step], 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)))
    assert learning_rate_factor(20, 20, 4) == 0
    assert learning_rate_factor(0, 10, 0) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk_full", "ctrl_c"])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def write_half(file: Any) -> None:
        file.write(b"ne")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


# -- one scheme ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        "trady",
        "s-topk-random",
        "d-full-random",
        "d-det-rgn",
        "s-det-rgn",
        "medyate",
        "head-only",
        "full",
        "bias-only",
        "trady+bias+stats",
        "medyate+8bit",
        "full+stats",
        "full+momentum",
        "trady+accumulate",
        "frugal",
        "velocity",
        pytest.param("lora", marks=needs_peft),
    ],
)
def test_resumed_run_has_the_same_numbers(tmp_path: Path, settings: Settings, scheme: str) -> None:
    check_resumption(tmp_path, settings, scheme)


@pytest.mark.parametrize("scheme", ["trady", "medyate"])
@pytest.mark.parametrize("resampling", ["2 steps", "norm 90%", "2 epochs"])
def test_resumed_run_draws_at_the_same_steps(
    tmp_path: Path, settings: Settings, scheme: str, resampling: str
) -> None:
    check_resumption(tmp_path, dataclasses.replace(settings, resampling=resampling), scheme)


def check_resumption(tmp_path: Path, settings: Settings, scheme: str) -> None:
    data = data_of(settings)
    if scheme == "lora":  # the cheapest adapter keeps a whole input
        settings = dataclasses.replace(settings, budget=3000)
    whole = train_scheme(scheme, settings, data, tmp_path / "whole.pt", Recorder())
    parts = tmp_path / "parts.pt"
    for interrupt_at_step in (9, 8):  # in the second epoch; then, having gone on with it, in the third
        with pytest.raises(KeyboardInterrupt):
            train_scheme(scheme, settings, data, parts, Recorder(interrupt_at_step), resume=True)
        torch.manual_seed(99)
    resumed = train_scheme(scheme, settings, data, parts, Recorder(), resume=True)
    assert numbers(resumed) == numbers(whole) and len(whole.epochs) == 3
    states = [torch.load(path)["model"] for path in (tmp_path / "whole.pt", parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    finished = Recorder()
    again = train_scheme(scheme, settings, data, parts, finished, resume=True)
    assert again.to_json() == resumed.to_json() and finished.steps == 0


@pytest.mark.parametrize("scheme", ["trady", "head-only", "full", "trady+stats+bias", "velocity"])
def test_checkpoint_loads_into_the_plain_network(tmp_path: Path, settings: Settings, scheme: str) -> None:
    data = data_of(settings)
    result = train_scheme(scheme, settings, data, tmp_path / "c.pt", Recorder())
    plain = TinyNetwork(3)
    plain.load_state_dict(torch.load(tmp_path / "c.pt")["model"], strict=True)
    plain.eval()
    with torch.no_grad():
        output = plain(to_network_input(data.test.images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    assert int((output.argmax(1) == data.test.labels).sum()) / len(data.test) == result.top1
    torch.testing.assert_close(
        F.cross_entropy(output, data.test.labels).item(), result.epochs[-1].test_loss, rtol=1e-4, atol=1e-5
    )


def test_only_what_the_scheme_selects_moves(tmp_path: Path, settings: Settings) -> None:
    data, start = data_of(settings), start_state(settings)
    moved = {}
    for scheme in ("trady", "head-only", "full", "bias-only", "trady+bias", "head-only+stats"):
        train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        end = torch.load(tmp_path / f"{scheme}.pt")["model"]
        assert end.keys() == start.keys()
        moved[scheme] = {name for name in start if not torch.equal(end[name], start[name])}
    head = {"classifier.weight", "classifier.bias"}
    assert moved["head-only"] == head
    convolutions = {"stem.weight", "depthwise.weight", "pointwise.weight"}
    assert head < moved["trady"] <= head | convolutions
    statistics = {name for name in start if "running" in name or "tracked" in name}
    assert moved["full"] == start.keys() - statistics
    biases = {name for name in start if name.endswith(".bias")}
    assert moved["bias-only"] == head | biases
    assert head | biases < moved["trady+bias"] <= head | biases | convolutions
    assert moved["head-only+stats"] == head | statistics


def test_figures_are_measured_and_inside_the_budget(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    results = {
        scheme: train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("trady", "head-only", "full")
    }
    trady, head, full = results["trady"], results["head-only"], results["full"]
    assert all(0 < epoch.cost <= 150 for epoch in trady.epochs)
    assert trady.full_cost == head.full_cost == full.full_cost == full.cost
    assert (head.cost, head.gradient_share, full.gradient_share) == (0, 0, 1)
    assert 0 < trady.gradient_share < 1
    assert head.saved_bytes < trady.saved_bytes < full.saved_bytes
    assert full.saved_bytes == full.dense_saved_bytes == trady.dense_saved_bytes
    assert trady.top1 == trady.epochs[-1].top1
    assert all(epoch.step_ms > 0 and epoch.seconds > 0 for epoch in full.epochs)


@pytest.mark.parametrize(("scheme", "changes"), [("d-det-rgn", True), ("s-det-rgn", False)])
def test_an_oracle_says_that_it_is_one(
    tmp_path: Path, settings: Settings, scheme: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(model: torch.nn.Module, batches: Any, loss_fn: Any) -> dict[str, torch.Tensor]:
        given = list(batches)
        measured.append((len(given), sum(float(images.sum()) for images, _ in given)))
        return channel_norms(model, given, loss_fn)

    monkeypatch.setattr("trady_kernels.training.regimes.channel_norms", measure)
    result = train_scheme(scheme, settings, data_of(settings), tmp_path / "c.pt", Recorder())
    assert any("over the budget by design" in note for note in result.notes)
    assert all(0 < epoch.cost <= 150 for epoch in result.epochs)
    assert [count for count, _ in measured] == [4] * (3 if changes else 1)
    assert len(set(measured)) == 1


def test_a_shipped_ranking_is_found_by_the_schemes_metric() -> None:
    assert {name: scheme.metric for name, scheme in SCHEMES.items() if scheme.ranked} == {
        "trady": "rgn", "s-topk-random": "rgn", "medyate": "lara", "late": "rgn",
    }  # fmt: skip
    for metric in ("rgn", "lara"):
        found = find_ranking(None, "efficientnet_lite0", metric)
        assert found is not None and found.metric == metric
    assert find_ranking(None, "mobilenet_v2_w035", "rgn") is None


def test_ingredients_in_the_figures(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    results = {
        scheme: train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("full", "head-only", "bias-only", "trady", "trady+bias", "full+stats")
    }
    full, head, bias, plain, trady = (
        results[name] for name in ("full", "head-only", "bias-only", "trady", "trady+bias")
    )
    assert trady.scheme == "trady+bias" and [epoch.cost for epoch in trady.epochs] == [
        epoch.cost for epoch in plain.epochs
    ]
    assert head.saved_bytes < bias.saved_bytes < trady.saved_bytes < full.saved_bytes
    assert (bias.cost, bias.gradient_share) == (0, 0)
    for result in (bias, trady):
        assert {"norms are frozen, all but their biases", "4 biases train, 40 elements"} < set(result.notes)
        assert INGREDIENTS["bias"].note in result.notes
    assert INGREDIENTS["stats"].note in results["full+stats"].notes
    assert results["full+stats"].epochs[0].train_loss != full.epochs[0].train_loss


def test_momentum_is_paid_for(tmp_path: Path, settings: Settings) -> None:
    """Gradients are those of the selected rows and the head, the state of momentum has their size."""
    data = data_of(settings)
    plain, moving, full = (
        train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("trady", "trady+momentum", "full+momentum")
    )
    head = 4 * sum(p.numel() for p in TinyNetwork(len(data.classes)).classifier.parameters())
    for epoch in plain.epochs:
        # The stem has 3 channels of 72 weights, the depthwise layer 8 of 9, the pointwise one 8 of 12.
        rows = epoch.weight_share * (3 * 72 + 8 * 9 + 8 * 12)
        assert epoch.gradient_bytes == pytest.approx(4 * rows + head) and epoch.optimizer_bytes == 0
    for mine, theirs in zip(moving.epochs, plain.epochs, strict=True):
        assert mine.optimizer_bytes == mine.gradient_bytes == theirs.gradient_bytes
    everything = sum(p.nbytes for p in TinyNetwork(len(data.classes)).parameters())
    assert full.gradient_bytes == full.optimizer_bytes == everything
    assert moving.epochs[-1].train_loss != plain.epochs[-1].train_loss


def test_eight_bits_keep_less(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    exact, packed = (
        train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("trady", "trady+8bit")
    )
    assert packed.saved_bytes < exact.saved_bytes and packed.cost == exact.cost
    assert packed.epochs[-1].train_loss == pytest.approx(exact.epochs[-1].train_loss, rel=0.02)


def test_learning_rates_of_specs(settings: Settings) -> None:
    own = dataclasses.replace(settings, learning_rate=None)
    assert own.learning_rate_of("trady+bias") == own.learning_rate_of("trady")
    assert own.learning_rate_of("full+stats") == own.learning_rate_of("full") != own.learning_rate_of("trady")
    assert own.learning_rate_of("head-only+8bit") == own.learning_rate_of("head-only")
    assert settings.learning_rate_of("full+stats") == 0.1


def test_seed_decides_the_numbers(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    first, again, other = (
        train_scheme(
            "trady", dataclasses.replace(settings, seed=seed), data, tmp_path / f"{index}.pt", Recorder()
        )
        for index, seed in enumerate((3, 3, 4))
    )
    assert numbers(first) == numbers(again) != numbers(other)


def test_training_learns(tmp_path: Path, settings: Settings) -> None:
    longer = dataclasses.replace(settings, epochs=12)
    result = train_scheme("full", longer, data_of(settings), tmp_path / "c.pt", Recorder())
    assert result.epochs[-1].train_loss < 0.7 * result.epochs[0].train_loss
    assert result.top1 > 0.6


def test_divergence_is_reported(tmp_path: Path, settings: Settings) -> None:
    wild = dataclasses.replace(settings, learning_rate=1e30)
    with pytest.raises(Diverged, match=r"^learning_rate: with 1e\+30 the loss became"):
        train_scheme("full", wild, data_of(settings), tmp_path / "c.pt", Recorder())


@pytest.mark.parametrize(
    "scheme, epochs, says",
    (
        ("full", 1, "the test loss became nan in epoch 1"),
        ("d-det-rgn", 2, "without a finite gradient before epoch 2"),
    ),
)
def test_divergence_in_the_last_step_of_an_epoch_is_reported(
    tmp_path: Path, settings: Settings, scheme: str, epochs: int, says: str
) -> None:
    data = data_of(settings)
    wild = dataclasses.replace(
        settings,
        learning_rate=1e38,
        epochs=epochs,
        batch_size=len(data.train),
        warmup_epochs=0.0,
        test_once=True,
    )
    with pytest.raises(Diverged, match=rf"^learning_rate: with 1e\+38 .*{says}, expected a finite number"):
        train_scheme(scheme, wild, data, tmp_path / "c.pt", Recorder())


def test_divergence_that_a_draw_inside_an_epoch_sees_is_reported(tmp_path: Path, settings: Settings) -> None:
    wild = dataclasses.replace(
        settings, schemes=("d-det-rgn",), learning_rate=1e38, warmup_epochs=0.0, resampling="1 step"
    )
    says = r"^learning_rate: with 1e\+38 the weights were without a finite gradient in epoch 1, expected"
    with pytest.raises(Diverged, match=says):
        _train(wild, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").exists()
    cell = Training("pets", "d-det-rgn", "150", 1e38, 0, held_out=False, resampling="1 step")
    assert train(cell, wild).diverged


# -- settings and run folders ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup_epochs": 7.0},
        {"schemes": ()},
        {"schemes": ("trady", "trady")},
        {"seed": -1},
    ],
    ids=str,
)
def test_bad_settings(settings: Settings, change: dict[str, Any]) -> None:
    (name, _value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected"):
        dataclasses.replace(settings, **change)


def test_settings_survive_json(settings: Settings) -> None:
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.difference(settings) is None
    assert settings.difference(dataclasses.replace(settings, budget="5%")) == "budget"
    with pytest.raises(ValueError, match="momentum missing or unknown"):
        Settings.from_json({**settings.to_json(), "momentum": 0.9})


def _train(settings: Settings, folder: Path) -> None:
    start_run(settings, folder).train(Recorder())


def test_run_writes_everything_and_resumes(tmp_path: Path, settings: Settings) -> None:
    both = dataclasses.replace(settings, schemes=("trady", "head-only"))
    whole = start_run(both, tmp_path / "whole")
    rows = whole.train(Recorder())
    run = start_run(both, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run.train(Recorder(interrupt_at_step=9))
    content = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert len(content["schemes"]["trady"]["epochs"]) == 1
    resumed = resume_run(tmp_path / "parts", {"epochs": 3})
    assert [numbers(row) for row in resumed.train(Recorder())] == [numbers(row) for row in rows]
    content = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert content["settings"] == both.to_json()
    assert content["versions"]["torch"] == torch.__version__
    assert content["data"]["train_samples"] == 32
    assert [len(row["epochs"]) for row in content["schemes"].values()] == [3, 3]
    assert content["schemes"]["trady"]["top1"] == rows[0].top1
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {"results.json", "checkpoint-trady.pt", "checkpoint-head-only.pt"}


def test_a_run_passes_on_everything_that_an_observer_is_told() -> None:
    told = [name for name in vars(Observer) if name.startswith("on_")]
    assert told
    for name in told:
        observer = mock.Mock(spec=Observer)
        arguments = [object() for _ in list(inspect.signature(getattr(Observer, name)).parameters)[1:]]
        getattr(_Recording(mock.MagicMock(), observer), name)(*arguments)
        getattr(observer, name).assert_called_once_with(*arguments)


def test_a_killed_run_resumes_although_the_results_lag_behind(tmp_path: Path, settings: Settings) -> None:
    _train(settings, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    content = json.loads(path.read_text())
    finished = content["schemes"]
    path.write_text(json.dumps({**content, "schemes": {}}))  # killed between checkpoint and results
    resume_run(tmp_path / "run", {}).train(Recorder())
    assert json.loads(path.read_text())["schemes"] == finished


@dataclass(frozen=True)
class ResumeCase:
    name: str
    asked: dict[str, Any]
    spoil: Callable[[Path, Settings], object]
    match: str


def _change_data(folder: Path, settings: Settings) -> None:
    next((Path(settings.data) / "cat").iterdir()).unlink()


def _foreign_checkpoint(folder: Path, settings: Settings) -> None:
    path = folder / "checkpoint-trady.pt"
    content = torch.load(path)
    torch.save({**content, "settings": {**content["settings"], "seed": 8}}, path)


def _damage(name: str) -> Callable[[Path, Settings], object]:
    return lambda folder, settings: (folder / name).write_bytes((folder / name).read_bytes()[:60])


RESUMES = (
    ResumeCase("seed", {"seed": 1}, lambda *_: None, "^seed: got 1, but the run in .* has 0"),
    ResumeCase("budget", {"budget": "5%"}, lambda *_: None, "^budget: got '5%', but the run in .* has 150"),
    ResumeCase(
        "schemes", {"schemes": ("full",)}, lambda *_: None, "^schemes: got full, but the run in .* has trady"
    ),
    ResumeCase("data", {}, _change_data, r"^data: .* is no longer what the run"),
    ResumeCase("foreign_checkpoint", {}, _foreign_checkpoint, "is of another run: its seed is 8, expected 0"),
    ResumeCase(
        "damaged_checkpoint", {}, _damage("checkpoint-trady.pt"), r"^checkpoint: .* could not be read"
    ),
    ResumeCase("damaged_results", {}, _damage("results.json"), r"^resume: .*results\.json is damaged"),
)


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resume_refuses_what_would_change_the_numbers(
    tmp_path: Path, settings: Settings, case: ResumeCase
) -> None:
    _train(dataclasses.replace(settings, epochs=1), tmp_path / "run")
    case.spoil(tmp_path / "run", settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=case.match) as caught:
        resume_run(tmp_path / "run", case.asked)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_folders_that_cannot_take_a_run(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^output: .*file/run cannot be written to \(Not a directory\)"):
        start_run(settings, tmp_path / "file" / "run")
    with pytest.raises(FileNotFoundError, match=r"^resume: .*nowhere holds no run"):
        resume_run(tmp_path / "nowhere", {})
    _train(dataclasses.replace(settings, epochs=1), tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"^output: .* holds a run already; go on with it by --resume"):
        start_run(settings, tmp_path / "run")


def test_a_new_run_takes_no_checkpoint_that_lies_there(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "run"
    _train(dataclasses.replace(settings, epochs=1), folder)
    (folder / "results.json").unlink()
    before = (folder / "checkpoint-trady.pt").read_bytes()
    other = dataclasses.replace(settings, epochs=1, seed=7)
    with pytest.raises(
        FileExistsError, match=r"^output: .* holds checkpoint-trady\.pt of a run without results\.json; give"
    ):
        start_run(other, folder)
    with pytest.raises(ValueError, match=r"is of another run: its seed is 0, expected 7"):
        train_scheme(
            "trady", other, data_of(settings), folder / "checkpoint-trady.pt", Recorder(), resume=True
        )
    assert (folder / "checkpoint-trady.pt").read_bytes() == before


def test_a_failure_leaves_the_results_of_what_was_trained(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    _train(settings, folder)
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**content, "schemes": {}}))  # killed in between
    resumed = resume_run(folder, {})
    monkeypatch.setattr(run_module, "train_scheme", mock.Mock(side_effect=ValueError("budget: got none")))
    with pytest.raises(ValueError, match=r"^budget"):
        resumed.train(Recorder())
    assert (folder / "results.json").exists()


def test_of_two_processes_one_trains_in_a_folder(tmp_path: Path, settings: Settings) -> None:
    run = start_run(settings, tmp_path / "run")
    with alone_in(tmp_path / "run"), pytest.raises(ValueError, match=r"another trady is writing to .*/run,"):
        run.train(Recorder())
    assert not (tmp_path / "run" / "results.json").exists()
    assert len(run.train(Recorder())) == len(settings.schemes)
    assert not [path.name for path in (tmp_path / "run").iterdir() if "lock" in path.name]


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write anywhere, so the refusal of the system is played.
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(
        PermissionError, match=r"^output: .* cannot be written to \(Permission denied\); give another"
    ):
        RunFolder(tmp_path / "run").create()


def test_bad_settings_leave_no_folder(tmp_path: Path, settings: Settings) -> None:
    for change in ({"budget": "12 bananas"}, {"schemes": ("trudy",)}, {"model": "tyni"}, {"device": "tpu"}):
        with pytest.raises(ValueError):
            start_run(dataclasses.replace(settings, **change), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_classifier_is_found() -> None:
    assert classifier_name(TinyNetwork(3), 3) == "classifier"
    assert classifier_name(TinyNetwork(3), 5) is None


def test_the_test_images_are_looked_at_once_where_asked(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    once = dataclasses.replace(settings, test_once=True)
    result = train_scheme("trady", once, data, tmp_path / "once.pt", Recorder())
    always = train_scheme("trady", settings, data, tmp_path / "always.pt", Recorder())
    assert [epoch.top1 is None for epoch in result.epochs] == [True] * (settings.epochs - 1) + [False]
    assert [epoch.test_loss is None for epoch in result.epochs] == [
        epoch.top1 is None for epoch in result.epochs
    ]
    assert (result.top1, result.epochs[-1].test_loss) == (always.top1, always.epochs[-1].test_loss)
    for epoch in result.epochs:
        assert 0 < epoch.weight_share < 1 and 0 < epoch.activation_share < 1
    with pytest.raises(ValueError, match="expected a run to its end"):
        _ = SchemeResult("trady", "", 0.1, 1, 1, epochs=result.epochs[:1]).top1


def test_samples_one_by_one_are_the_same_step(tmp_path: Path, settings: Settings) -> None:
    """The gradient is the batch's, up to rounding; what is kept is one sample's."""
    data = data_of(settings)
    whole, parts = (
        train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("full", "full+accumulate")
    )
    for ours, theirs in zip(parts.epochs, whole.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-4)
    assert parts.saved_bytes < whole.saved_bytes / 3
    assert any("one by one" in note for note in parts.notes)


def test_a_scheme_may_have_a_budget_and_a_reach_of_its_own(tmp_path: Path, settings: Settings) -> None:
    data = data_of(settings)
    results = {
        scheme: train_scheme(scheme, settings, data, tmp_path / f"{scheme}.pt", Recorder())
        for scheme in ("trady@60", "late+bias", "trady+bias", "late")
    }
    assert max(epoch.cost for epoch in results["trady@60"].epochs) <= 60
    # Biases of the last layers alone: the backward pass goes no further down for them.
    late, everywhere = (
        next(note for note in results[scheme].notes if "biases train" in note)
        for scheme in ("late+bias", "trady+bias")
    )
    assert int(late.split()[0]) < int(everywhere.split()[0])
    assert results["late+bias"].saved_bytes == results["late"].saved_bytes < results["trady+bias"].saved_bytes


@pytest.mark.parametrize(
    "scheme",
    [
        *("trady", "medyate", "d-det-rgn", "frugal", "full", "velocity"),
        pytest.param("lora", marks=needs_peft),
    ],
)
def test_a_network_goes_when_its_training_does(tmp_path: Path, settings: Settings, scheme: str) -> None:
    """A study trains hundreds of them in one process."""
    models: list[weakref.ref[torch.nn.Module]] = []

    class Remembering(Observer):
        def on_selection(self, regime: Regime, batches: Batches) -> None:
            models.append(weakref.ref(regime.model))

    train_scheme(
        scheme,
        dataclasses.replace(settings, epochs=2, budget=3000),
        data_of(settings),
        tmp_path / "checkpoint.pt",
        Remembering(),
    )
    gc.collect()
    assert len(models) == 2 and not any(model() for model in models)


def test_gradients_count_where_every_step_draws_anew(tmp_path: Path, settings: Settings) -> None:
    """The draw after a step takes the gradients of the channels that leave with it."""
    once, often = (
        train_scheme(
            "trady",
            dataclasses.replace(settings, epochs=1, budget="100%", resampling=resampling),
            data_of(settings),
            tmp_path / f"{resampling}.pt",
            Recorder(),
        )
        for resampling in ("epoch", "1 step")
    )
    assert once.gradient_bytes == often.gradient_bytes


@dataclass
class Drawing(Observer):
    """Takes down what trains in each step, as its gradients see it."""

    selections: list[dict[str, torch.Tensor]] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    epochs: list[EpochFigures] = field(default_factory=list)

    def on_selection(self, regime: Regime, batches: Batches) -> None:
        self.regime = regime

    def on_gradients(self, model: torch.nn.Module) -> None:
        layers = sparse_layers(model)
        self.selections.append({name: layer.channels.clone() for name, layer in layers.items()})
        self.costs.append(self.regime.selection_cost().elements)
        rows = [layer.channel_weight.grad for layer in layers.values() if len(layer.channels)]
        self.norms.append(float(torch.cat([row.flatten() for row in rows]).norm()))

    def on_epoch(self, figures: EpochFigures) -> None:
        self.epochs.append(figures)

    @property
    def drawn_after(self) -> list[bool]:
        """Of every step but the last, whether others train in the next one."""
        return [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in pairwise(self.selections)
        ]


def trained_with(resampling: str, tmp_path: Path, settings: Settings, **changes: Any) -> Drawing:
    drawing = Drawing()
    settings = dataclasses.replace(settings, resampling=resampling, **changes)
    train_scheme("trady", settings, data_of(settings), tmp_path / "c.pt", drawing)
    return drawing


STEPS = 7  # in an epoch of 32 samples


@pytest.mark.parametrize(
    ("resampling", "expected"),
    [
        ("1 step", [True] * (4 * STEPS - 1)),
        ("3 steps", [step % 3 == 0 for step in range(1, 4 * STEPS)]),
        ("epoch", [step % STEPS == 0 for step in range(1, 4 * STEPS)]),
        ("2 epochs", [step == 2 * STEPS for step in range(1, 4 * STEPS)]),
    ],
)
def test_channels_are_drawn_when_the_rule_says(
    tmp_path: Path, settings: Settings, resampling: str, expected: list[bool]
) -> None:
    drawing = trained_with(resampling, tmp_path, settings, epochs=4)
    assert drawing.drawn_after == expected
    for epoch, figures in enumerate(drawing.epochs):
        assert figures.cost == max(drawing.costs[epoch * STEPS : (epoch + 1) * STEPS])


def test_channels_are_drawn_when_their_gradient_has_shrunk(tmp_path: Path, settings: Settings) -> None:
    drawing = trained_with("norm 60%", tmp_path, settings, epochs=8)
    rule, since, expected = Resampling.parse("norm 60%"), SinceDraw(), []
    for norm in drawing.norms:
        since.note(norm)
        expected.append(since.is_due(rule))
        since = SinceDraw() if expected[-1] else since
    assert drawing.drawn_after == expected[:-1] and any(expected)


def test_momentum_moves_no_neuron_that_is_not_chosen_now(tmp_path: Path, settings: Settings) -> None:
    class Watching(Observer):
        chosen: dict[str, torch.Tensor]
        every_choice: ClassVar[list[dict[str, torch.Tensor]]] = []

        def on_selection(self, regime: Regime, batches: Batches) -> None:
            self.model = regime.model
            self.chosen = regime.state_dict()["masks"]
            self.every_choice.append(self.chosen)

        def on_gradients(self, model: torch.nn.Module) -> None:
            self.before = {name: model.get_submodule(name).weight.detach().clone() for name in self.chosen}

        def on_step(self, loss: float, accuracy: float) -> None:
            elements = 0
            for name, before in self.before.items():
                moved = (self.model.get_submodule(name).weight != before).flatten(1).any(1)
                assert not (moved & ~self.chosen[name]).any(), name
                elements += int(moved.sum()) * before[0].numel()
            assert 0 < elements <= settings.budget

    watching = Watching()
    train_scheme("velocity+momentum", settings, data_of(settings), tmp_path / "c.pt", watching)
    first, *_, last = watching.every_choice
    assert any((first[name] & ~last[name]).any() for name in first), "no neuron left"


def test_a_pool_of_ones_own(tmp_path: Path, settings: Settings) -> None:
    """Of the layers, the named one alone moves; what has no choice of layers goes on without it."""
    pooled = dataclasses.replace(settings, pool="only pointwise", budget="100%")
    result = train_scheme("trady", pooled, data_of(settings), tmp_path / "trady.pt", Recorder())
    assert "the pool is 'only pointwise': channels are drawn from 1 of 3 layers" in result.notes
    before, after = start_state(settings), torch.load(tmp_path / "trady.pt")["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"pointwise.weight", "classifier.weight", "classifier.bias"}
    head = train_scheme("head-only", pooled, data_of(settings), tmp_path / "head.pt", Recorder())
    assert not any("pointwise" in note for note in head.notes)
    with pytest.raises(ValueError, match="ranking: got no ranking for the pool '1 layer by lara'"):
        lone = dataclasses.replace(pooled, pool="1 layer by lara")
        train_scheme("trady", lone, data_of(settings), tmp_path / "lone.pt", Recorder())


@pytest.mark.parametrize("pool", ["1 layer", "2 layers by norm", "50% by lara"])
def test_a_pool_names_the_ranking_that_ships(pool: str) -> None:
    metric = Pool.parse(pool).metric or "rgn"
    assert metric_of(SCHEMES["trady"], pool) == metric
    ranking = find_ranking(None, "efficientnet_lite0", metric)
    assert ranking is not None and ranking.metric == metric
    assert metric_of(SCHEMES["medyate"], None) == metric_of(SCHEMES["medyate"], "1 layer") == "lara"
