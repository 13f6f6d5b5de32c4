"""``medyate``: its pool, what it observes, and its first three epochs worked out by hand."""

from __future__ import annotations

import copy
import gc
import io
import math
from pathlib import Path

import pytest
import torch
from processes import in_processes, needs_gloo
from test_sampler import X, equal, ranking_of, sampler, sparse_net
from torch import nn

from trady_kernels.convert import sparse_layers
from trady_kernels.memory import measure_memory
from trady_kernels.selection import channel_norms
from trady_kernels.selection.gradient_norms import GradientNorms
from trady_kernels.selection.schemes.medyate import Medyate


def drawn_first(scheme: Medyate, sizes: dict[str, int], draws: int, taken: int = 1) -> torch.Tensor:
    """How often each channel is among the first ``taken``."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([scheme.order(sizes, generator) for _ in range(draws)])
    assert torch.equal(orders.sort(1).values, torch.arange(sum(sizes.values())).expand_as(orders))
    return orders[:, :taken].flatten().bincount(minlength=sum(sizes.values())) / draws


@pytest.mark.parametrize(
    ("budget", "pool"),
    [
        # By score: blocks.1.project costs 696 elements, neck 104, blocks.0.depthwise 816, all eight layers 4398.
        (100, ["blocks.1.project"]),
        (139, ["blocks.1.project"]),
        (140, ["blocks.1.project", "neck"]),
        (160, ["blocks.1.project", "neck"]),
        (161, ["blocks.0.depthwise", "blocks.1.project", "neck"]),
        (1_000, None),
        ("10%", ["blocks.0.depthwise", "blocks.1.project", "neck"]),
    ],
)
def test_the_pool_is_the_least_that_costs_five_times_the_budget(
    budget: int | str, pool: list[str] | None
) -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=budget, ranking=ranking_of(model))
    if budget == "10%":  # 439 elements: five times that is more than the first three layers' 1616
        assert set(pool or ()) < set(drawn.pool)
    else:
        assert drawn.pool == (pool or list(sparse_layers(model)))


def test_without_a_ranking_the_pool_is_every_layer() -> None:
    model = sparse_net()
    assert sampler(model, scheme="medyate", budget=100).pool == list(sparse_layers(model))


def test_the_first_draw_is_uniform() -> None:
    shares = drawn_first(Medyate(), {"a": 3, "b": 5}, 4000)
    assert (shares - 1 / 8).abs().max() < 0.025


def test_measurements_are_not_observed() -> None:
    """What is measured between training steps must not change what is drawn."""
    model = sparse_net()
    drawn = sampler(model, scheme="medyate")
    for _ in range(3):
        model.zero_grad()
        model(X).sum().backward()
    passes = {name: count for name, (_, count) in drawn.state_dict()["gradients"].items()}
    assert passes and set(passes.values()) == {3}
    before = {name: total.clone() for name, (total, _) in drawn.state_dict()["gradients"].items()}
    measure_memory(model, X)
    channel_norms(model, [X], torch.sum)
    after = drawn.state_dict()["gradients"]
    assert {name: count for name, (_, count) in after.items()} == passes
    assert all(torch.equal(after[name][0], total) for name, total in before.items())
    model(X).sum().backward()
    assert {count for _, count in drawn.state_dict()["gradients"].values()} == {4}, (
        "counted again behind them"
    )


def test_three_epochs_by_hand() -> None:
    scheme, sizes = Medyate(), {"a": 2, "b": 3}
    # Epoch 1 trained a's channel 1 and b's 0 and 2: what never trained has the largest norm seen, 4.
    scheme.observe("a", 2, torch.tensor([1]), torch.tensor([1.0]))
    scheme.observe("b", 3, torch.tensor([0, 2]), torch.tensor([4.0, 2.0]))
    expected = torch.tensor([4.0, 1.0, 4.0, 4.0, 2.0])
    shares = drawn_first(scheme, sizes, 6000)
    assert (shares - expected / 15).abs().max() < 0.025
    # Of two that are taken, the second comes in proportion from the four that are left.
    p = expected / 15
    either = p + torch.stack([sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)])
    assert (drawn_first(scheme, sizes, 6000, taken=2) - either).abs().max() < 0.03
    # Epoch 2 trained a's channel 0 and b's 0: only these two are renewed, and the largest seen is 3 now.
    scheme.observe("a", 2, torch.tensor([0]), torch.tensor([3.0]))
    scheme.observe("b", 3, torch.tensor([0]), torch.tensor([0.0]))
    expected = torch.tensor([3.0, 1.0, 0.0, 3.0, 2.0])
    shares = drawn_first(scheme, sizes, 6000)
    assert (shares - expected / 9).abs().max() < 0.025 and shares[2] == 0
    # A layer outside of the pool does not count.
    assert (drawn_first(scheme, {"a": 2}, 4000) - torch.tensor([3 / 4, 1 / 4])).abs().max() < 0.025


def test_gradients_that_are_all_zero_say_nothing() -> None:
    scheme = Medyate()
    scheme.observe("a", 4, torch.tensor([0, 1]), torch.zeros(2))
    assert (drawn_first(scheme, {"a": 4}, 4000) - 1 / 4).abs().max() < 0.025


def test_what_is_observed_is_the_mean_norm_of_each_channels_gradient() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=1_500, seed=1)
    norms: dict[str, list[torch.Tensor]] = {}
    for step in range(3):
        model.zero_grad()
        (model(X + step).square().sum() * (step + 1)).backward()
        for name, layer in sparse_layers(model).items():
            if len(layer.channels):
                assert layer.channel_weight.grad is not None
                norms.setdefault(name, []).append(layer.channel_weight.grad.flatten(1).norm(dim=1))
    selection = drawn.selection
    drawn.resample()
    observed = drawn.state_dict()["observed"]
    assert set(observed) == set(norms) and len(norms) > 3
    for name, of in norms.items():
        seen = observed[name]
        torch.testing.assert_close(seen[selection[name]], torch.stack(of).mean(0).double())
        assert int(seen.isnan().sum()) == len(seen) - len(selection[name])
    assert not drawn.state_dict()["gradients"]


def test_a_pass_that_overflows_is_not_observed() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=1_500, seed=1)
    overflow(model)
    assert not drawn.state_dict()["gradients"]
    train(model)
    before = {name: total for name, (total, _) in drawn.state_dict()["gradients"].items()}
    assert before
    overflow(model)
    after = drawn.state_dict()["gradients"]
    assert all(steps == 1 and torch.equal(total, before[name]) for name, (total, steps) in after.items())
    selection = drawn.selection
    drawn.resample()
    for name, total in before.items():
        assert torch.equal(drawn.state_dict()["observed"][name][selection[name]], total.double())


def test_an_epoch_in_which_every_pass_overflows_says_nothing() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=800)
    overflow(model)
    drawn.resample()
    assert drawn.state_dict()["observed"] == {}


def norms_on_a_rank(rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """Of a gradient that is ``rank + 1`` times that of one process."""
    torch.manual_seed(0)
    layers = sparse_layers(model := sparse_net())
    for layer in layers.values():
        layer.select([0])
    norms = GradientNorms(layers)
    norms.restart()
    (model(X).square().sum() * (rank + 1)).backward()
    return norms.means(), norms.latest()


@needs_gloo
def test_norms_are_means_over_ranks(tmp_path: Path) -> None:
    alone, latest = norms_on_a_rank(0)
    for means, of_all in in_processes(norms_on_a_rank, tmp_path):
        for name, norm in alone.items():
            torch.testing.assert_close(means[name], norm * (1 + 2) / 2)
        assert of_all == pytest.approx(latest * math.sqrt((1 + 4) / 2), rel=1e-5)


def overflowing_norms_on_a_rank(rank: int) -> dict[str, torch.Tensor]:
    """Of one pass on rank 0, none that counts on rank 1."""
    torch.manual_seed(0)
    layers = sparse_layers(model := sparse_net())
    for layer in layers.values():
        layer.select([0])
    norms = GradientNorms(layers)
    norms.restart()
    (train, overflow)[rank](model)
    return norms.means()


@needs_gloo
def test_a_rank_without_a_finite_pass_does_not_count(tmp_path: Path) -> None:
    alone = overflowing_norms_on_a_rank(0)
    assert alone
    for means in in_processes(overflowing_norms_on_a_rank, tmp_path):
        for name, norm in alone.items():
            torch.testing.assert_close(means[name], norm)


def train(model: nn.Module) -> None:
    model.zero_grad()
    model(X).square().sum().backward()


def overflow(model: nn.Module) -> None:
    """A pass as a scale that is too high leaves it."""
    model.zero_grad()
    (model(X).square().sum() * math.inf).backward()


def test_an_interrupted_run_draws_the_same_channels() -> None:
    model, other = sparse_net(), sparse_net()
    drawn = sampler(model, scheme="medyate", budget=800, seed=3)
    train(model)
    drawn.resample()
    train(model)
    file = io.BytesIO()
    torch.save({"sampler": drawn.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    resumed = sampler(other, scheme="medyate", budget=800, seed=99)
    resumed.load_state_dict(state["sampler"])
    for _ in range(3):
        assert equal(resumed.selection, drawn.selection)
        drawn.resample()
        resumed.resample()
        train(model)
        train(other)


def test_a_draw_that_fails_leaves_what_was_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=800)
    train(model)
    before = copy.deepcopy(drawn.state_dict())
    monkeypatch.setattr(drawn, "_draw", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn.resample()
    after = drawn.state_dict()
    assert after["observed"] == before["observed"] == {}
    assert torch.equal(after["generator"], before["generator"])
    assert after["gradients"].keys() == before["gradients"].keys() != set()


@pytest.mark.parametrize("original_first", [True, False])
def test_a_copy_observes_its_own_network(original_first: bool) -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=800)
    train(model)
    other, copied = copy.deepcopy((model, drawn))
    for net, passes in ((model, 3), (other, 2)) if original_first else ((other, 2), (model, 3)):
        for _ in range(passes - 1):
            train(net)
    for one, passes in ((drawn, 3), (copied, 2)):
        assert {steps for _, steps in one.state_dict()["gradients"].values()} == {passes}
    copied.resample()
    assert copied.state_dict()["observed"] and not drawn.state_dict()["observed"]
    rows = [layer.channel_weight for layer in sparse_layers(other).values()]
    assert any(row._post_accumulate_grad_hooks for row in rows)
    del copied, one
    gc.collect()
    assert not any(row._post_accumulate_grad_hooks for row in rows)


def test_a_sampler_that_is_gone_watches_nothing() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="medyate", budget=800)
    rows = [layer.channel_weight for layer in sparse_layers(model).values()]
    assert any(row._post_accumulate_grad_hooks for row in rows)
    del drawn
    gc.collect()
    assert not any(row._post_accumulate_grad_hooks for row in rows)


def test_other_schemes_watch_nothing() -> None:
    model = sparse_net()
    drawn = sampler(model, scheme="trady", budget=800)
    assert not any(
        layer.channel_weight._post_accumulate_grad_hooks for layer in sparse_layers(model).values()
    )
    assert drawn.state_dict()["observed"] == drawn.state_dict()["gradients"] == {}
