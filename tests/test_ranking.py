from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from tolerances import ROUNDING
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import measure_layers
from trady_kernels.models import EfficientNetLite0, MiniLM
from trady_kernels.selection.ranking import METRICS


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(4, 3, 10, 9, generator=generator, dtype=torch.float64),
            torch.randint(5, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def net() -> ResidualNet:
    return as_trained(ResidualNet()).double()


def rgn(gradient: torch.Tensor, groups: int, channels: int, price: int) -> float:
    """Equation 8 of TraDy, channel by channel."""
    score = 0.0
    per_group, outputs = channels // groups, len(gradient) // groups
    for channel in range(channels):
        group, index = divmod(channel, per_group)
        score += float(gradient[group * outputs : (group + 1) * outputs, index].norm()) / price
    return score


def lara(gradient: torch.Tensor, groups: int, channels: int, price: int) -> float:
    """Equation 9 of MeDyate."""
    return float(gradient.norm()) / (channels * price)


def norm(gradient: torch.Tensor, groups: int, channels: int, price: int) -> float:
    """Of the whole gradient."""
    return float(gradient.norm())


def expected_scores(
    model: nn.Module, metric: Callable[[torch.Tensor, int, int, int], float], learning_rate: float = 0.0
) -> dict[str, float]:
    """The metric of the dense gradient in evaluation mode, written out."""
    model = copy.deepcopy(model).eval()
    model.requires_grad_(True)
    costs = measure_layers(model, batches()[0][0])
    scores = dict.fromkeys(costs, 0.0)
    for x, target in batches():
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        for name, cost in costs.items():
            layer = model.get_submodule(name)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            scores[name] += metric(layer.weight.grad, groups, cost.channels, cost.channel.elements)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if learning_rate and (
                    name.endswith("head.bias")
                    or (name.rpartition(".")[0] in costs and name.endswith("weight"))
                ):
                    parameter -= learning_rate * parameter.grad
    return scores


@pytest.mark.parametrize("metric", [rgn, lara, norm], ids=["rgn", "lara", "norm"])
@pytest.mark.parametrize("learning_rate", [0.0, 0.5])
def test_scores_are_the_equations_of_the_dense_gradient(
    metric: Callable[..., float], learning_rate: float
) -> None:
    model = tk.sparsify(net(), batches()[0][0])
    tk.select_fraction(model, 0.3)
    dense = tk.densify(copy.deepcopy(model))
    expected = expected_scores(dense, metric, learning_rate)
    found = tk.rank_layers(
        model, batches(), F.cross_entropy, metric=metric.__name__, learning_rate=learning_rate
    )
    assert set(found) == set(sparse_layers(model))
    scale = 1_000 * ROUNDING[torch.float64]
    assert all(abs(found[name] - expected[name]) <= scale * expected[name] for name in found)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_dense_network_is_ranked_with_its_head() -> None:
    model = net()
    found, expected = tk.rank_layers(model, batches(), F.cross_entropy), expected_scores(model, rgn)
    assert found.keys() == expected.keys()
    assert all(abs(found[name] - expected[name]) <= 1e-10 * expected[name] for name in found)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_ranking_leaves_no_trace(sparse: bool, fails: bool) -> None:
    model = net().train()
    model.blocks[0].eval()
    if sparse:
        tk.sparsify(model, batches()[0][0])
        tk.select_fraction(model, 0.3)
    model(batches()[0][0]).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    forwards = [module.forward.__func__ for module in model.modules()]
    rows = {
        name: layer.channel_weight.clone()
        for name, layer in model.named_modules()
        if hasattr(layer, "channels")
    }
    state = torch.get_rng_state()

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        return F.cross_entropy(output, target)

    def given() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches()
        if fails:
            raise KeyboardInterrupt

    try:
        tk.rank_layers(model, given(), loss_fn, learning_rate=0.5)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [module.forward.__func__ for module in model.modules()] == forwards
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    assert all(torch.equal(model.get_submodule(name).channel_weight, value) for name, value in rows.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_run_between_two_steps_of_training_does_not_show() -> None:
    def train(ranks: bool) -> Mapping[str, torch.Tensor]:
        torch.manual_seed(1)
        model = tk.sparsify(net(), batches()[0][0])
        tk.select_fraction(model, 0.3)
        optimizer = torch.optim.Adam(tk.trainable_parameters(model), 0.01)
        for x, target in batches():
            F.cross_entropy(model(x), target).backward()
            if ranks:
                tk.rank_layers(model, batches(), F.cross_entropy, learning_rate=0.1)
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    plain, ranked = train(False), train(True)
    assert all(torch.equal(plain[key], ranked[key]) for key in plain)


def test_agreement_is_spearmans_correlation() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        first, second = (
            {str(name): float(score) for name, score in enumerate(scores)}
            for scores in torch.randint(6, (2, 20), generator=generator)
        )
        expected = stats.spearmanr(list(first.values()), [second[name] for name in first]).statistic
        assert abs(tk.LayerRanking(first).agreement(tk.LayerRanking(second)) - expected) < 1e-12
    with pytest.raises(ValueError, match="other: got a ranking of 1 other layers, expected one of these 20"):
        tk.LayerRanking(first).agreement(tk.LayerRanking({"a": 1.0}))


SCORES = {"a": 1.0, "b": 6.0, "c": 2.0, "d": 0.0, "e": 1.0}


@pytest.mark.parametrize(
    ("cumulative", "expected"),
    [(0.01, "b"), (0.6, "b"), (0.61, "bc"), (0.8, "bc"), (0.9, "bca"), (0.97, "bcae"), (1.0, "bcae")],
)
def test_top_holds_the_share_with_the_fewest_layers(cumulative: float, expected: str) -> None:
    ranking = tk.LayerRanking(SCORES)
    assert list(ranking) == list("bcaed")
    assert ranking.top(cumulative) == list(expected)


def test_top_among_some_layers_is_of_their_own_total() -> None:
    assert tk.LayerRanking(SCORES).top(0.6, among=["a", "c", "e"]) == ["c", "a"]
    assert tk.LayerRanking(SCORES).top() == tk.LayerRanking(SCORES).top(0.97)


def test_saved_rankings_load_as_they_were(tmp_path: Path) -> None:
    ranking = tk.LayerRanking({"a": 0.1, "b": 1 / 3, "c": 1e-300}, metric="lara")
    file = tmp_path / "ranking.json"
    file.write_text("an older one")
    ranking.save(file)
    loaded = tk.LayerRanking.load(file)
    assert (list(loaded.items()), loaded.metric) == (list(ranking.items()), "lara")
    assert os.listdir(tmp_path) == ["ranking.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    file = tmp_path / "ranking.json"
    tk.LayerRanking({"a": 1.0}).save(file)
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match="No space left"):
        tk.LayerRanking({"a": 2.0}).save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["ranking.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "is not a layer ranking of version 1"),
        ('{"format": "other", "version": 1}', "is not a layer ranking of version 1"),
        ('{"format": "trady-layer-ranking", "version": 2}', "is not a layer ranking of version 1"),
        ('{"format": "trady-layer-ranking", "version": 1, "metric": "rgn"}', 'has no "scores" object'),
        (
            '{"format": "trady-layer-ranking", "version": 1, "metric": "rgn", "scores": {"a": "x"}}',
            "is damaged: scores: got 'x' for layer 'a'",
        ),
        (
            '{"format": "trady-layer-ranking", "version": 1, "metric": "best", "scores": {"a": 1}}',
            "is damaged: metric: got 'best'",
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "ranking.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        tk.LayerRanking.load(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_shipped_rankings_belong_to_their_networks() -> None:
    layers = {name for name, module in EfficientNetLite0().named_modules() if isinstance(module, nn.Conv2d)}
    for metric in METRICS:
        ranking = tk.LayerRanking.shipped("efficientnet_lite0", metric)
        assert set(ranking) == layers and ranking.metric == metric
    assert tk.LayerRanking.shipped("efficientnet_lite0").metric == "rgn"
    with pytest.raises(
        ValueError, match=r"name: got 'resnet18', expected one of efficientnet_lite0, minilm$"
    ):
        tk.LayerRanking.shipped("resnet18")
    with pytest.raises(ValueError, match="metric: got 'best', expected one of rgn, lara, norm"):
        tk.LayerRanking.shipped("efficientnet_lite0", "best")
    with torch.device("meta"):
        linears = {name for name, module in MiniLM().named_modules() if isinstance(module, nn.Linear)}
    for metric in METRICS:
        ranking = tk.LayerRanking.shipped("minilm", metric)
        assert set(ranking) == linears - {"classifier"} and ranking.metric == metric


@dataclass(frozen=True)
class Bad:
    name: str
    call: Callable[[nn.Module], Any]
    error: type[Exception]
    message: str


def shaped(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return x.sum() * float("nan")


BAD = (
    Bad(
        "metric",
        lambda m: tk.rank_layers(m, batches(), F.cross_entropy, metric="best"),
        ValueError,
        "metric: got 'best', expected one of rgn, lara, norm",
    ),
    Bad("no batch", lambda m: tk.rank_layers(m, [], F.cross_entropy), ValueError, "batches: got none"),
    Bad(
        "rate",
        lambda m: tk.rank_layers(m, batches(), F.cross_entropy, learning_rate=-1),
        ValueError,
        "learning_rate: got -1, expected",
    ),
    Bad(
        "nan loss",
        lambda m: tk.rank_layers(m, batches(), shaped),
        ValueError,
        "batches: batch 1 has loss nan",
    ),
    Bad(
        "triple",
        lambda m: tk.rank_layers(m, [(*batches()[0], 3)], F.cross_entropy),
        ValueError,
        "batch: got a tuple of 3",
    ),
    Bad(
        "no gradient",
        lambda m: tk.rank_layers(m, batches(), lambda y, t: m.head.bias.sum()),
        ValueError,
        "scores: got 0 layers",
    ),
    Bad("cumulative", lambda m: tk.LayerRanking(SCORES).top(0), ValueError, "cumulative: got 0, expected"),
    Bad(
        "cumulative nan",
        lambda m: tk.LayerRanking(SCORES).top(float("nan")),
        ValueError,
        "cumulative: got nan",
    ),
    Bad("score", lambda m: tk.LayerRanking({"a": float("nan")}), ValueError, "scores: got nan for layer 'a'"),
    Bad("negative", lambda m: tk.LayerRanking({"a": -1.0}), ValueError, "scores: got -1.0 for layer 'a'"),
    Bad(
        "all zero", lambda m: tk.LayerRanking({"a": 0.0}), ValueError, "scores: got 1 layers without a score"
    ),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_input_gets_one_sentence(case: Bad) -> None:
    with pytest.raises(case.error) as caught:
        case.call(net())
    assert str(caught.value).startswith(case.message) and "\n" not in str(caught.value)


def test_json_is_for_other_programs_too(tmp_path: Path) -> None:
    tk.LayerRanking(SCORES).save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert list(content["scores"]) == list("bcaed")
