"""What both sparse layers share: rows and weight, state_dict, copies, functional_call."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from trady_kernels import SparseConv2d, SparseLinear, trainable_parameters
from trady_kernels.nn.channels import SparseChannels

Layer = SparseConv2d | SparseLinear

DENSE: dict[str, Callable[[], Any]] = {
    "conv": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "grouped": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "linear": lambda: nn.Linear(6, 4),
}


@pytest.fixture(params=DENSE)
def dense(request: pytest.FixtureRequest) -> Any:
    return DENSE[request.param]()


def sparse_of(dense: nn.Module, channels: Any = (1, 4)) -> Layer:
    cls = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear
    return cls.from_dense(dense, channels)  # type: ignore[arg-type]


def input_of(layer: nn.Module) -> torch.Tensor:
    dtype = layer.weight.dtype  # type: ignore[union-attr]
    size = (2, 6, 5, 4) if isinstance(layer, nn.Conv2d) else (3, 6)
    return torch.randn(*size, dtype=dtype)  # type: ignore[arg-type]


def assert_agree(layer: Layer) -> None:
    rows = layer.read_rows(layer.weight.detach(), layer.channels)
    torch.testing.assert_close(layer.channel_weight.detach(), rows, rtol=0, atol=0)


# -- construction ----------------------------------------------------------------------------------


def test_constructed_as_dense(dense: Any) -> None:
    cls = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear
    arguments = (6, 4, 3) if isinstance(dense, nn.Conv2d) else (6, 4)
    torch.manual_seed(3)
    reference = type(dense)(*arguments)
    torch.manual_seed(3)
    layer = cls(*arguments, channels=[5, 0])
    assert isinstance(layer, type(dense))
    torch.testing.assert_close(layer.weight, reference.weight.detach(), rtol=0, atol=0)
    assert layer.channels.tolist() == [0, 5] and layer.channels.dtype == torch.int64
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert layer.channel_weight.requires_grad and layer.channel_weight.is_contiguous()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "channel_weight"]
    assert_agree(layer)


def test_complex_weights_are_refused() -> None:
    makers = (
        lambda: SparseLinear(4, 6, dtype=torch.complex64),
        lambda: SparseConv2d.from_dense(nn.Conv2d(2, 2, 1, dtype=torch.complex64)),
        lambda: setattr(SparseLinear(2, 2), "weight", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))),
    )
    for make in makers:
        with pytest.raises(
            TypeError, match=r"^dtype: got torch\.complex64, expected a real floating-point type"
        ):
            make()


def test_row_shapes() -> None:
    assert SparseConv2d(8, 12, (3, 2), groups=4, channels=3).channel_weight.shape == (3, 3, 3, 2)
    assert SparseLinear(8, 5, channels=3).channel_weight.shape == (3, 5)
    assert SparseLinear(8, 5).channel_weight.shape == (8, 5)


def test_dense_round_trip_is_exact(dense: Any) -> None:
    dense.eval()
    if dense.bias is not None:
        dense.bias.requires_grad_(False)
    layer = sparse_of(dense)
    assert not layer.training and dense.weight.requires_grad
    assert dense.weight.data_ptr() != layer.weight.data_ptr()
    back = layer.to_dense()
    assert type(back) is type(dense) and not back.training and back.weight.requires_grad
    assert str(back) == str(dense)
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value) and torch.equal(layer.state_dict()[name], value)
    if dense.bias is not None:
        assert not back.bias.requires_grad and layer.bias is not None and not layer.bias.requires_grad
    with torch.no_grad():
        layer.channel_weight.add_(1)
    changed = layer.to_dense()
    assert torch.equal(layer.read_rows(changed.weight.detach(), layer.channels), layer.channel_weight)


def test_from_dense_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Conv2d"):
        SparseConv2d.from_dense(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an nn\.Linear"):
        SparseLinear.from_dense(nn.Conv2d(2, 2, 1))  # type: ignore[arg-type]


def test_from_dense_refuses_another_forward(dense: Any) -> None:
    class Renamed(type(dense)):  # type: ignore[misc]
        """Computes as the class it is derived from."""

    class Doubled(Renamed):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    x = input_of(dense)
    expected = dense(x)
    dense.__class__ = Renamed
    assert torch.equal(sparse_of(dense)(x), expected)
    assert torch.equal(sparse_of(sparse_of(dense))(x), expected)
    dense.__class__ = Doubled
    with pytest.raises(
        TypeError, match=r"^module: got a Doubled with a forward of its own, expected that of nn\."
    ):
        sparse_of(dense)
    dense.__class__ = Renamed
    dense.forward = lambda x: 2 * x
    with pytest.raises(TypeError, match=r"^module: got a Renamed with a forward of its own"):
        sparse_of(dense)


# -- rows and weight -------------------------------------------------------------------------------


def test_rows_reach_weight_after_every_step(dense: Any) -> None:
    layer = sparse_of(dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        before = layer.weight.detach().clone()
        layer(input_of(layer)).square().sum().backward()
        optimizer.step()
        assert_agree(layer)
        changed = (layer.weight != before).transpose(0, 1) if layer.weight.shape[1] == 6 else None
        if changed is not None:
            assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [1, 4]
        optimizer.zero_grad()


def test_step_through_data_is_seen(dense: Any) -> None:
    class DataSGD(torch.optim.Optimizer):
        """Optimisers outside torch often write through ``.data``, past the version counter."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.data, alpha=-0.1)

    layer = sparse_of(dense)
    layer(input_of(layer)).square().sum().backward()
    before = layer.channel_weight.detach().clone()
    DataSGD(layer.parameters()).step()
    assert not torch.equal(before, layer.channel_weight)
    assert_agree(layer)


def test_written_rows_reach_weight_at_next_use(dense: Any) -> None:
    layer = sparse_of(dense)
    for use in (
        lambda: layer(input_of(layer)),
        layer.state_dict,
        layer.synchronize,
        lambda: layer.select([0]),
    ):
        with torch.no_grad():
            layer.channel_weight.add_(1)
        rows, channels = layer.channel_weight.detach().clone(), layer.channels.clone()
        use()
        assert torch.equal(layer.read_rows(layer.weight.detach(), channels), rows)


def test_written_weight_wins_over_rows(dense: Any) -> None:
    layer = sparse_of(dense)
    nn.init.normal_(layer.weight)
    written = layer.weight.detach().clone()
    layer(input_of(layer))
    assert torch.equal(layer.weight, written)
    assert_agree(layer)
    layer.weight = nn.Parameter(torch.ones_like(written))
    assert not layer.weight.requires_grad
    assert torch.equal(layer.channel_weight, torch.ones_like(layer.channel_weight))
    layer.reset_parameters()
    layer.weight.mul_(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.channel_weight.grad = torch.zeros_like(layer.channel_weight)
    written = layer.weight.detach().clone()
    optimizer.step()  # without a forward in between
    assert torch.equal(layer.weight, written)


def test_initialisation_through_data_is_seen(dense: Any) -> None:
    layer = sparse_of(dense)
    layer.weight.data.normal_()
    written = layer.weight.detach().clone()
    layer(input_of(layer))
    assert torch.equal(layer.weight, written)
    assert_agree(layer)


def test_both_written_is_an_error(dense: Any) -> None:
    layer = sparse_of(dense)
    layer(input_of(layer))
    with torch.no_grad():
        layer.weight.add_(1)
        layer.channel_weight.add_(2)
    for use in (lambda: layer(input_of(layer)), layer.state_dict, lambda: layer.select([0])):
        with pytest.raises(RuntimeError, match="weight and channel_weight were both written"):
            use()
    layer.load_state_dict(dense.state_dict())
    layer(input_of(layer))
    assert_agree(layer)
    assert torch.equal(layer.weight, dense.weight)


def test_initialising_every_parameter_is_an_error_that_says_what_to_do(dense: Any) -> None:
    layer = sparse_of(dense)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(RuntimeError, match=r"both written .* initialise weight alone, whose rows follow"):
        layer(input_of(layer))


def test_optimiser_that_writes_frozen_parameters_too(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"both written .* give optimisers trainable_parameters\(model\)"):
        optimizer.step(closure)  # type: ignore[arg-type]
    layer = sparse_of(dense)
    optimizer = torch.optim.LBFGS(trainable_parameters(layer), max_iter=2)
    optimizer.step(closure)  # type: ignore[arg-type]
    assert_agree(layer)


PAST_ASSIGNMENT: dict[str, Callable[[Layer, str, nn.Parameter], object]] = {
    "register_parameter": lambda layer, name, value: layer.register_parameter(name, value),
    "_parameters": lambda layer, name, value: layer._parameters.update({name: value}),
}


@pytest.mark.parametrize("way", PAST_ASSIGNMENT)
def test_weight_replaced_past_assignment_trains(dense: Any, way: str) -> None:
    layer = sparse_of(dense)
    rows = layer.channel_weight
    layer(input_of(layer))
    weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    PAST_ASSIGNMENT[way](layer, "weight", weight)
    twin = copy.deepcopy(dense)
    twin.weight = nn.Parameter(weight.detach().clone())
    sgd, twin_sgd = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (layer, twin))
    with torch.no_grad():
        assert torch.equal(layer(input_of(layer).zero_()), twin(input_of(layer).zero_()))
    for _ in range(2):
        x = input_of(layer)
        layer(x).square().mean().backward()
        twin(x).square().mean().backward()
        for optimizer in (sgd, twin_sgd):
            optimizer.step()
            optimizer.zero_grad()
        others = [0, 2, 3, 5]
        with torch.no_grad():  # only the selected rows train
            start = layer.read_rows(weight.detach(), torch.tensor(others))
            layer.write_rows(twin.weight, torch.tensor(others), start)
    assert layer.weight is weight and layer.channel_weight is rows and not weight.requires_grad
    torch.testing.assert_close(layer.state_dict()["weight"], twin.weight.detach())
    assert_agree(layer)


@pytest.mark.parametrize("way", PAST_ASSIGNMENT)
@pytest.mark.parametrize("use", (nn.Module.state_dict, copy.deepcopy, SparseChannels.synchronize))
def test_rows_replaced_past_assignment_are_taken(dense: Any, way: str, use: Any) -> None:
    layer = sparse_of(dense)
    layer(input_of(layer))
    rows = nn.Parameter(torch.ones_like(layer.channel_weight))
    PAST_ASSIGNMENT[way](layer, "channel_weight", rows)
    use(layer)
    assert layer.channel_weight is rows and (rows == 1).all()
    assert_agree(layer)
    torch.optim.SGD([rows], lr=0.1).step(lambda: layer(input_of(layer)).sum().backward())  # type: ignore[arg-type, return-value]
    assert_agree(layer)
    layer._parameters["channel_weight"] = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"channel_weight: got shape \(3,\), expected"):
        use(layer)


def test_two_forwards_before_one_backward(dense: Any) -> None:
    layer = sparse_of(dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        x = input_of(layer).requires_grad_()
        (layer(x).sum() + layer(2 * x).square().sum()).backward()
        optimizer.step()
        layer(x)


def test_gradient_accumulation_equals_dense(dense: Any) -> None:
    layer = sparse_of(dense)
    xs = [input_of(layer) for _ in range(3)]
    for x in xs:
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
    expected = layer.read_rows(dense.weight.grad, layer.channels)
    torch.testing.assert_close(layer.channel_weight.grad, expected)


def test_step_between_forward_and_backward_raises(dense: Any) -> None:
    for layer in (dense, sparse_of(dense)):
        x = input_of(layer).requires_grad_()
        first, second = layer(x).sum(), layer(x).sum()
        first.backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(dense: Any, use_reentrant: bool) -> None:
    layer = sparse_of(dense)
    x = input_of(layer).requires_grad_()
    layer(x).square().sum().backward()
    expected, layer.channel_weight.grad = layer.channel_weight.grad, None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()  # type: ignore[union-attr]
    torch.testing.assert_close(layer.channel_weight.grad, expected, rtol=0, atol=0)


def test_inference_mode(dense: Any) -> None:
    layer = sparse_of(dense)
    with torch.no_grad():
        layer.channel_weight.add_(1)
    with torch.inference_mode():
        output = layer(input_of(layer))
        born_inside = sparse_of(dense)
        born_inside(input_of(layer))
    assert_agree(layer)
    assert not output.requires_grad


# -- state_dict and copies -------------------------------------------------------------------------


@pytest.mark.parametrize("assign", (False, True))
def test_state_dict_is_interchangeable(dense: Any, assign: bool) -> None:
    layer = sparse_of(dense)
    with torch.no_grad():
        layer.channel_weight.mul_(3)
    state = layer.state_dict()
    assert list(state) == list(dense.state_dict())
    assert torch.equal(layer.read_rows(state["weight"], layer.channels), layer.channel_weight)
    dense.load_state_dict(state, strict=True)
    other = sparse_of(DENSE["linear"]() if isinstance(dense, nn.Linear) else copy.deepcopy(dense), [0, 2, 3])
    rows = other.channel_weight
    with torch.no_grad():
        rows.add_(1)
    other.load_state_dict(
        {name: value.clone() for name, value in dense.state_dict().items()}, strict=True, assign=assign
    )
    assert other.channel_weight is rows and not other.weight.requires_grad
    assert_agree(other)
    x = input_of(dense)
    assert torch.equal(other(x), dense(x)) and torch.equal(other(x), layer(x))
    assert_agree(other)


def test_load_state_dict_is_strict(dense: Any) -> None:
    layer = sparse_of(dense)
    state = dense.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "channel_weight"'):
        layer.load_state_dict({**state, "channel_weight": layer.channel_weight.detach()})
    del state["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(state)
    with torch.no_grad():
        layer.channel_weight.add_(1)
    rows = layer.channel_weight.detach().clone()
    layer.load_state_dict(state, strict=False)  # no weight in it: the written rows stay
    assert torch.equal(rows, layer.channel_weight)
    assert_agree(layer)


@pytest.mark.parametrize("way", ("load_state_dict", "assignment"))
def test_rows_take_the_dtype_of_an_assigned_weight(dense: Any, way: str) -> None:
    layer = sparse_of(dense)
    rows = layer.channel_weight
    alive = layer(input_of(layer)).sum()
    alive.backward(retain_graph=True)
    state = {name: value.double() for name, value in dense.state_dict().items()}
    if way == "load_state_dict":
        layer.load_state_dict(state, assign=True)
    else:
        for name, value in state.items():
            setattr(layer, name, nn.Parameter(value))
    assert layer.channel_weight is rows and rows.dtype == torch.float64 and rows.grad is None
    assert_agree(layer)
    optimizer = torch.optim.SGD([rows], lr=0.1)
    x = input_of(layer)
    assert x.dtype == torch.float64 and torch.equal(layer(x), copy.deepcopy(dense).double()(x))
    layer(x).square().sum().backward()
    optimizer.step()
    layer(x)
    assert_agree(layer)


def test_load_through_a_network() -> None:
    def network(conv: Any, linear: Any) -> nn.Sequential:
        return nn.Sequential(conv(3, 8, 3), nn.Flatten(), linear(8 * 9, 5))

    dense, sparse = network(nn.Conv2d, nn.Linear), network(SparseConv2d, SparseLinear)
    x = torch.randn(2, 3, 5, 5)
    assert sparse.load_state_dict(dense.state_dict()).missing_keys == []
    assert torch.equal(sparse(x), dense(x))
    torch.optim.SGD(sparse.parameters(), lr=0.1).step(lambda: sparse(x).sum().backward())  # type: ignore[arg-type, return-value]
    dense.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse(x), dense(x))


COPIES: dict[str, Callable[[Layer], Layer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _saved_and_loaded(layer),
}


def _saved_and_loaded(layer: Layer) -> Layer:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_copies_live_on_their_own(dense: Any, way: str) -> None:
    layer = sparse_of(dense)
    with torch.no_grad():
        layer.channel_weight.add_(1)
    other = COPIES[way](layer)
    x = input_of(layer)
    assert torch.equal(other(x), layer(x)) and other.channels.tolist() == [1, 4]
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(x).sum().backward()
    optimizer.step()
    other.select([0])
    assert_agree(other)
    assert torch.equal(layer.weight, before) and layer.channels.tolist() == [1, 4]
    assert not torch.equal(other.weight, before)


def test_shallow_copy_shares_and_the_original_goes_on(dense: Any) -> None:
    layer = sparse_of(dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def train(layer: Layer, channels: list[int]) -> None:
        layer.select(channels)
        x = input_of(layer).requires_grad_()
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert layer.read_rows(layer.weight.detach(), layer.channels).equal(layer.channel_weight)
        assert optimizer.state[layer.channel_weight]["momentum_buffer"].shape == layer.channel_weight.shape

    other = copy.copy(layer)
    for channels in ([1, 4], [0], [0, 2, 3]):
        for one in (layer, other):
            train(one, channels)
    x = input_of(layer).requires_grad_()
    (layer(x).sum() + other(x).sum()).backward()  # neither writes to what the other has saved
    assert copy.copy(other).weight is layer.weight
    del other
    gc.collect()
    train(layer, [1])
    other = copy.copy(layer)
    del layer
    gc.collect()
    train(other, [1, 5])
    train(other, [2])


@pytest.mark.parametrize("change", ("half", "double", "bfloat16", "channels_last", "share_memory"))
def test_conversions(dense: Any, change: str) -> None:
    layer = sparse_of(dense)
    rows = layer.channel_weight
    with torch.no_grad():
        rows.add_(1)
    expected = rows.detach().clone()
    if change == "channels_last":
        layer.to(memory_format=torch.channels_last)
    else:
        getattr(layer, change)()
    assert layer.channel_weight is rows and rows.dtype == layer.weight.dtype
    assert layer.channels.dtype == torch.int64
    torch.testing.assert_close(rows.detach(), expected.to(rows.dtype), rtol=0, atol=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(input_of(layer)).sum().backward()
    optimizer.step()
    layer(input_of(layer))
    assert_agree(layer)


def test_meta_and_to_empty_keep_the_channels(dense: Any) -> None:
    layer = sparse_of(dense).to("meta")
    assert layer.weight.is_meta and layer.channels.tolist() == [1, 4]
    layer.to_empty(device="cpu")
    assert layer.channels.tolist() == [1, 4]
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer(input_of(layer).zero_()), dense(input_of(dense).zero_()))
    assert_agree(layer)
    layer = sparse_of(dense).to("meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert_agree(layer)
    layer(input_of(layer)).sum().backward()
    assert layer.channel_weight.grad is not None


@pytest.mark.parametrize(
    ("channels", "expected"),
    ((None, [0, 1, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), ([4, 1], [1, 4]), (np.array([4, 1]), [1, 4])),
    ids=str,
)
def test_the_default_device_may_be_meta(channels: Any, expected: list[int]) -> None:
    with torch.device("meta"):
        layers = SparseConv2d(6, 4, 3, channels=channels), SparseLinear(6, 4, channels=channels)
    for layer in layers:
        assert layer.weight.is_meta and layer.channels.tolist() == expected
        assert layer.channel_weight.is_meta and len(layer.channel_weight) == len(expected)


def test_swapped_parameters(dense: Any) -> None:
    layer = sparse_of(dense)
    rows = layer.channel_weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
        layer.load_state_dict(dense.double().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.channel_weight is rows
    x = input_of(layer)
    assert torch.equal(layer(x), dense(x))
    torch.optim.SGD([rows], lr=0.1).step(lambda: layer(x).sum().backward())
    assert_agree(layer)


def test_averaged_model(dense: Any) -> None:
    layer = sparse_of(dense)
    average = AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    reference = layer.weight.detach().clone()
    for i in range(4):
        layer(input_of(layer)).square().mean().backward()
        optimizer.step()
        average.update_parameters(layer)
        reference = layer.weight.detach().clone() if i == 0 else reference.lerp(layer.weight.detach(), 0.1)
        average(input_of(layer))
        torch.testing.assert_close(average.module.weight.detach(), reference)
        assert_agree(average.module)  # type: ignore[arg-type]


def test_averaging_over_a_select_is_an_error_not_a_mixture(dense: Any) -> None:
    layer = sparse_of(dense)
    average = AveragedModel(layer)
    average.update_parameters(layer)
    average(input_of(layer))
    layer.select([0, 5])
    with torch.no_grad():
        layer.channel_weight.add_(1)
        layer.synchronize()
    average.update_parameters(layer)
    with pytest.raises(RuntimeError, match="both written"):
        average(input_of(layer))


def test_average_of_state_dicts_over_selects(dense: Any) -> None:
    layer = sparse_of(dense)
    average = {name: value.clone() for name, value in layer.state_dict().items()}
    reference, optimizer = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
    for channels in ([1, 4], [0, 5], [2]):
        layer.select(channels, optimizer)
        optimizer.zero_grad()
        layer(input_of(layer)).square().mean().backward()
        optimizer.step()
        for name, value in layer.state_dict().items():
            average[name].lerp_(value, 0.1)
        reference.lerp_(layer.to_dense().weight.detach(), 0.1)
    other = copy.deepcopy(layer)
    other.load_state_dict(average)
    assert torch.equal(other.weight, reference)
    assert_agree(other)


# -- functional_call -------------------------------------------------------------------------------


def test_functional_call_is_for_that_call_alone(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)
    own, before = layer(x), layer.weight.detach().clone()
    rows = torch.randn_like(layer.channel_weight).requires_grad_()
    output = torch.func.functional_call(layer, {"channel_weight": rows}, (x,))
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.channel_weight.copy_(rows)
    assert torch.equal(output, expected(x)) and not torch.equal(output, own)
    output.square().sum().backward()
    expected(x).square().sum().backward()
    torch.testing.assert_close(rows.grad, expected.channel_weight.grad)
    assert layer.channel_weight.grad is None and torch.equal(layer.weight, before)
    assert torch.equal(layer(x), own)


def test_torch_func_grad(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)
    parameters = {name: value.detach().clone() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    x = x.requires_grad_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads["channel_weight"], layer.channel_weight.grad)
    torch.testing.assert_close(grad_x, x.grad)
    assert grads["weight"].abs().sum() == 0


def test_functional_call_with_the_keys_of_a_state_dict(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)
    other = copy.deepcopy(dense)
    nn.init.normal_(other.weight)
    before = layer.weight.detach().clone()
    x.requires_grad_()
    output = torch.func.functional_call(layer, other.state_dict(), (x,))
    assert torch.equal(output, other(x))
    output.square().sum().backward()  # the layer's own rows took no part
    assert layer.channel_weight.grad is None and torch.equal(layer.weight, before)
    expected = x.grad
    x.grad = None
    other(x).square().sum().backward()
    torch.testing.assert_close(expected, x.grad)
    with torch.no_grad():
        lent = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(lent, output)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    for call in (loss, torch.func.grad(loss)):
        with pytest.raises(
            RuntimeError, match=r"^weight: got one that requires grad in the place of the layer's own"
        ):
            call(dict(other.named_parameters()))
    assert_agree(layer)


def test_forward_mode_is_refused_while_something_trains(dense: Any) -> None:
    layer = sparse_of(dense)
    x, tangent = input_of(layer), input_of(layer)
    with pytest.raises(NotImplementedError, match="sparse and lean layers have no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (tangent,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="sparse and lean layers have no forward-mode derivative"),
    ):
        layer(forward_ad.make_dual(x, tangent))
    with torch.no_grad():
        output, derivative = torch.func.jvp(layer, (x,), (tangent,))
        expected = torch.func.jvp(dense, (x,), (tangent,))
    assert torch.equal(output, expected[0]) and torch.equal(derivative, expected[1])


def test_second_derivatives_through_torch_func_are_refused(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    layer.requires_grad_(False)
    grad = torch.func.grad(loss)(x)
    assert not grad.requires_grad  # nothing outside asked for a graph
    with pytest.raises(RuntimeError, match="has no double backward"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    x.requires_grad_()
    outer = torch.func.grad(loss)(x)
    torch.testing.assert_close(outer, grad)
    with pytest.raises(RuntimeError, match="has no double backward"):
        outer.sum().backward()


# -- what else handles modules ---------------------------------------------------------------------


def test_assigned_rows_are_taken(dense: Any) -> None:
    layer = sparse_of(dense)
    rows = nn.Parameter(torch.ones_like(layer.channel_weight))
    layer.channel_weight = rows
    assert layer.channel_weight is rows
    assert_agree(layer)
    torch.optim.SGD([rows], lr=0.1).step(lambda: layer(input_of(layer)).sum().backward())  # type: ignore[arg-type, return-value]
    assert_agree(layer)
    for name in ("weight", "channel_weight"):
        with pytest.raises(ValueError, match=rf"{name}: got shape \(3,\), expected"):
            setattr(layer, name, nn.Parameter(torch.zeros(3)))
    assert layer.channel_weight is rows


class Negative(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


COMPUTED: dict[str, Callable[[Layer, str], object]] = {
    "parametrised": lambda layer, name: parametrize.register_parametrization(layer, name, Negative()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
    "pruned": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
}


@pytest.mark.parametrize("name", ("weight", "channel_weight"))
@pytest.mark.parametrize("way", COMPUTED)
def test_computed_parameters_are_refused(dense: Any, way: str, name: str) -> None:
    layer = sparse_of(dense)
    COMPUTED[way](layer, name)
    with pytest.raises(RuntimeError, match=rf"^{name}: got a tensor that is computed from others, expected"):
        layer(input_of(layer))


def test_copies_for_data_parallel_give_gradients(dense: Any) -> None:
    layer = sparse_of(dense)
    replica: Any = layer._replicate_for_data_parallel()
    rows = layer.channel_weight.clone()
    replica.weight, replica.bias, replica.channel_weight = layer.weight.clone(), layer.bias, rows
    x = input_of(layer)
    (found,) = torch.autograd.grad(replica(x).square().sum(), rows)
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.channel_weight.grad)


def test_symbolic_trace_keeps_the_gradient(dense: Any) -> None:
    layer = sparse_of(dense)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    x = input_of(layer)
    assert torch.equal(traced(x), layer(x).relu())
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1
    traced(x).sum().backward()
    expected = layer.channel_weight.grad
    layer.channel_weight.grad = None
    layer(x).relu().sum().backward()
    torch.testing.assert_close(layer.channel_weight.grad, expected)


def test_export(dense: Any) -> None:
    layer = sparse_of(dense)
    x = input_of(layer)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_compiled_optimizer_step(dense: Any) -> None:
    layer = sparse_of(dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    layer(input_of(layer)).square().sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    assert_agree(layer)
    assert not torch.equal(layer.weight, before)
    torch._dynamo.reset()
