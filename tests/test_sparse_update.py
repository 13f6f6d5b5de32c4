"""``sparse-update``: the first r*C channels as a file says, its files, and the search that makes one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import write_images
from test_sampler import X, cost_of, sampler, sparse_net
from test_training import Recorder

import trady_kernels as tk
from trady_kernels.cli import main
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Budget, Cost, LayerCost, measure_layers
from trady_kernels.data import Samples, load_data
from trady_kernels.models import EfficientNetLite0, loading
from trady_kernels.models.loading import load_model
from trady_kernels.selection import LayerFractions, SparseUpdate
from trady_kernels.selection.layer_fractions import choose_fractions
from trady_kernels.training.loop import train_scheme
from trady_kernels.training.search import _Trial, candidates_of, search_fractions
from trady_kernels.training.settings import Settings

FRACTIONS = LayerFractions(
    "small",
    4_000,
    {"stem": 0.5, "blocks.0.depthwise": 0.125, "blocks.1.project": 1, "neck": 0.25, "blocks.0.expand": 0},
    2,
)


@pytest.mark.parametrize("budget", [4_000, "100%", "40kB"])
def test_the_first_channels_of_each_layer_train_and_cost_their_sum(budget: int | str) -> None:
    model = sparse_net()
    drawn = sampler(model, scheme=SparseUpdate(FRACTIONS), budget=budget)
    expected = {"stem": 1, "blocks.0.depthwise": 3, "blocks.1.project": 24, "neck": 2}  # of 3, 24, 24, 8
    costs = measure_layers(model, X)
    for name, channels in drawn.selection.items():
        assert channels.tolist() == list(range(expected.get(name, 0)))
    assert drawn.cost == cost_of(drawn)
    assert drawn.cost.elements == sum(
        count * costs[name].channel.elements for name, count in expected.items()
    )
    before = drawn.selection
    drawn.resample()
    assert all(torch.equal(channels, before[name]) for name, channels in drawn.selection.items())
    assert (
        drawn.pool == [name for name in drawn.layers if name in expected] and drawn.scheme == "sparse-update"
    )


def test_fractions_above_the_budget_are_an_error_that_says_the_cost() -> None:
    model = sparse_net()
    cost = sampler(model, scheme=SparseUpdate(FRACTIONS), budget="100%").cost
    for budget, least in ((cost.elements - 1, cost.elements), (f"{cost.bytes - 1} B", cost.bytes)):
        with pytest.raises(
            ValueError, match=f"^budget: got .* cost {least:,} (elements|bytes) with this input"
        ):
            sampler(model, scheme=SparseUpdate(FRACTIONS), budget=budget)
    assert sampler(model, scheme=SparseUpdate(FRACTIONS), budget=cost.elements).cost == cost


def test_biases_are_carried_along() -> None:
    assert SparseUpdate(FRACTIONS).biases == 2


def test_saved_fractions_load_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "fractions.json"
    FRACTIONS.save(file)
    assert LayerFractions.load(file) == FRACTIONS == SparseUpdate(file).fractions
    assert os.listdir(tmp_path) == ["fractions.json"]
    content = json.loads(file.read_text())
    assert set(content) == {
        "format",
        "version",
        "network",
        "budget",
        "layers",
        "bias_layers",
        "contributions",
    }


SAVED: dict[str, Any] = {
    "format": "trady-layer-fractions", "version": 1, "network": "n", "budget": 5, "layers": {"a": 0.5}, "bias_layers": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not JSON"),
        (json.dumps(SAVED | {"format": "other"}), "is not a file of layer fractions of version 1"),
        (json.dumps(SAVED | {"version": 2}), "is not a file of layer fractions of version 1"),
        (
            json.dumps(SAVED | {"layers": [1]}),
            "is damaged: layers: got list, expected {layer name: fraction}",
        ),
        (
            json.dumps(SAVED | {"layers": {"a": 0.3}}),
            "is damaged: layers: got 0.3 for layer 'a', expected one of 0,",
        ),
        (json.dumps(SAVED | {"layers": {"a": True}}), "is damaged: layers: got True for layer 'a'"),
        (json.dumps(SAVED | {"budget": -1}), "is damaged: budget: got -1"),
        (json.dumps(SAVED | {"network": 3}), "is damaged: network: got 3"),
        (json.dumps(SAVED | {"bias_layers": 0.5}), "is damaged: bias_layers: got 0.5"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "fractions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        LayerFractions.load(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_schemes_get_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^scheme: 'sparse-update' is given as data, expected SparseUpdate"):
        sampler(scheme="sparse-update")
    with pytest.raises(ValueError, match=r"^layers: got a fraction for 'nowhere', expected sparse layers"):
        sampler(scheme=SparseUpdate(dataclasses.replace(FRACTIONS, layers={"nowhere": 1})))
    with pytest.raises(
        ValueError, match=r"^network: got 'resnet18', expected one that layer fractions ship for"
    ):
        LayerFractions.shipped("resnet18")
    with pytest.raises(ValueError, match=r"^scheme: got <class"):
        sampler(scheme=SparseUpdate)


def test_the_shipped_fractions_are_inside_their_budget() -> None:
    fractions = LayerFractions.shipped("efficientnet_lite0")
    assert (fractions.network, fractions.budget) == ("efficientnet_lite0", "7%")
    images = torch.randn(2, 3, 64, 64)
    model = tk.sparsify(EfficientNetLite0(num_classes=10), images)
    for budget in (28_000, "7%"):
        drawn = tk.ChannelSampler(model, images, budget=budget, scheme=SparseUpdate(fractions))
        limit = budget if isinstance(budget, int) else 0.07 * drawn.full_cost.elements
        assert 0.9 * limit < drawn.cost.elements <= limit


# -- the search ------------------------------------------------------------------------------------


def layer(name: str, channels: int, elements: int) -> LayerCost:
    return LayerCost(name, channels, Cost(elements, 0, 4 * elements, 0))


def test_greedy_by_contribution_per_cost_by_hand() -> None:
    layers = {"a": layer("a", 8, 10), "b": layer("b", 8, 5), "c": layer("c", 4, 100)}
    gains = {
        "a": {0.125: 1.0, 0.25: 1.5, 0.5: 1.5, 1.0: 9.0},  # 10, 20, 40, 80 elements
        "b": {0.125: 0.6, 0.5: 0.1, 1.0: -1.0},  # 5, 20, 40
        "c": {0.25: 50.0, 0.5: -3.0},  # 100, 200
    }
    # c's quarter gains 0.5 an element, but does not fit into 99; b's eighth 0.12; then all of a 0.1125.
    assert choose_fractions(gains, layers, Budget.parse(99)) == {"b": 0.125, "a": 1.0}
    # 80 for a no longer fit beside it: an eighth of a gains 0.1, a quarter more 0.05.
    assert choose_fractions(gains, layers, Budget.parse(84)) == {"a": 0.25, "b": 0.125}
    assert choose_fractions(gains, layers, Budget.parse(24)) == {"a": 0.125, "b": 0.125}
    assert choose_fractions(gains, layers, Budget.parse(104)) == {"c": 0.25}
    assert choose_fractions(gains, layers, Budget.parse("20 B")) == {"b": 0.125}
    assert choose_fractions({"b": {0.5: -1.0}}, layers, Budget.parse(99)) == {}


def test_candidates_train_something_and_fit_alone() -> None:
    layers = {"a": layer("a", 3, 10), "b": layer("b", 16, 5)}
    found = [(c.layer, c.fraction, c.channels) for c in candidates_of(layers, Budget.parse(40))]
    # A half of three channels is one; an eighth and a quarter are none.
    assert found == [("a", 0.5, 1), ("a", 1.0, 3), ("b", 0.125, 2), ("b", 0.25, 4), ("b", 0.5, 8)]


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = loading._Embedded(
        "test_training", "TinyNetwork", {}, None, loading.images((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    )
    monkeypatch.setitem(loading.EMBEDDED, "tiny", entry)


@pytest.mark.usefixtures("tiny_network")
def test_a_candidate_leaves_no_trace(tmp_path: Path) -> None:
    data = load_data(str(write_images(tmp_path / "pets", {"cat": 12, "dog": 12})), image_size=8)
    trial = _Trial(load_model("tiny", 2), data, 4, 0, "cpu")
    before = {name: value.clone() for name, value in trial._model.state_dict().items()}
    candidate = candidates_of(trial.costs, Budget.parse(2_000))[5]
    images = trial.samples(2, 2)
    losses = [trial.loss_after(each, images, data.test, 0.1) for each in (None, candidate, candidate, None)]
    assert losses[0] == losses[3] != losses[1] == losses[2]
    after = trial._model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(len(layer.channels) for layer in sparse_layers(trial._model).values())


@pytest.mark.usefixtures("tiny_network")
def test_every_class_is_among_the_validation_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come class by class: the first samples are those of the first classes."""
    pets = write_images(tmp_path / "pets", {"cat": 12, "dog": 12, "eel": 24})
    seen: list[list[int]] = []

    def looked_at(trial: _Trial, validation: Samples) -> float:
        seen.append(validation.labels.bincount().tolist())
        return 1.0

    monkeypatch.setattr(_Trial, "_loss", looked_at)
    data = load_data(str(pets), image_size=8)
    options = {"budget": 1000, "steps": 1, "head_steps": 1, "batch_size": 4, "learning_rate": 0.1, "seed": 0}
    told = {"on_count": lambda count: None, "on_candidate": lambda: None}
    search_fractions("tiny", data, validation_samples=4, device="cpu", **options, **told)
    assert all(counts == [1, 1, 2] for counts in seen) and seen
    with pytest.raises(ValueError, match="validation_samples: got 2, expected at least 3, one of each class"):
        search_fractions("tiny", data, validation_samples=2, device="cpu", **options, **told)


@pytest.mark.usefixtures("tiny_network")
def test_search_makes_a_file_that_finetune_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pets = write_images(tmp_path / "pets", {"cat": 12, "dog": 12, "eel": 6})
    file = tmp_path / "fractions.json"
    small = ["--model", "tiny", "--image-size", "8", "--data", str(pets), "--batch-size", "4"]
    steps = ["--steps", "1", "--head-steps", "2", "--validation-samples", "6"]
    search = ["search", *small, *steps, "--budget", "1000", "--output", str(file)]
    assert main(search) == 0
    assert "elements for a budget of 1000" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["provenance"]["versions"]["torch"] and 0 < content["elements"] <= 1_000
    fractions = LayerFractions.load(file)
    assert (fractions.network, fractions.budget) == ("tiny", 1_000) and fractions.layers
    assert all(
        content["contributions"][name][str(share)] > 0
        for name, share in fractions.layers.items()
        if share == 0.125
    )
    finetune = [
        "finetune",
        *small,
        "--epochs",
        "1",
        "--lr",
        "0.01",
        "--scheme",
        "sparse-update",
        "--no-baselines",
    ]
    run = ["--budget", "1000", "--layer-fractions", str(file), "--output", str(tmp_path / "run")]
    assert main([*finetune, *run]) == 0
    row = json.loads((tmp_path / "run" / "results.json").read_text())["schemes"]["sparse-update"]
    assert row["epochs"][0]["cost"] == content["elements"]
    plan = ["plan", *small[:4], "--scheme", "sparse-update", "--batch-size", "2"]
    assert main([*plan, "--budget", "1000", "--layer-fractions", str(file)]) == 0
    assert f"{content['elements']:,}" in capsys.readouterr().out
    for arguments, says in (
        (
            [*finetune, "--output", str(tmp_path / "none")],
            "network: got 'tiny', expected one that",
        ),
        ([*plan, "--total", "64MiB"], "is the same selection for every budget"),
        ([*search, "--steps", "0"], "steps: got 0, expected at least 1"),
        ([*search, "--lr", "0"], "learning_rate: got 0"),
        ([*search, "--budget", "3"], "expected one that some layer's first channels fit"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1


def test_measured_contributions_serve_every_budget(tmp_path: Path) -> None:
    """Two layers by hand: what adds most for its cost comes first, whatever budget is asked."""
    layers = measure_layers(sparse_net(), X)
    first, second = list(sparse_layers(sparse_net()))[:2]
    price = {name: layers[name].channel.elements * (layers[name].channels // 2) for name in (first, second)}
    gains = {first: {0.5: 2.0 * price[first]}, second: {0.5: 1.0 * price[second]}}
    fractions = LayerFractions("net", price[first], {first: 0.5}, contributions=gains)
    fractions.save(tmp_path / "f.json")
    loaded = LayerFractions.load(tmp_path / "f.json")
    assert loaded == fractions
    for budget, expected in (
        (price[first], {first}),
        (price[first] + price[second], {first, second}),
        (min(price.values()) - 1, set()),
    ):
        drawn = sampler(scheme=SparseUpdate(loaded), budget=budget)
        assert {name for name, chosen in drawn.selection.items() if len(chosen)} == expected
        assert drawn.cost.elements == sum(price[name] for name in expected)
    with pytest.raises(
        ValueError, match="got a fraction for 'nowhere', expected sparse layers of this network"
    ):
        sampler(
            scheme=SparseUpdate(dataclasses.replace(loaded, contributions={"nowhere": {0.5: 1.0}})), budget=9
        )
    # The same words for another input: a share of what then is the full cost may be less than the fractions take.
    share = dataclasses.replace(loaded, budget="1%", layers={first: 0.5, second: 0.5})
    drawn = sampler(scheme=SparseUpdate(share), budget="1%")
    assert drawn.budget is not None and drawn.cost.elements <= drawn.budget.limit(drawn.full_cost)
    damaged = json.loads((tmp_path / "f.json").read_text())
    damaged["contributions"] = {first: 3}
    (tmp_path / "f.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="is damaged"):
        LayerFractions.load(tmp_path / "f.json")


@pytest.mark.usefixtures("tiny_network")
def test_the_biases_of_the_last_layers_train(tmp_path: Path) -> None:
    """As many as the file says, in training and in the commands that measure."""
    data = load_data(str(write_images(tmp_path / "pets", {"cat": 12, "dog": 12})), image_size=8)
    notes = {}
    for count in (0, 1):
        file = tmp_path / f"{count}.json"
        LayerFractions("tiny", 1000, {"pointwise": 0.5}, bias_layers=count).save(file)
        recipe = Settings(
            model="tiny", image_size=8, budget=1000, schemes=("sparse-update",), epochs=1, batch_size=4,
            warmup_epochs=0, threads=1, layer_fractions=str(file),
        )  # fmt: skip
        notes[count] = train_scheme("sparse-update", recipe, data, tmp_path / "c.pt", Recorder()).notes
    assert not any("biases train" in note for note in notes[0])
    assert any(
        note.startswith("2 biases train") for note in notes[1]
    )  # the convolution's and the norm's behind it
