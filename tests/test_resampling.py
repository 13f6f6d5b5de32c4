"""When a sampler draws again: by epoch, by steps, by what is left of the gradient."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from test_sampler import X, check_that_state_follows, equal, sampler, sparse_net
from torch import nn

from trady_kernels.convert import sparse_layers
from trady_kernels.selection.resampling import Resampling, SinceDraw


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("epoch", Resampling()),
        ("2 epochs", Resampling("epoch", 2)),
        ("1 step", Resampling("steps", 1)),
        ("50 steps", Resampling("steps", 50)),
        ("norm 60%", Resampling("norm", 0.6)),
        ("norm 12.5%", Resampling("norm", 0.125)),
    ],
)
def test_rules_read_as_they_print(text: str, rule: Resampling) -> None:
    assert Resampling.parse(text) == rule
    assert Resampling.parse(str(rule).replace("1 steps", "1 step")) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0 epochs",
        "epochs",
        "steps",
        "0 steps",
        "-3 steps",
        "2.5 steps",
        "norm",
        "norm 0%",
        "norm 100%",
        None,
        5,
    ],
)
def test_other_words_are_refused(text: object) -> None:
    with pytest.raises(
        ValueError, match=r'resampling: got .*, expected "epoch", "2 epochs", "50 steps" or "norm 60%"'
    ):
        sampler(resampling=text)


def test_by_epoch_a_step_draws_nothing() -> None:
    drawn = sampler()
    before = drawn.selection
    assert not any(drawn.step() for _ in range(20)) and equal(drawn.selection, before)


def test_every_third_epoch_also_after_a_checkpoint() -> None:
    drawn, again = (sampler(resampling="3 epochs") for _ in range(2))
    for epoch in range(1, 10):
        before = drawn.selection
        again.load_state_dict(drawn.state_dict())
        drawn.resample()
        again.resample()
        assert equal(again.selection, drawn.selection)
        assert equal(before, drawn.selection) == (epoch % 3 > 0)
        assert not drawn.step()


def test_every_third_step() -> None:
    drawn = sampler(resampling="3 steps")
    selections, draws = [drawn.selection], []
    for _ in range(9):
        draws.append(drawn.step())
        selections.append(drawn.selection)
    assert draws == [False, False, True] * 3
    changed = [not equal(a, b) for a, b in pairwise(selections)]
    assert changed == draws


def test_a_scheme_that_draws_once_never_draws_again() -> None:
    drawn = sampler(scheme="s-topk-random", resampling="1 step")
    assert not any(drawn.step() for _ in range(5))


def test_norm_is_of_the_mean_of_five_steps() -> None:
    rule, seen = Resampling("norm", 0.5), SinceDraw()
    norms = [10.0, 12.0, 8.0, 10.0, 10.0, 6.0, 4.0, 5.0, 5.0, 5.1, 4.0]
    due = []
    for norm in (math.nan, *norms[:3], math.inf, *norms[3:]):  # what overflowed is no step
        seen.note(norm)
        if not math.isfinite(norm):
            assert not seen.is_due(rule)
            continue
        due.append(seen.is_due(rule))
    # The latest five are 6 to 5.1, over half of ten, and then 4, 5, 5, 5.1, 4.
    assert due == [False] * 10 + [True]


def scaled_step(model: nn.Module, factor: float) -> float:
    """A backward pass whose gradient is ``factor`` times that of the network's output; its norm over the rows."""
    model.zero_grad()
    (model(X).sum() * factor).backward()
    rows = [layer.channel_weight.grad for layer in sparse_layers(model).values() if len(layer.channels)]
    return float(torch.cat([row.flatten() for row in rows if row is not None]).norm())


def test_a_gradient_that_shrinks_asks_for_new_channels() -> None:
    model = sparse_net()
    drawn = sampler(model, resampling="norm 50%")
    noted = []
    for factor in (1.0,) * 5 + (0.6,) * 5 + (0.3,):
        noted.append(scaled_step(model, factor))
        assert not drawn.step()
    assert drawn.state_dict()["since_draw"]["first"] == pytest.approx(noted[:5])
    assert drawn.state_dict()["since_draw"]["last"] == pytest.approx(noted[-5:])
    before = drawn.selection
    scaled_step(model, 0.1)  # 0.6, 0.6, 0.6, 0.3, 0.1: less than half of five
    assert drawn.step() and not equal(drawn.selection, before)
    assert drawn.state_dict()["since_draw"] == SinceDraw().state_dict()


def test_a_step_that_overflows_does_not_switch_the_rule_off() -> None:
    model = sparse_net()
    drawn = sampler(model, resampling="norm 50%")
    for factor in (math.inf, *(1.0,) * 3, math.nan, *(1.0,) * 2, *(0.1,) * 4):
        scaled_step(model, factor)
        assert not drawn.step()
    scaled_step(model, 0.1)
    assert drawn.step()


def test_an_interrupted_run_draws_at_the_same_step() -> None:
    drawn = sampler(resampling="4 steps", seed=5)
    drawn.step()
    drawn.step()
    drawn.step()
    file = io.BytesIO()
    torch.save(drawn.state_dict(), file)
    file.seek(0)
    resumed = sampler(resampling="4 steps", seed=6)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert drawn.step() and resumed.step() and equal(drawn.selection, resumed.selection)
    with pytest.raises(ValueError, match="got resampling '4 steps', expected 'epoch'"):
        sampler().load_state_dict(drawn.state_dict())


def test_the_optimizers_state_follows() -> None:
    model = sparse_net()
    check_that_state_follows(model, sampler(model, resampling="1 step").step)
