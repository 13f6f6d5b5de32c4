"""``channel_norms``: the equations, the budget that it stays inside, and that nobody sees it has run."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from test_ranking import batches, net
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.cost import Budget, measure_layers, total
from trady_kernels.nn.channels import SparseChannels


def sparse_net() -> ResidualNet:
    model = tk.sparsify(net(), batches()[0][0])
    tk.select_fraction(model, 0.3)
    return model


def written_out(model: nn.Module, given: list[Any]) -> dict[str, torch.Tensor]:
    """The norms of the dense network's gradients, channel by channel."""
    dense = tk.densify(copy.deepcopy(model)).eval().requires_grad_(True)
    found = {}
    for name, layer in sparse_layers(model).items():
        found[name] = torch.zeros(layer.channel_count, dtype=torch.float64)
    for x, target in given:
        dense.zero_grad()
        F.cross_entropy(dense(x), target).backward()
        for name, norms in found.items():
            layer = dense.get_submodule(name)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            outputs, per_group = len(layer.weight) // groups, len(norms) // groups
            for channel in range(len(norms)):
                group, index = divmod(channel, per_group)
                rows = layer.weight.grad[group * outputs : (group + 1) * outputs, index]
                norms[channel] += rows.norm() / len(given)
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, norms in expected.items():
        assert found[name].dtype == torch.float64 and found[name].device.type == "cpu"
        # Both are float64 and add the same products in another order; a wrong channel differs in the first digit.
        torch.testing.assert_close(found[name], norms, rtol=1e-9, atol=1e-14, msg=name)


def test_without_a_budget_they_are_those_of_the_dense_gradient() -> None:
    model = sparse_net()
    assert_equal(tk.channel_norms(model, batches(), F.cross_entropy), written_out(model, batches()))


@pytest.mark.parametrize("budget", ["20%", "6KiB", 300])
def test_blocks_that_see_the_same_batch_give_the_whole_gradients_norms(budget: int | str) -> None:
    model, batch = sparse_net(), batches(1)
    found = tk.channel_norms(model, batch * 60, F.cross_entropy, budget=budget)
    assert_equal(found, written_out(model, batch))


def test_every_channel_has_the_mean_of_the_batches_that_measured_it() -> None:
    model, given = sparse_net(), batches(8)
    one = [written_out(model, [batch]) for batch in given]
    found = tk.channel_norms(model, given, F.cross_entropy, budget="30%", seed=1)
    for name, norms in found.items():
        of_each = torch.stack([expected[name] for expected in one])
        assert (norms <= of_each.max(0).values * (1 + 1e-9)).all()
        assert (norms >= of_each.min(0).values * (1 - 1e-9)).all()
    again = tk.channel_norms(model, given, F.cross_entropy, budget="30%", seed=1)
    other = tk.channel_norms(model, given, F.cross_entropy, budget="30%", seed=2)
    assert all(torch.equal(norms, again[name]) for name, norms in found.items())
    assert not all(torch.equal(norms, other[name]) for name, norms in found.items())


class Watch:
    """Storages that every forward saves, and how many rows get a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes: list[int] = []
        self.gradients: list[int] = []
        self._known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def batches(self, batch: Any, count: int) -> Iterator[Any]:
        for _ in range(count):
            self._open: dict[int, int] = {}
            self._kept: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield batch
            self.bytes.append(sum(self._open.values()))

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._open[storage.data_ptr()] = storage.nbytes()
        self._kept.append(tensor.detach())
        return self._kept[-1]


def linear_net() -> nn.Sequential:
    """Nothing between the layers keeps anything: what is saved are inputs of layers."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 24, 1),
        nn.Conv2d(24, 24, 5, padding=2, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("budget", [3_000, "24KiB", "15%"])
def test_what_is_kept_for_backward_stays_inside_the_budget(budget: int | str, ranks: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = tk.sparsify(linear_net(), x, lean=False)
    costs = {name: cost for name, cost in measure_layers(model, x).items() if name in sparse_layers(model)}
    parsed, full = Budget.parse(budget), total(cost.full for cost in costs.values())
    head = 4 * 24 * 4  # its input; the sum below keeps nothing

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum() * 3

    watch = Watch(model)
    if ranks:
        tk.rank_layers(model, watch.batches((x, x), 40), loss_fn, budget=budget, learning_rate=1e-5)
    else:
        tk.channel_norms(model, watch.batches((x, x), 40), loss_fn, budget=budget)
    assert len(watch.bytes) == 40 and max(watch.bytes) > head
    if parsed.kind == "bytes":
        assert max(watch.bytes) - head <= parsed.limit(full)
    else:  # of one sample: a batch keeps four times as much
        assert max(watch.bytes) - head <= 4 * 4 * parsed.limit(full)
    whole = Watch(model)
    tk.channel_norms(model, whole.batches((x, x), 1), loss_fn)
    assert whole.bytes[0] > 2 * max(watch.bytes)


@pytest.mark.parametrize("budget", [None, "20%"])
@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(budget: str | None, fails: bool) -> None:
    model = sparse_net().train()
    model.blocks[0].eval()
    optimizer = torch.optim.Adam(tk.trainable_parameters(model), 0.01)
    loss = model(batches()[0][0]).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    loss = model(batches()[0][0]).sum()  # its graph has to survive
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    layers = sparse_layers(model)
    rows = {name: (layer.channel_weight, layer.channel_weight.clone()) for name, layer in layers.items()}
    channels = {name: layer.channels.clone() for name, layer in layers.items()}
    moments = copy.deepcopy(optimizer.state_dict())
    state = torch.get_rng_state()

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        return F.cross_entropy(output, target)

    def given() -> Iterator[Any]:
        yield from batches(9)
        if fails:
            raise KeyboardInterrupt

    try:
        tk.channel_norms(model, given(), loss_fn, budget=budget)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    for name, layer in layers.items():
        assert layer.channel_weight is rows[name][0] and torch.equal(layer.channel_weight, rows[name][1])
        assert torch.equal(layer.channels, channels[name])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(moments)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss.backward()


@pytest.mark.parametrize("budget", [None, "20%"])
def test_a_forward_that_somebody_put_on_a_layer_stays(budget: str | None) -> None:
    model = sparse_net()
    expected = tk.channel_norms(model, batches(9), F.cross_entropy, budget=budget)
    layer = next(iter(sparse_layers(model).values()))
    wrapper = functools.partial(type(layer).forward, layer)
    layer.forward = wrapper  # type: ignore[method-assign]
    assert_equal(tk.channel_norms(model, batches(9), F.cross_entropy, budget=budget), expected)
    assert vars(layer)["forward"] is wrapper


@pytest.mark.parametrize("metric", ["rgn", "lara"])
def test_blocks_that_see_the_same_batch_rank_as_the_whole_gradient_does(metric: str) -> None:
    model, batch = sparse_net(), batches(1)
    whole = tk.rank_layers(model, batch * 40, F.cross_entropy, metric)
    found = tk.rank_layers(model, batch * 40, F.cross_entropy, metric, budget="20%")
    assert list(found) == list(whole) and found.metric == metric
    assert all(abs(found[name] - score) <= 1e-9 * score for name, score in whole.items())


def test_blocks_on_batches_of_their_own_rank_nearly_as_the_whole_gradient_does() -> None:
    model, given = sparse_net(), batches(80)
    whole = tk.rank_layers(model, given, F.cross_entropy)
    assert tk.rank_layers(model, given, F.cross_entropy, budget="10%").agreement(whole) > 0.9


def test_steps_inside_the_budget_move_the_block_and_leave_no_trace() -> None:
    model = sparse_net()
    before = copy.deepcopy(model.state_dict())
    still = tk.rank_layers(model, batches(30), F.cross_entropy, budget="20%")
    moved = tk.rank_layers(model, batches(30), F.cross_entropy, budget="20%", learning_rate=0.2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert dict(still) != dict(moved)


def test_a_step_is_that_of_sgd_on_the_blocks_channels() -> None:
    """One block of everything that fits: the second batch sees weights one step of full SGD further."""
    model, given = sparse_net(), batches(2)
    whole = tk.rank_layers(model, given, F.cross_entropy, learning_rate=0.3)
    blocks = tk.rank_layers(model, given, F.cross_entropy, learning_rate=0.3, budget="100%")
    assert all(abs(blocks[name] - score) <= 1e-9 * score for name, score in whole.items())


def test_a_layer_called_twice_is_measured_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean((2, 3)))

    batch = batches(1)
    model = tk.sparsify(as_trained(Twice()).double(), batch[0][0])
    found = tk.channel_norms(model, batch * 9, F.cross_entropy, budget="40%")
    assert_equal(found, written_out(model, batch))


@dataclass(frozen=True)
class Bad:
    name: str
    call: Callable[[nn.Module], Any]
    error: type[Exception]
    message: str


BAD = (
    Bad(
        "too few batches",
        lambda m: tk.channel_norms(m, batches(2), F.cross_entropy, budget="20%"),
        ValueError,
        "batches: got 2, expected at least ",
    ),
    Bad(
        "too small",
        lambda m: tk.channel_norms(m, batches(2), F.cross_entropy, budget=10),
        ValueError,
        "budget: got 10 elements, expected at least ",
    ),
    Bad(
        "too small to rank",
        lambda m: tk.rank_layers(m, batches(2), F.cross_entropy, budget="20 B"),
        ValueError,
        "budget: got 20 bytes, expected at least ",
    ),
    Bad(
        "no number",
        lambda m: tk.channel_norms(m, batches(2), F.cross_entropy, budget="much"),
        ValueError,
        "budget: got 'much', expected",
    ),
    Bad(
        "none",
        lambda m: tk.channel_norms(m, [], F.cross_entropy, budget="20%"),
        ValueError,
        "batches: got none",
    ),
    Bad(
        "dense",
        lambda m: tk.channel_norms(net(), batches(), F.cross_entropy),
        ValueError,
        "model: got a ResidualNet without sparse layers",
    ),
    Bad(
        "nan",
        lambda m: tk.channel_norms(m, batches(), lambda y, t: y.sum() * float("nan"), budget="20%"),
        ValueError,
        "batches: batch 1 has loss nan",
    ),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_input_gets_one_sentence(case: Bad) -> None:
    model = sparse_net()
    with pytest.raises(case.error) as caught:
        case.call(model)
    assert str(caught.value).startswith(case.message) and "\n" not in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_without_a_gradient_have_norms_of_zero() -> None:
    model = sparse_net()
    found = tk.channel_norms(
        model, itertools.repeat(batches(1)[0], 40), lambda y, t: model.head.bias.sum(), budget="20%"
    )
    assert all(isinstance(layer, SparseChannels) for layer in sparse_layers(model).values())
    assert all(not norms.any() for norms in found.values())
