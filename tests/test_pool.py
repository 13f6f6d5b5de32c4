"""Pools: which layers take part, by their places in a ranking or by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_sampler import X, ranking_of, sampler, sparse_net

import trady_kernels as tk
from trady_kernels.cli import main
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Budget, Cost, LayerCost
from trady_kernels.selection import SCHEMES, LayerFractions, Pool, SparseUpdate
from trady_kernels.selection.pool import FirstLayers, NamedLayers, ShareOfCost, ShareOfScore
from trady_kernels.training.settings import Settings

#: Four layers of 10 channels: 10, 20, 30 and 40 elements each channel, 1,000 in all.
LAYERS = {
    name: LayerCost(name, 10, Cost(weight_elements=price - 1, activation_elements=1, macs=1, bytes=4 * price))
    for name, price in (("a.x", 10), ("a.y", 20), ("ab", 30), ("b.z", 40))
}
RANKING = tk.LayerRanking({"b.z": 5.0, "a.x": 3.0, "ab": 1.5, "a.y": 0.5}, metric="lara")


@pytest.mark.parametrize(
    ("text", "pool", "names"),
    [
        ("97%", ShareOfScore(None, 0.97), ["a.x", "a.y", "ab", "b.z"]),
        ("95%", ShareOfScore(None, 0.95), ["a.x", "ab", "b.z"]),
        ("50% by lara", ShareOfScore("lara", 0.5), ["b.z"]),
        ("2 layers", FirstLayers(None, 2), ["a.x", "b.z"]),
        ("1 layer by rgn", FirstLayers("rgn", 1), ["b.z"]),
        ("9 layers", FirstLayers(None, 9), list(LAYERS)),
        # The budget is 100 elements: a fifth of 500, which the first two layers cost; a quarter of 400, the first one's.
        ("alpha 20%", ShareOfCost(None, 0.2), ["a.x", "b.z"]),
        ("alpha 25% by norm", ShareOfCost("norm", 0.25), ["b.z"]),
        ("alpha 12.5%", ShareOfCost(None, 0.125), ["a.x", "ab", "b.z"]),
        ("only a", NamedLayers(None, ("a",)), ["a.x", "a.y"]),
        ("only ab, a.y", NamedLayers(None, ("ab", "a.y")), ["a.y", "ab"]),
        ("without b,a.x", NamedLayers(None, ("b", "a.x"), False), ["a.y", "ab"]),
    ],
)
def test_what_users_write(text: str, pool: Pool, names: list[str]) -> None:
    assert Pool.parse(text) == pool
    assert pool.layers(LAYERS, RANKING, Budget.parse(100)) == names
    if pool.ranked:
        assert pool.layers(LAYERS, None, Budget.parse(100)) == list(LAYERS)


@pytest.mark.parametrize(
    "text", ["", "0%", "101%", "0 layers", "1.5 layers", "all", "only", "alpha 0%", "97", 3, "3 layers by"]
)
def test_what_is_no_pool(text: str) -> None:
    with pytest.raises(ValueError, match=r"pool: got .*, expected \"97%\", \"20 layers\", \"alpha 20%\""):
        Pool.parse(text)


def test_the_schemes_own_pools_are_pools() -> None:
    layers, ranking = sampler().layers, ranking_of(sparse_net())
    for name, pool in (("trady", "97%"), ("s-topk-random", "97%"), ("medyate", "alpha 20%")):
        own = sampler(scheme=name, ranking=ranking, budget=500)
        asked = sampler(scheme=name, ranking=ranking, budget=500, pool=pool)
        assert own.pool == asked.pool and len(own.pool) < len(layers)
        assert all(torch.equal(own.selection[layer], asked.selection[layer]) for layer in layers)


@pytest.mark.parametrize("scheme", [name for name, s in SCHEMES.items() if s.budgeted and not s.given])
def test_every_scheme_draws_from_the_pool_alone(scheme: str) -> None:
    model = sparse_net()
    names = set(sampler(model).layers)
    norms = {name: torch.ones(layer.channels) for name, layer in sampler(model).layers.items()}
    drawn = sampler(model, scheme=scheme, pool="without blocks.0", gradients=lambda: norms)
    reached = set(SCHEMES[scheme]().reach(drawn.layers))
    assert set(drawn.pool) == {name for name in names if not name.startswith("blocks.0.")} & reached
    for _ in range(3):
        drawn.resample()
        chosen = {name for name, channels in drawn.selection.items() if len(channels)}
        assert chosen and chosen <= set(drawn.pool) and drawn.cost.elements <= 2_000


def ranking_by_the_stem() -> tk.LayerRanking:
    return tk.LayerRanking(dict.fromkeys(sparse_layers(sparse_net()), 0.0) | {"stem": 1.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sampler(pool="only blocks.7"),
            r"pool: got 'blocks.7', which is no sparse layer and has none inside",
        ),
        (
            lambda: sampler(pool="2 layers"),
            "ranking: got no ranking for the pool '2 layers', expected one: rank_layers",
        ),
        (
            lambda: sampler(pool="2 layers by lara", ranking=ranking_of(sparse_net())),
            "ranking: got a ranking by rgn for the pool '2 layers by lara', expected one by lara",
        ),
        (
            lambda: sampler(pool="97%", scheme="head-only", budget=None),
            "pool: got '97%' for the scheme head-only, which chooses its layers itself, expected None",
        ),
        (
            lambda: sampler(pool="only stem", scheme="late"),
            "pool: got 'only stem', in which the scheme late has no layer to draw from, expected .* or neck",
        ),
        (
            lambda: sampler(pool=f"without {', '.join(sparse_layers(sparse_net()))}"),
            "pool: got 'without stem, .*', in which the scheme trady has no layer to draw from, expected",
        ),
        (
            lambda: sampler(scheme="late", ranking=ranking_by_the_stem()),
            "pool: got None, in which the scheme late has no layer to draw from, expected",
        ),
        (lambda: sampler(pool="most"), "pool: got 'most', expected"),
        (lambda: Settings(pool="most"), "pool: got 'most', expected"),
    ],
)
def test_bad_pools(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_fractions_that_select_nothing_are_no_bad_pool() -> None:
    """So are schemes without channels, see test_schemes_pools_and_when_they_draw."""
    drawn = sampler(scheme=SparseUpdate(LayerFractions("small", 1, {})))
    assert not drawn.pool and drawn.cost == Cost()


@pytest.mark.parametrize(
    "scheme",
    [
        "trady",
        "medyate",
        SparseUpdate(LayerFractions("small", "50%", {"neck": 0.5}, contributions={"neck": {0.5: 1.0}})),
    ],
    ids=lambda scheme: getattr(scheme, "name", scheme),
)
@pytest.mark.filterwarnings("ignore::trady_kernels.selection.NothingSelected")
def test_a_share_that_rounds_to_nothing_selects_nothing(scheme: str | SparseUpdate) -> None:
    drawn = sampler(scheme=scheme, budget="0.01%", ranking=ranking_of(sparse_net()))
    assert drawn.budget is not None and drawn.budget.limit(drawn.full_cost) == 0
    assert drawn.cost == Cost() and ("nothing is selected" in drawn.report() or not drawn.pool)


def test_a_bad_pool_selects_nothing() -> None:
    model = sparse_net()
    before = {
        name: module.channels.clone() for name, module in model.named_modules() if hasattr(module, "channels")
    }
    with pytest.raises(ValueError, match="pool"):
        tk.ChannelSampler(model, X, budget=100, pool="only nothing")
    assert all(torch.equal(model.get_submodule(name).channels, kept) for name, kept in before.items())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--model", "mobilenet_v2_w035", "--image-size", "32", "--budget", "5%"]
    assert main(["plan", *network, "--pool", "only blocks.16, last"]) == 0
    out = capsys.readouterr().out
    assert "blocks.16.project" in out and "4 of 52" in out
    assert main(["plan", *network, "--pool", "some"]) == 2
    assert "pool: got 'some', expected" in capsys.readouterr().err
