from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import sparse_layers
from trady_kernels.nn import SparseConv2d, SparseLinear

SPARSE = [
    "stem",
    *(f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("expand", "depthwise", "project")),
    "neck",
]
FROZEN = ["norm", *(f"blocks.{block}.norm{norm}" for block in (0, 1) for norm in (1, 2)), "neck_norm"]


def example(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 10, 9)


def trained_net() -> ResidualNet:
    return as_trained(ResidualNet())


def check_output(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: folded norms scale the weight instead of the output."""
    atol = 4 * ROUNDING[expected.dtype] * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


# -- what sparsify makes ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", [example(), None], ids=["example", "no example"])
def test_what_becomes_which(given: torch.Tensor | None) -> None:
    model = tk.sparsify(trained_net(), given)
    report = tk.conversion_report(model)
    assert (report.head, list(report.sparse), list(report.frozen_norms)) == ("head", SPARSE, FROZEN)
    assert not report.dense
    assert list(sparse_layers(model)) == SPARSE
    assert all(len(layer.channels) == 0 for layer in sparse_layers(model).values())
    assert {name for name, flag in flags(model).items() if flag} == {"head.weight", "head.bias"}
    tk.select_fraction(model, 0.5)
    rows = {f"{name}.channel_weight" for name in SPARSE}
    assert {name for name, flag in flags(model).items() if flag} == {"head.weight", "head.bias"} | rows
    assert len(tk.trainable_parameters(model)) == len(SPARSE) + 2


def test_trainable_parameters_hold_rows_without_a_channel() -> None:
    model = tk.sparsify(trained_net(), example())
    given = {id(parameter) for parameter in tk.trainable_parameters(model)}
    assert given == {
        id(parameter)
        for parameter in (
            *(layer.channel_weight for layer in sparse_layers(model).values()),
            *model.head.parameters(),
        )
    }


def test_forward_is_the_dense_networks_in_evaluation_and_frozen_in_training() -> None:
    model = trained_net().eval()
    x = example()
    expected = model(x)
    tk.sparsify(model, x)
    check_output(model(x), expected)
    check_output(model.train()(x), expected)
    tk.select_fraction(model, 0.5)
    check_output(model(x), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_gradients_equal_the_dense_ones_at_the_selected_channels(fraction: float) -> None:
    dense = trained_net().double().eval()
    sparse = tk.sparsify(copy.deepcopy(dense).train(), example().double())
    selection = tk.select_fraction(sparse, fraction)
    x, grad_output = example().double(), torch.randn(4, 5, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for model, given in zip((dense, sparse), inputs, strict=True):
        model(given).backward(grad_output)

    def check(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        assert found is not None and expected is not None
        atol = 4 * ROUNDING[torch.float64] * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)

    for name, layer in sparse_layers(sparse).items():
        rows = layer.read_rows(dense.get_parameter(f"{name}.weight").grad, selection[name])
        if len(rows):
            check(layer.channel_weight.grad, rows)
        else:
            assert layer.channel_weight.grad is None
    check(sparse.head.weight.grad, dense.head.weight.grad)
    check(sparse.head.bias.grad, dense.head.bias.grad)
    check(inputs[1].grad, inputs[0].grad)


def test_frozen_norms_keep_nothing_for_backward() -> None:
    class Norms(nn.Sequential):
        pass

    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    model = as_trained(Norms(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6))).train()
    size = 4 * 6 * 5 * 5 * 4
    assert saved_bytes(model, lambda: model(x)) >= 3 * size
    tk.sparsify(model, x, head=None)
    assert saved_bytes(model, lambda: model(x)) == 0
    tk.select_fraction(model, 0.5)
    assert saved_bytes(model, lambda: model(x)) == size // 2


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_round_trip_through_training(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, plain = trained_net(), ResidualNet()
    model.stem.weight.requires_grad_(False)
    before, classes, trained = copy.deepcopy(model.state_dict()), kinds(model), flags(model)
    tk.sparsify(model, example())
    optimizer = make(tk.trainable_parameters(model))
    touched: dict[str, set[int]] = {name: set() for name in SPARSE}
    for step in range(4):
        for name, channels in tk.select_fraction(model, 0.3, seed=step).items():
            touched[name].update(channels.tolist())
        F.cross_entropy(model.train()(example()), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(model.state_dict())
    layers = sparse_layers(model)
    for key, value in saved.items():
        name = key.rpartition(".")[0]
        if name == "head":
            assert not torch.equal(value, before[key]), key
        elif key.endswith(".weight") and name in SPARSE:
            every = torch.arange(layers[name].channel_count)
            change = layers[name].read_rows(value - before[key], every).abs().flatten(1).sum(1)
            assert set(change.nonzero().flatten().tolist()) == touched[name], key
        else:
            assert torch.equal(value, before[key]), key
    x = example()
    expected = model.eval()(x)
    assert tk.densify(model) is model
    assert kinds(model) == classes
    assert flags(model) == trained
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    check_output(model(x), expected)
    plain.load_state_dict(saved, strict=True)
    assert torch.equal(plain.eval()(x), model(x))
    model.train()(x)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])


# -- what it leaves as it was ----------------------------------------------------------------------


def test_identities_hooks_modes_and_random_numbers_stay() -> None:
    model = trained_net().double()
    model.blocks[0].eval()
    fired: list[str] = []
    handle = model.stem.register_forward_hook(lambda *_: fired.append("forward"))
    model.norm.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.stem.label = "kept"
    modules, modes = list(model.modules()), [module.training for module in model.modules()]
    weight = model.stem.weight
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.ones(4, 3, 10, 9, dtype=torch.float64)
    tk.sparsify(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.stem.weight is weight and model.stem.label == "kept"
    assert model.stem.channel_weight.dtype == torch.float64
    fired.clear()
    tk.select_fraction(model, 0.5)
    model(x).sum().backward()
    assert fired == ["forward", "backward"]
    handle.remove()
    tk.densify(model)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    model(x)
    assert fired == ["forward", "backward"]


def test_stale_gradients_of_what_freezes_are_dropped() -> None:
    model = trained_net()
    model(example()).sum().backward()
    tk.sparsify(model, example())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or name.startswith("head."), name


def test_twice_is_once() -> None:
    model = tk.sparsify(trained_net(), example())
    tk.select_fraction(model, 0.5)
    report, classes, trained = tk.conversion_report(model), kinds(model), flags(model)
    selection = {name: layer.channels.clone() for name, layer in sparse_layers(model).items()}
    tk.sparsify(model, example())
    assert tk.conversion_report(model) == report
    assert (kinds(model), flags(model)) == (classes, trained)
    assert all(torch.equal(layer.channels, selection[name]) for name, layer in sparse_layers(model).items())
    tk.densify(model)
    assert kinds(model) == kinds(ResidualNet())
    assert all(flags(model).values())


def test_twice_keeps_the_head_that_was_asked_for() -> None:
    for head in ("neck", None):
        model = tk.sparsify(trained_net(), example(), head=head)
        trained = flags(model)
        tk.sparsify(model, example())
        assert tk.conversion_report(model).head == head
        assert flags(model) == trained


def of_part() -> nn.Sequential:
    """A network whose part has another last layer than the whole."""
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 8 * 7, 6),
        nn.ReLU(),
        nn.Linear(6, 6),
    )
    return as_trained(nn.Sequential(body, nn.Linear(6, 2)))


@pytest.mark.parametrize("part_head", ["auto", "3", None])
def test_a_part_and_then_the_whole_network(part_head: str | None) -> None:
    model, expected = of_part(), tk.sparsify(of_part(), example())
    tk.sparsify(model[0], example(), head=part_head)
    tk.sparsify(model, example())
    assert (kinds(model), flags(model)) == (kinds(expected), flags(expected))
    assert tk.conversion_report(model) == tk.conversion_report(expected)
    assert tk.conversion_report(model).folded == {"0.1": "0.0"}


@pytest.mark.parametrize("head", ["auto", "0.5", None])
def test_a_converted_network_keeps_its_head_inside_a_wrapper(head: str | None) -> None:
    model = tk.sparsify(of_part(), example(), head=head)
    before, trained = tk.conversion_report(model), flags(model)
    wrapper = nn.Sequential(model, nn.Identity())
    tk.sparsify(wrapper, example())
    report = tk.conversion_report(wrapper)
    assert report.head == (None if before.head is None else f"0.{before.head}")
    assert report.folded == {"0.0.1": "0.0.0"}
    assert flags(model) == trained


def test_copies_and_pickles_can_be_densified() -> None:
    model = tk.sparsify(trained_net(), example()).eval()
    tk.select_fraction(model, 0.5)
    x = example()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tk.conversion_report(twin) == tk.conversion_report(model)
        assert kinds(tk.densify(twin)) == kinds(ResidualNet())
        assert all(flags(twin).values())
        check_output(twin(x), model(x))


def test_densify_of_layers_built_by_hand_and_of_dense_networks() -> None:
    model = nn.Sequential(
        SparseConv2d(3, 4, 1, channels=1), nn.Flatten(), SparseLinear(4, 2), nn.Linear(2, 2)
    )
    model[3].requires_grad_(False)
    tk.densify(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.Flatten, nn.Linear, nn.Linear]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 4 + [False] * 2
    dense = trained_net()
    before = (kinds(dense), flags(dense))
    assert (kinds(tk.densify(dense)), flags(dense)) == before


def test_steps_of_an_old_optimizer_after_densify_change_nothing() -> None:
    model = tk.sparsify(trained_net(), example())
    tk.select_fraction(model, 0.5)
    optimizer = torch.optim.SGD(tk.trainable_parameters(model), 0.1)
    model(example()).sum().backward()
    model.head.zero_grad()
    tk.densify(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- what stays dense, and why ---------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 7, bias=False)
        self.decoder.weight = self.embedding.weight
        self.last = nn.Linear(7, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.decoder(self.body(input)))


class TiedDecoder(nn.Module):
    """Two layers whose weight is used directly too; of the others only a dtype, a copy or a shape is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle, self.normed = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        like = self.decoder.weight
        x = self.middle(self.encoder(input.to(like.dtype).to(like).type_as(like)) * len(like))
        x = self.normed(x) + torch.stack([self.normed.weight, torch.zeros_like(self.middle.weight)]).sum()
        x = F.linear(x, self.encoder.weight.t()) + self.decoder(x) * (like.detach() + like.data).mean()
        return self.last(x + like.new_zeros(like.size(0)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.last = nn.Linear(6, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(input[:, None])[:, 0])


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 2))


def wrapped(module: nn.Module) -> nn.Module:
    """With a forward on the instance that calls the one it had, as hooks of accelerate set it."""
    own = module.forward
    module.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))  # type: ignore[method-assign]
    return module


@dataclass(frozen=True)
class Dense:
    name: str
    make: Callable[[], nn.Module]
    why: Mapping[str, str]
    sparse: tuple[str, ...]


class OwnNorm(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Doubled(nn.Module):
    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return 2 * parameter


def doubled(module: nn.Module, name: str) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(module, name, Doubled())


class Routes(nn.Linear):
    def route(self, input: torch.Tensor) -> torch.Tensor:
        return self(input).softmax(-1)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(6, 6), Routes(6, 6), nn.Linear(6, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.router.route(self.first(input)))


DENSE = (
    Dense(
        "own forward",
        lambda: nn.Sequential(nn.Linear(6, 6), Scaled(6, 6), nn.Linear(6, 2)),
        {"1": "Scaled has a forward of its own"},
        ("0",),
    ),
    Dense(
        "own forward on the instance",
        lambda: nn.Sequential(nn.Linear(6, 6), wrapped(nn.Linear(6, 6)), wrapped(nn.ReLU()), nn.Linear(6, 2)),
        {"1": "Linear has a forward of its own"},
        ("0",),
    ),
    Dense("tied", Tied, {"decoder": "its weight is shared with 'embedding'"}, ("body",)),
    Dense(
        "used directly too",
        TiedDecoder,
        {name: "its weight is also used directly" for name in ("encoder", "normed")},
        ("middle", "decoder"),
    ),
    Dense(
        "bypassed",
        Attention,
        {
            "layer.self_attn": "MultiheadAttention has no sparse form",
            "layer.self_attn.out_proj": "no call reaches it",
        },
        ("layer.linear1", "layer.linear2"),
    ),
    Dense(
        "parametrised",
        lambda: nn.Sequential(
            nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)
        ),
        {"1": "its weight is computed (parametrised)"},
        ("0",),
    ),
    Dense(
        "bias parametrised",
        lambda: nn.Sequential(nn.Linear(6, 6), doubled(nn.Linear(6, 6), "bias"), nn.Linear(6, 2)),
        {"1": "one of its parameters is computed (parametrised)"},
        ("0",),
    ),
    Dense(
        "methods of its own", Router, {"router": "Routes has a 'route', which sparse layers lack"}, ("first",)
    ),
    Dense(
        "norm parametrised",
        lambda: with_norm(doubled(nn.BatchNorm1d(6), "weight")),
        {"1": "ParametrizedBatchNorm1d cannot be frozen: its parameters are computed"},
        ("0",),
    ),
    Dense(
        "another class",
        lambda: nn.Sequential(
            nn.Linear(6, 6), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 2, 1), nn.Flatten(), nn.Linear(2, 2)
        ),
        {"2": "Conv1d has no sparse form"},
        ("0",),
    ),
    Dense(
        "norm without statistics",
        lambda: with_norm(nn.BatchNorm1d(6, track_running_stats=False)),
        {"1": "BatchNorm1d cannot be frozen"},
        ("0",),
    ),
    Dense(
        "norm with its own forward", lambda: with_norm(OwnNorm(6)), {"1": "OwnNorm cannot be frozen"}, ("0",)
    ),
    Dense(
        "norm with its own forward on the instance",
        lambda: with_norm(wrapped(nn.BatchNorm1d(6))),
        {"1": "BatchNorm1d cannot be frozen"},
        ("0",),
    ),
)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_what_stays_dense_is_frozen_and_named(case: Dense) -> None:
    model = as_trained(case.make()).eval()
    x = torch.randn(3, 6)
    expected, classes, trained = model(x), kinds(model), flags(model)
    tk.sparsify(model, x)
    report = tk.conversion_report(model)
    assert report.sparse == case.sparse
    assert report.dense.keys() == case.why.keys()
    for name, why in case.why.items():
        assert report.dense[name].startswith(why)
        assert f"{name}" in str(report) and why in str(report)
        assert kinds(model)[name] is classes[name]
        assert not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
    check_output(model(x), expected)
    tk.select_fraction(model, 0.5)
    model.train()(x).sum().backward()
    tk.densify(model)
    assert (kinds(model), flags(model)) == (classes, trained)


def test_without_an_example_the_attention_projection_stays_dense() -> None:
    model = tk.sparsify(Attention())
    assert tk.conversion_report(model).dense.keys() == {"layer.self_attn", "layer.self_attn.out_proj"}


def test_a_subclass_that_computes_the_same_is_converted_and_comes_back() -> None:
    class Labelled(nn.Linear):
        def extra_repr(self) -> str:
            return f"{super().extra_repr()}, labelled"

    model = nn.Sequential(Labelled(6, 6), nn.Linear(6, 2))
    model[0].note = "kept"
    tk.sparsify(model, torch.randn(2, 6))
    assert type(model[0]) is SparseLinear
    tk.densify(model)
    assert type(model[0]) is Labelled and model[0].note == "kept" and "labelled" in repr(model[0])


def test_norm_and_activation_in_one_module() -> None:
    class BatchNormAct2d(nn.BatchNorm2d):  # timm's, by name and children
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop = nn.Identity()
            self.act = nn.Hardtanh(-0.5, 0.5)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.act(self.drop(super().forward(input)))

    model = as_trained(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 2, 1))).eval()
    x = torch.randn(2, 3, 5, 5)
    expected, keys = model(x), list(model.state_dict())
    tk.sparsify(model, x)
    assert tk.conversion_report(model).frozen_norms == ("1",)
    assert list(model.state_dict()) == keys
    check_output(model.train()(x), expected)
    tk.densify(model)
    assert type(model[1]) is BatchNormAct2d


def test_norms_stay_as_they_are_on_request() -> None:
    model = trained_net()
    tk.sparsify(model, example(), freeze_norm=False)
    assert tk.conversion_report(model).frozen_norms == ()
    assert type(model.norm) is nn.BatchNorm2d
    trains = {name for name, flag in flags(model).items() if flag}
    norms = [*FROZEN, "blocks.0.norm3", "blocks.1.norm3"]
    assert trains == {f"{name}.{key}" for name in [*norms, "head"] for key in ("weight", "bias")}
    before = model.norm.running_mean.clone()
    model.train()(example())
    assert not torch.equal(model.norm.running_mean, before)


def test_parametrised_norms_stay_as_they_are() -> None:
    x = torch.randn(3, 6)
    for norm in (nn.BatchNorm1d(6), nn.RMSNorm(6)):
        model = as_trained(with_norm(doubled(norm, "weight"))).eval()
        expected, kind = model(x), type(model[1])
        tk.sparsify(model, x, freeze_norm=False)
        assert type(model[1]) is kind
        assert all(parameter.requires_grad for parameter in model[1].parameters())
        check_output(model(x), expected)


def test_a_module_in_two_places_and_in_a_plain_list() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.loose = [self.first]
            self.last = nn.Linear(6, 2)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.loose[0](self.first(input))))

    model = Shared()
    x = torch.randn(3, 6)
    expected = model(x)
    tk.sparsify(model, x)
    assert tk.conversion_report(model).sparse == ("first",)
    assert model.first is model.second is model.loose[0]
    check_output(model(x), expected)
    tk.select_fraction(model, 0.5)
    model(x).sum().backward()
    assert model.first.channel_weight.grad is not None


# -- the head --------------------------------------------------------------------------------------


def functional_end(end: Callable[[torch.Tensor], torch.Tensor], *layers: nn.Module) -> nn.Module:
    class Net(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return end(super().forward(input))

    return Net(*layers)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.second(self.body(input))
        return {"out": out, "logits": self.first(self.body(input))}


class KeepsAnother(nn.Module):
    """The layer called last is not the one whose output is returned, and its output stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.projection = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.body(input)
        output = self.last(x)
        self.kept = self.projection(x)
        return output


@dataclass(frozen=True)
class Head:
    name: str
    make: Callable[[], nn.Module]
    head: str | None
    given: str | None = "auto"


def linears() -> tuple[nn.Module, ...]:
    return (nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))


HEADS = (
    Head("last linear", lambda: nn.Sequential(*linears()), "2"),
    Head("a view of its output", lambda: functional_end(lambda y: y[:, None].flatten(1), *linears()), "2"),
    Head("an operation follows", lambda: functional_end(lambda y: y.log_softmax(1), *linears()), "2"),
    Head("an activation in place follows", lambda: nn.Sequential(*linears(), nn.ReLU(inplace=True)), "2"),
    Head("a norm follows", lambda: nn.Sequential(*linears(), nn.LayerNorm(2)), None),
    Head("last of two", TwoOutputs, "first"),
    Head("another is called after it", KeepsAnother, "last"),
    Head("by name", lambda: nn.Sequential(*linears()), "1", given="1"),
    Head("none", lambda: nn.Sequential(*linears()), None, given=None),
)


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_head(case: Head) -> None:
    model = tk.sparsify(case.make(), torch.randn(3, 6), head=case.given)
    assert tk.conversion_report(model).head == case.head
    trains = {name for name, flag in flags(model).items() if flag}
    assert trains == ({f"{case.head}.weight", f"{case.head}.bias"} if case.head else set())
    if case.head:
        assert type(model.get_submodule(case.head)) is nn.Linear


def test_a_convolution_can_be_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten())
    tk.sparsify(model, torch.randn(2, 3, 4, 4))
    assert tk.conversion_report(model).head == "2"


def test_a_whole_module_can_be_the_head() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    model[1].requires_grad_(False)
    tk.sparsify(model, torch.randn(2, 6), head="1")
    assert type(model[1][1]) is nn.BatchNorm1d
    assert {name.split(".")[0] for name, flag in flags(model).items() if flag} == {"1"}
    assert all(parameter.requires_grad for parameter in model[1].parameters())


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "dict"])
def test_example_inputs(wrap: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
            return self.head(self.body(x) + shift)

    x = torch.randn(2, 6)
    given = {"tensor": x, "tuple": (x, x), "dict": {"x": x, "shift": x}}[wrap]
    assert tk.conversion_report(tk.sparsify(Net(), given)).sparse == ("body",)  # type: ignore[arg-type]


# -- bad input -------------------------------------------------------------------------------------


# -- biases ----------------------------------------------------------------------------------------

BIASES = [
    "norm.bias",
    *(f"blocks.{block}.{name}.bias" for block in (0, 1) for name in ("norm1", "norm2", "project")),
    "neck.bias",
    "neck_norm.bias",
]


@pytest.mark.parametrize("given", [example(), None], ids=["example", "no example"])
@pytest.mark.parametrize(
    ("biases", "expected"),
    (
        (False, []),
        (0, []),
        (1, BIASES[-2:]),
        (2, BIASES[-3:]),
        (4, BIASES[-5:]),
        (99, BIASES),
        (True, BIASES),
    ),
    ids=str,
)
def test_which_biases_train(biases: bool | int, expected: list[str], given: torch.Tensor | None) -> None:
    model = trained_net()
    before, keys = flags(model), list(model.state_dict())
    tk.sparsify(model, given, biases=biases)
    report = tk.conversion_report(model)
    assert list(report.biases) == expected
    assert all(report.biases[name] == model.get_parameter(name).numel() for name in expected)
    trains = {name for name, flag in flags(model).items() if flag}
    assert trains == {"head.weight", "head.bias", *expected}
    assert len(tk.trainable_parameters(model)) == len(SPARSE) + 2 + len(expected)
    total = sum(report.biases.values())
    assert (f"{len(expected)} biases train, {total:,} elements" in str(report)) == bool(expected)
    assert list(model.state_dict()) == keys
    assert flags(tk.densify(model)) == before


def test_a_second_call_says_which_biases_train_from_then_on() -> None:
    model = tk.sparsify(trained_net(), example(), biases=True)
    model(example()).sum().backward()
    tk.sparsify(model, example(), biases=1)
    assert {name for name, flag in flags(model).items() if flag} == {
        *BIASES[-2:],
        "head.weight",
        "head.bias",
    }
    assert model.blocks[0].project.bias.grad is None
    outer = tk.sparsify(nn.Sequential(model), example(), head="0.head")
    assert {name for name, flag in flags(outer).items() if flag} == {"0.head.weight", "0.head.bias"}


def test_without_frozen_norms_the_layers_own_biases_train() -> None:
    model = tk.sparsify(trained_net(), example(), freeze_norm=False, biases=True)
    own = [name for name in BIASES if "norm" not in name]
    assert list(tk.conversion_report(model).biases) == own


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_gradients_of_biases_equal_the_dense_ones(
    fraction: float, memory_format: torch.memory_format
) -> None:
    dense = trained_net().double().eval()
    sparse = tk.sparsify(copy.deepcopy(dense).train(), example().double(), biases=True)
    tk.select_fraction(sparse, fraction)
    x, grad_output = example().double(), torch.randn(4, 5, dtype=torch.float64)
    for model in (dense, sparse):
        model(x.contiguous(memory_format=memory_format)).backward(grad_output)
    for name in BIASES:
        check_output(sparse.get_parameter(name).grad, dense.get_parameter(name).grad)


@pytest.mark.parametrize("biases", [1, 4, True])
def test_biases_keep_nothing_of_their_own(biases: bool | int) -> None:
    x = example()
    model = tk.sparsify(trained_net(), x)
    tk.select_fraction(model, 0.3)  # the first layer trains: what is kept on the way down is kept anyway
    target = torch.randint(5, (len(x),))
    before = tk.measure_memory(model, (x, target), F.cross_entropy)
    tk.sparsify(model, x, biases=biases)
    after = tk.measure_memory(model, (x, target), F.cross_entropy)
    assert after.by_module == before.by_module
    elements = sum(tk.conversion_report(model).biases.values())
    assert after.gradient_bytes == before.gradient_bytes + 4 * elements


def test_trained_biases_without_a_channel_keep_bits_on_the_way_down() -> None:
    x = example()
    model = tk.sparsify(
        as_trained(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 1),
                nn.ReLU6(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 2),
            )
        ),
        x,
        biases=True,
    )
    head = 4 * 8 * 4
    assert saved_bytes(model, lambda: model(x)) == 2 * (4 * 8 * 8 * 7 // 8) + head
    tk.sparsify(model, x)
    assert saved_bytes(model, lambda: model(x)) == head


def test_a_step_moves_the_biases_alone_where_no_channel_is_selected() -> None:
    model = tk.sparsify(trained_net(), example(), biases=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(tk.trainable_parameters(model), lr=0.1)
    model(example()).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {*BIASES, "head.weight", "head.bias"}
    x = example()
    found = model(x)  # the folded convolutions see the new values
    check_output(tk.densify(model).eval()(x), found)


@dataclass(frozen=True)
class Bad:
    name: str
    call: Callable[[nn.Module], object]
    error: type[Exception]
    message: str


BAD = (
    Bad(
        "model",
        lambda m: tk.sparsify("resnet18", example()),
        TypeError,
        "model: got str, expected an nn.Module",
    ),
    Bad(
        "input and target",
        lambda m: tk.sparsify(m, (example(), torch.zeros(4))),
        TypeError,
        "example_input: got a tuple of 2, which the forward of ResidualNet does not take, expected its arguments: "
        "give the network's input alone, not (input, target) or a shape",
    ),
    Bad("shape", lambda m: tk.sparsify(m, (1, 3, 8, 8)), TypeError, "example_input: got a tuple of 4, which"),
    Bad("shape in a list", lambda m: tk.sparsify(m, [1, 3, 8, 8]), TypeError, "got a list of 4, which"),
    Bad(
        "keywords",
        lambda m: tk.sparsify(m, {"input": example(), "labels": torch.zeros(4)}),
        TypeError,
        "example_input: got a dict of input, labels, which",
    ),
    Bad(
        "freeze_norm",
        lambda m: tk.sparsify(m, example(), freeze_norm="no"),
        ValueError,
        "freeze_norm: got 'no', expected True or False",
    ),
    Bad("example", lambda m: tk.sparsify(m, 3), TypeError, "example_input: got int, expected a tensor"),
    Bad(
        "head",
        lambda m: tk.sparsify(m, example(), head="fc"),
        ValueError,
        "head: got 'fc', expected \"auto\"",
    ),
    Bad("head type", lambda m: tk.sparsify(m, example(), head=3), ValueError, "head: got 3, expected"),
    Bad("head near", lambda m: tk.sparsify(m, example(), head="ead"), ValueError, "near it: head"),
    Bad("root as head", lambda m: tk.sparsify(m, example(), head=""), ValueError, "head: got '', expected"),
    Bad(
        "nothing to convert",
        lambda m: tk.sparsify(nn.Sequential(m.head), torch.randn(1, 12)),
        ValueError,
        "besides the head",
    ),
    Bad(
        "a single layer",
        lambda m: tk.sparsify(m.head, torch.randn(1, 12), head=None),
        ValueError,
        "a single Linear",
    ),
    Bad(
        "lazy",
        lambda m: tk.sparsify(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), torch.randn(2, 3)),
        ValueError,
        "lazy parameter '0.weight'",
    ),
    Bad(
        "biases", lambda m: tk.sparsify(m, example(), biases=-1), ValueError, "biases: got -1, expected True"
    ),
    Bad("no biases", lambda m: tk.sparsify(m, example(), biases="all"), ValueError, "biases: got 'all'"),
    Bad("report", lambda m: tk.conversion_report(m), ValueError, "expected one that sparsify(model)"),
    Bad(
        "parameters", lambda m: tk.trainable_parameters(m), ValueError, "without sparse layers, expected one"
    ),
    Bad(
        "nothing sparse",
        lambda m: tk.select_fraction(m, 0.5),
        ValueError,
        "without sparse layers, expected one",
    ),
    Bad(
        "fraction",
        lambda m: tk.select_fraction(m, 1.5),
        ValueError,
        "fraction: got 1.5, expected a number from 0",
    ),
    Bad(
        "fraction nan",
        lambda m: tk.select_fraction(m, float("nan")),
        ValueError,
        "fraction: got nan, expected",
    ),
    Bad("fraction type", lambda m: tk.select_fraction(m, "5%"), TypeError, "fraction: got '5%', expected"),
    Bad("fraction bool", lambda m: tk.select_fraction(m, True), TypeError, "fraction: got True, expected"),
    Bad("densify", lambda m: tk.densify(None), TypeError, "model: got NoneType, expected"),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_input_gets_one_sentence_and_changes_nothing(case: Bad) -> None:
    model = trained_net()
    before = (kinds(model), flags(model))
    with pytest.raises(case.error) as caught:
        case.call(model)
    assert case.message in str(caught.value) and "\n" not in str(caught.value)
    assert (kinds(model), flags(model)) == before
    assert not any(name.startswith("_before") for module in model.modules() for name in vars(module))


def test_an_error_inside_the_example_run_is_the_networks_own() -> None:
    def fail(*_: object) -> None:
        raise TypeError("of the head")

    model = trained_net()
    model.head.register_forward_pre_hook(fail)
    for given in (example(), (example(),), {"input": example()}):
        with pytest.raises(TypeError, match=r"^of the head$"):
            tk.sparsify(model, given)


def state_of(model: nn.Module) -> dict[str, dict[str, object]]:
    """Every attribute of every module, hooks and flags included; containers by their values."""
    return {
        name: {
            "class": type(module),
            **{key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in vars(module).items()},
            **{f"{key} trains": parameter.requires_grad for key, parameter in module.named_parameters(recurse=False)},
            **{f"{key} moves": parameter.grad for key, parameter in module.named_parameters(recurse=False)},
        }
        for name, module in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("before", ["dense", "sparse", "8bit"])
def test_an_error_in_the_second_run_changes_nothing(before: str) -> None:
    def refuse(module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            raise ValueError("in training mode, targets should be passed")

    x, model = example(), trained_net()
    model(x).sum().backward()
    if before != "dense":
        tk.sparsify(model, x, lean="8bit" if before == "8bit" else True, biases=2)
        tk.select_fraction(model, 0.5)
        model(x).sum().backward()
    handle = model.head.register_forward_pre_hook(refuse)
    state, expected = state_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="targets"):
        tk.sparsify(model, x, lean="8bit", biases=True)
    after = state_of(model)
    assert after.keys() == state.keys()
    for name, attributes in after.items():
        assert attributes.keys() == state[name].keys()
        for key, value in attributes.items():
            assert value is state[name][key] or value == state[name][key], (name, key)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    handle.remove()
    assert not model.head._forward_pre_hooks or before == "8bit"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    assert kinds(tk.densify(tk.sparsify(model, x))) == kinds(trained_net())


def test_tracing_and_running_leave_counters_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.last(self.first(input))

    for given in (None, torch.randn(2, 4)):
        model = Counts()
        calls = model.calls
        tk.sparsify(model, given)
        assert model.calls is calls and calls == 0


def test_wrapped_tensors_are_refused_before_anything_changes() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(two_tensor.TwoTensor(weight, weight.clone()))
    before = (kinds(model), flags(model))
    with pytest.raises(
        TypeError, match=r"model: got a TwoTensor as 2\.weight, expected a plain parameter: shard no"
    ):
        tk.sparsify(model, torch.randn(3, 4))
    assert (kinds(model), flags(model)) == before


@pytest.mark.parametrize("name", ["neck", "neck_norm"])
def test_densify_refuses_a_forward_that_calls_the_class_it_undoes(name: str) -> None:
    model = tk.sparsify(trained_net(), example())
    module = wrapped(model.get_submodule(name))
    before = (kinds(model), flags(model))
    with pytest.raises(ValueError, match=f"model: got a forward of the instance's own in '{name}'"):
        tk.densify(model)
    assert (kinds(model), flags(model)) == before
    del module.forward
    assert kinds(tk.densify(model)) == kinds(trained_net())


def test_the_default_device_may_be_meta() -> None:
    x = example()
    model = trained_net().eval()
    expected = model(x)
    with torch.device("meta"):
        tk.sparsify(model, x)
        tk.select_fraction(model, 0.5)
    check_output(model(x), expected)


def test_a_network_without_memory_is_converted_as_one_with() -> None:
    expected = tk.sparsify(trained_net(), example())
    with torch.device("meta"):
        model = tk.sparsify(ResidualNet(), example())
    assert kinds(model) == kinds(expected)
    assert tk.conversion_report(model) == tk.conversion_report(expected)


@pytest.mark.parametrize("in_place", (False, True), ids=["wrapped", "in place"])
def test_a_compiled_network_is_converted_and_compiled_anew(in_place: bool) -> None:
    x, net = example(), trained_net().eval()
    expected = tk.sparsify(copy.deepcopy(net), x)
    if in_place:
        net.compile(backend="eager")
    model = net if in_place else torch.compile(net, backend="eager")
    model(x)  # compiles it as it is
    assert tk.sparsify(model, x) is model  # type: ignore[type-var]
    assert kinds(net) == kinds(expected)
    drawn = tk.ChannelSampler(model, x, budget="20%")  # type: ignore[arg-type]
    assert drawn.cost == tk.ChannelSampler(expected, x, budget="20%").cost
    outputs = model(x), expected(x)
    check_output(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad)
    torch._dynamo.reset()


def test_a_sparse_layer_cannot_become_the_head() -> None:
    model = tk.sparsify(trained_net(), example())
    with pytest.raises(ValueError, match=r"head: got 'neck', which is sparse already.*densify"):
        tk.sparsify(model, example(), head="neck")


def test_select_fraction_is_the_share_of_every_layer_and_the_seeds_own() -> None:
    model = tk.sparsify(trained_net(), example())
    state = torch.get_rng_state()
    first, again, other = (tk.select_fraction(model, 0.25, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: len(channels) for name, channels in first.items()} == {
        name: {"stem": 1, "neck": 2, "expand": 2}.get(name.rpartition(".")[2], 6) for name in SPARSE
    }
    assert all(torch.equal(first[name], again[name]) for name in SPARSE)
    assert not all(torch.equal(first[name], other[name]) for name in SPARSE)
    assert all(torch.equal(layer.channels, other[name]) for name, layer in sparse_layers(model).items())


# -- other people's networks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    name: str
    sparse: int
    norms: int
    head: str
    dense: int = 0


FOREIGN = (
    Foreign("timm:efficientnet_lite0", 49, 49, "classifier"),
    Foreign("timm:tf_efficientnet_lite0", 44, 49, "classifier", dense=5),  # Conv2dSame
    Foreign("timm:mobilenetv3_small_050", 53, 34, "classifier"),
    Foreign("timm:test_vit", 25, 0, "head"),
    Foreign("torchvision:resnet18", 20, 20, "fc"),
)


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
def test_other_peoples_networks(case: Foreign) -> None:
    library, _, name = case.name.partition(":")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install {library}")
    from trady_kernels.models import loading

    module = loading.import_library(library)
    make = module.create_model if library == "timm" else module.models.get_model
    model = as_trained(make(name, num_classes=5)).eval()
    size = (
        getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))[-1] if name == "test_vit" else 64
    )
    x = torch.randn(2, 3, size, size)
    expected, classes, keys = model(x), kinds(model), list(model.state_dict())
    tk.sparsify(model, x)
    report = tk.conversion_report(model)
    assert (len(report.sparse), len(report.frozen_norms), report.head) == (case.sparse, case.norms, case.head)
    assert len(report.dense) == case.dense
    assert all("Conv2dSame has a forward of its own" in why for why in report.dense.values())
    check_output(model(x), expected)
    tk.select_fraction(model, 0.1)
    check_output(model(x), expected)
    model.train()(x).sum().backward()
    assert all(layer.channel_weight.grad is not None for layer in sparse_layers(model).values())
    assert list(model.state_dict()) == keys
    assert kinds(tk.densify(model)) == classes
    check_output(model.eval()(x), expected)
