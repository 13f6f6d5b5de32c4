"""``select()``: which channels train, and what a change of them leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trady_kernels import SparseConv2d, SparseLinear

Layer = SparseConv2d | SparseLinear

LAYERS: dict[str, Any] = {
    "conv": lambda channels: SparseConv2d(6, 4, 3, padding=1, channels=channels),
    "grouped": lambda channels: SparseConv2d(6, 4, 3, padding=1, groups=2, channels=channels),
    "depthwise": lambda channels: SparseConv2d(6, 6, 3, padding=1, groups=6, channels=channels),
    "linear": lambda channels: SparseLinear(6, 4, channels=channels),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


def input_of(layer: Layer) -> torch.Tensor:
    return torch.randn(2, 6, 5, 4) if isinstance(layer, nn.Conv2d) else torch.randn(3, 6)


def all_rows(layer: Layer) -> torch.Tensor:
    return layer.read_rows(layer.weight.detach(), torch.arange(6))


@pytest.mark.parametrize(
    ("channels", "expected"),
    (
        (None, [0, 1, 2, 3, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        (0, []),
        ([], []),
        ((5, 0, 3), [0, 3, 5]),
        (range(1, 4), [1, 2, 3]),
        (torch.tensor([4, 1]), [1, 4]),
        (torch.tensor([4, 1], dtype=torch.uint8), [1, 4]),
        ([torch.tensor(4), 1], [1, 4]),
    ),
    ids=str,
)
def test_accepted_channels(make: Any, channels: Any, expected: list[int]) -> None:
    for layer in (make(channels), make(2)):
        layer.select(channels)
        assert layer.channels.tolist() == expected and layer.channels.dtype == torch.int64
        assert torch.equal(layer.channel_weight, all_rows(layer)[expected])
        assert layer.channel_weight.requires_grad == bool(expected)


def test_random_channels_follow_the_global_generator() -> None:
    layer = SparseConv2d(64, 4, 1, channels=0)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        layer.select(8)
        drawn.append(layer.channels.tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 8


BAD: tuple[tuple[Any, type[Exception], str], ...] = (
    (7, ValueError, "channels: got 7, expected None, an int from 0 to 6"),
    (-1, ValueError, "channels: got -1, expected None"),
    ([0, 6], IndexError, "channels: got index 6, expected"),
    ([-1, 2], IndexError, "channels: got index -1, expected"),
    ([3, 1, 3], ValueError, "channels: got index 3 more than once"),
    (torch.tensor([2, 2]), ValueError, "channels: got index 2 more than once"),
    ([0, 1.0], TypeError, "channels: got 1.0 among the indices"),
    ([True, False], TypeError, "channels: got True among the indices"),
    (True, TypeError, "channels: got True, expected"),
    (2.0, TypeError, "channels: got float, expected"),
    ("02", TypeError, "channels: got '02', expected"),
    ({1, 2}, TypeError, "channels: got set, expected"),
    (torch.tensor([1.0]), TypeError, "channels: got a tensor of torch.float32"),
    (torch.ones(6, dtype=torch.bool), TypeError, "channels: got a tensor of torch.bool"),
    (torch.tensor([[1, 2]]), ValueError, r"channels: got a tensor of shape \(1, 2\)"),
    (torch.tensor(1), ValueError, r"channels: got a tensor of shape \(\)"),
    (object(), TypeError, "channels: got object, expected"),
)


@pytest.mark.parametrize(("channels", "error", "words"), BAD, ids=lambda value: str(value)[:20])
def test_bad_channels_change_nothing(make: Any, channels: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(channels)
    layer = make([1, 4])
    layer(input_of(layer)).sum().backward()
    rows, grad = layer.channel_weight.detach().clone(), layer.channel_weight.grad
    with pytest.raises(error, match=words):
        layer.select(channels)
    assert layer.channels.tolist() == [1, 4] and layer.channel_weight.grad is grad
    assert torch.equal(layer.channel_weight, rows)


def test_bad_optimizer_changes_nothing(make: Any) -> None:
    layer = make([1, 4])
    with pytest.raises(TypeError, match="optimizer: got SequentialLR, expected"):
        sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
        schedules = [torch.optim.lr_scheduler.ConstantLR(sgd) for _ in range(2)]
        layer.select([0], torch.optim.lr_scheduler.SequentialLR(sgd, schedules, [1]))
    assert layer.channels.tolist() == [1, 4]


def test_parameter_stays_the_same_object(make: Any) -> None:
    layer = make([1, 4])
    rows, weight = layer.channel_weight, layer.weight
    for channels in ([0, 2], [3], [], [0, 1, 2, 3, 4, 5]):
        layer.select(channels)
        assert layer.channel_weight is rows and layer.weight is weight
        assert rows.shape[0] == len(channels) and rows.requires_grad == bool(channels)


def test_selection_leaves_forward_and_weight(make: Any) -> None:
    layer = make([1, 4])
    x = input_of(layer)
    before, weight = layer(x), layer.weight.detach().clone()
    for channels in ([0, 2], [], [5], None):
        layer.select(channels)
        assert torch.equal(layer(x), before) and torch.equal(layer.weight, weight)


def test_written_rows_survive_a_select(make: Any) -> None:
    layer = make([1, 4])
    with torch.no_grad():
        layer.channel_weight.fill_(7)
    layer.select([4, 5])
    assert (all_rows(layer)[[1, 4]] == 7).all()
    assert (layer.channel_weight[0] == 7).all() and not (layer.channel_weight[1] == 7).any()


@pytest.mark.parametrize("channels", ([0, 2, 3], [5], [0, 2]), ids=("more", "fewer", "as many"))
def test_select_while_an_earlier_graph_is_alive(make: Any, channels: list[int]) -> None:
    layer = make([1, 4])
    x = input_of(layer)
    alive = layer(x).square().sum()
    alive.backward(retain_graph=True)
    unfinished = layer(x).square().sum()
    layer.select(channels)
    assert layer.channel_weight.grad is None
    layer(x).square().sum().backward()
    dense = layer.to_dense()
    dense(x).square().sum().backward()
    expected = layer.read_rows(dense.weight.grad, layer.channels)
    torch.testing.assert_close(layer.channel_weight.grad, expected)
    # a gradient of the old channels never lands in the new rows
    with pytest.raises(RuntimeError):
        unfinished.backward()
    assert alive.requires_grad


@pytest.mark.parametrize("channels", ([0, 2, 3], [5], [0, 2], []), ids=("more", "fewer", "as many", "none"))
def test_a_gradient_of_the_old_channels_never_becomes_that_of_the_new(make: Any, channels: list[int]) -> None:
    layer = make([1, 4])
    loss = layer(input_of(layer)).sum()
    layer.select(channels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert layer.channel_weight.grad is None


@pytest.mark.parametrize("channels", ([0, 2, 4], [5], [2, 4]), ids=("more", "fewer", "as many"))
def test_channels_selected_in_inference_mode_train(make: Any, channels: list[int]) -> None:
    layer = make([1, 4])
    optimizer = torch.optim.Adam(layer.parameters())
    layer(input_of(layer)).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        layer.select(torch.tensor(channels), optimizer)
        born_inside = make([1, 4])
        born_inside.select(channels)
    layer(input_of(layer)).sum().backward()
    before = layer.channel_weight.detach().clone()
    optimizer.step()
    assert layer.channels.tolist() == born_inside.channels.tolist() == channels
    assert (layer.channel_weight != before).any() and not layer.channels.is_inference()


def test_as_many_channels_keep_addresses_and_hooks(make: Any) -> None:
    layer = make([1, 4])
    rows, channels = layer.channel_weight, layer.channels
    address, seen = rows.data_ptr(), []
    node = rows.view_as(rows).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *_: seen.append(layer.channels.tolist()))
    layer.select([0, 3])
    assert rows.data_ptr() == address and layer.channels is channels
    layer(input_of(layer)).sum().backward()
    assert seen == [[0, 3]]


def test_frozen_rows_stay_frozen(make: Any) -> None:
    layer = make([1, 4])
    layer.channel_weight.requires_grad_(False)
    layer.select([0, 2, 3])
    assert not layer.channel_weight.requires_grad
    layer.select([])
    layer.select([0])
    assert layer.channel_weight.requires_grad


def test_no_channel_has_no_gradient(make: Any) -> None:
    layer = make([1, 4])
    layer(input_of(layer)).sum().backward()
    layer.select([])
    x = input_of(layer).requires_grad_()
    layer(x).sum().backward()
    assert layer.channel_weight.grad is None and x.grad is not None
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type=torch.inf)
    torch.optim.LBFGS([p for p in layer.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "optimizer",
    (
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    ),
    ids=("SGD, momentum, decay", "AdamW, decay"),
)
def test_unselected_weights_are_bit_identical(make: Any, optimizer: Any) -> None:
    layer = make([1, 4])
    opt = optimizer(layer.parameters())

    def train() -> None:
        for _ in range(3):
            opt.zero_grad()
            layer(input_of(layer)).square().sum().backward()
            opt.step()

    for channels, others in (([1, 4], [0, 2, 3, 5]), ([2, 4], [0, 1, 3, 5]), ([], [0, 1, 2, 3, 4, 5])):
        layer.select(channels)
        before = all_rows(layer)
        train()
        after = all_rows(layer)
        assert torch.equal(after[others], before[others])
        assert all(not torch.equal(after[c], before[c]) for c in channels)
