"""The lean activations against torch's own: values and gradients bit for bit, and one bit an element kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import FLOATING, laid_out
from corners import awkward, identical
from saved import saved_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trady_kernels.functional import hardsigmoid, hardtanh, leaky_relu, relu, relu6
from trady_kernels.nn import LeanHardsigmoid, LeanHardtanh, LeanLeakyReLU, LeanReLU, LeanReLU6
from trady_kernels.ops import last_kernel, rectify


@dataclass(frozen=True)
class Activation:
    """A dense class, the lean one, and the arguments of both."""

    dense: type[nn.Module]
    lean: type[nn.Module]
    arguments: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join((self.dense.__name__, *map(str, self.arguments.values())))

    def modules(self, inplace: bool = False) -> tuple[nn.Module, nn.Module]:
        dense = self.dense(**self.arguments, inplace=inplace)
        lean = copy.deepcopy(dense)
        lean.__class__ = self.lean  # what sparsify does: no constructor runs
        return dense, lean


ACTIVATIONS = (
    Activation(nn.ReLU, LeanReLU),
    Activation(nn.ReLU6, LeanReLU6),
    Activation(nn.Hardtanh, LeanHardtanh),
    Activation(nn.Hardtanh, LeanHardtanh, {"min_val": -0.1, "max_val": 6.1}),
    Activation(nn.LeakyReLU, LeanLeakyReLU),
    Activation(nn.LeakyReLU, LeanLeakyReLU, {"negative_slope": 0.3}),
    Activation(nn.LeakyReLU, LeanLeakyReLU, {"negative_slope": -0.5}),
    Activation(nn.Hardsigmoid, LeanHardsigmoid),
)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
RELU = ACTIVATIONS[0]


def gradient(
    forward: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient, the input being no leaf."""
    leaf = input.detach().requires_grad_()
    output = forward(leaf.clone())
    (grad,) = torch.autograd.grad(output, leaf, grad_output)
    return output.detach(), grad


def same_gradient(
    activation: Activation,
    input: torch.Tensor,
    lean: torch.Tensor,
    dense: torch.Tensor,
    grad_output: torch.Tensor,
) -> bool:
    if issubclass(activation.dense, nn.Hardtanh):
        # ATen lets the gradient of a NaN pass in its scalar loop and on GPUs, and not in its vector loop.
        dense = torch.where(input.isnan(), grad_output, dense)
    return identical(lean, dense)


def check(activation: Activation, input: torch.Tensor, grad_output: torch.Tensor, inplace: bool) -> None:
    dense, lean = activation.modules(inplace)
    if inplace and activation.arguments.get("negative_slope", 0) < 0:
        dense = activation.modules()[0]  # torch refuses it
    expected, expected_grad = gradient(dense, input, grad_output)
    output, grad = gradient(lean, input, grad_output)
    assert identical(output, expected)
    if (
        input.numel()
    ):  # of dimensions with one element, or of no element, torch's own give this stride or that
        strides = zip(output.stride(), expected.stride(), input.shape, strict=True)
        assert all(ours == theirs for ours, theirs, size in strides if size > 1)
    assert same_gradient(activation, input, grad, expected_grad, grad_output)


@every_activation
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_equals_dense(dtype: torch.dtype, inplace: bool, activation: Activation) -> None:
    for count in (0, 1, 9, 64, 331):
        check(activation, awkward(count, dtype), awkward(count, dtype), inplace)
    assert last_kernel("scale_by_bits") == "cpp"


LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")


@every_activation
@pytest.mark.parametrize("inplace", (False, True))
def test_layouts(inplace: bool, activation: Activation) -> None:
    for shape in ((2, 5, 3, 7), (1, 3, 1, 1), (3, 1, 4, 5), (0, 3, 2, 2)):
        for layout in LAYOUTS:
            x, dy = (awkward(torch.Size(shape).numel(), torch.float32).view(shape) for _ in range(2))
            for grad_layout in ("contiguous", "channels_last", "slice"):
                check(activation, laid_out(x, layout), laid_out(dy, grad_layout), inplace)
    scalar = torch.tensor(-2.0)
    check(activation, scalar, torch.tensor(3.0), inplace)
    permuted = awkward(60, torch.float32).view(3, 4, 5).permute(2, 0, 1)
    check(activation, permuted, torch.randn(5, 3, 4), inplace)
    check(activation, permuted, torch.randn(()).expand(5, 3, 4), inplace)


@every_activation
@pytest.mark.parametrize("inplace", (False, True))
def test_keeps_one_bit_an_element(inplace: bool, activation: Activation) -> None:
    lean = activation.modules(inplace)[1]
    for shape, layout in (
        ((3, 5, 4, 7), "contiguous"),
        ((2, 3, 7, 7), "channels_last"),
        ((2, 3, 7, 7), "slice"),
    ):
        leaf = laid_out(torch.randn(shape), layout).requires_grad_()
        x = leaf.view_as(leaf) if layout == "slice" else leaf.clone()
        if inplace and layout == "slice":
            continue  # a view of a leaf
        assert saved_bytes(lean, lambda x=x: lean(x)) == (leaf.numel() + 7) // 8


@every_activation
def test_keeps_nothing_without_a_gradient(activation: Activation) -> None:
    dense, lean = activation.modules()
    x = awkward(331, torch.float32)
    assert saved_bytes(lean, lambda: lean(x)) == 0
    with torch.no_grad():
        assert saved_bytes(lean, lambda: lean(x.clone().requires_grad_())) == 0
    assert identical(lean(x), dense(x))
    with torch.inference_mode():
        assert identical(lean(x), dense(x))


def test_without_a_gradient_torchs_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("trady_kernels.functional.activation.rectify")
    lean = RELU.modules()[1]
    lean(torch.randn(9))
    with torch.no_grad():
        lean(torch.randn(9, requires_grad=True))
    with pytest.raises(NameError):
        lean(torch.randn(9, requires_grad=True))


def test_output_without_a_use_leaves_no_trace() -> None:
    """Nothing but the bits outlives the forward pass: no tensor hangs on the context."""
    x = torch.randn(64, requires_grad=True)
    output = RELU.modules()[1](x)
    node = output.grad_fn
    held = [value for value in vars(node).values() if isinstance(value, torch.Tensor)]
    assert not held and [t.shape for t in node.saved_tensors] == [(8,)]


def test_dtypes_without_bits_take_torchs_own() -> None:
    integers = torch.arange(-3, 9)
    assert torch.equal(relu(integers), integers.relu())
    assert torch.equal(relu6(integers), integers.clamp(0, 6))
    assert torch.equal(hardtanh(integers, -2, 4), integers.clamp(-2, 4))


@every_activation
def test_double_backward(activation: Activation) -> None:
    lean = activation.modules()[1]
    x = torch.randn(3, 4, dtype=torch.float64).mul(4).requires_grad_()
    assert torch.autograd.gradcheck(lean, (x,)) and torch.autograd.gradgradcheck(lean, (x,))


def test_gradient_transforms_keep_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        "trady_kernels.functional.activation.rectify", lambda *a: used.append(a) or rectify(*a)
    )
    lean = RELU.modules()[1]
    torch.func.grad(lambda x: lean(x).sum())(torch.randn(9))
    assert len(used) == 1


@every_activation
def test_transforms(activation: Activation) -> None:
    dense, lean = activation.modules()
    x = torch.randn(5, 7) * 4

    def loss(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: module(x * 2).pow(2).sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    transforms: tuple[Callable[..., Any], ...] = (
        grad,
        vmap,
        lambda f: vmap(grad(f)),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    )
    if activation.dense is not nn.Hardsigmoid:  # torch's own has no double backward
        transforms += (lambda f: grad(lambda x: grad(f)(x).pow(2).sum()), torch.func.hessian)
    for transform in transforms:
        torch.testing.assert_close(transform(loss(lean))(x), transform(loss(dense))(x))
    in_place = activation.modules(inplace=True)[1]
    torch.testing.assert_close(grad(loss(in_place))(x), grad(loss(dense))(x))


# ---- in place ---------------------------------------------------------------------------------------------


@every_activation
def test_in_place_on_a_leaf_raises_and_changes_nothing(activation: Activation) -> None:
    dense, lean = activation.modules(inplace=True)
    for make in (lambda leaf: leaf, lambda leaf: leaf.view(-1), lambda leaf: leaf[1:]):
        sentences = []
        for module in (dense, lean):
            leaf = torch.randn(4, 4, requires_grad=True)
            before = leaf.detach().clone()
            with pytest.raises(RuntimeError, match="leaf Variable that requires grad") as error:
                module(make(leaf))
            sentences.append(str(error.value))
            assert torch.equal(leaf, before)
        assert sentences[0] == sentences[1]


@every_activation
@pytest.mark.parametrize("index", ((slice(None), 1), (Ellipsis,), (1,)), ids=str)
def test_in_place_on_a_view(index: Any, activation: Activation) -> None:
    if activation.arguments.get("negative_slope", 0) < 0:
        return  # torch refuses it
    results = []
    x, dy = torch.randn(4, 6) * 4, torch.randn(4, 6)
    for module in activation.modules(inplace=True):
        leaf = x.clone().requires_grad_()
        base = leaf * 1
        module(base[index])
        results.append((base.detach(), *torch.autograd.grad(base, leaf, dy)))
    for lean, dense in zip(results[1], results[0], strict=True):
        assert torch.equal(lean, dense)


@every_activation
def test_in_place_on_a_tensor_with_gaps(activation: Activation) -> None:
    x, dy = awkward(60, torch.float32).view(3, 4, 5), torch.randn(3, 4, 5)
    expected, expected_grad = gradient(activation.modules()[0], x, dy)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with_gaps = torch.empty_strided((3, 4, 5), (10, 30, 2)).copy_(x)
        assert not with_gaps._is_view()
        return activation.modules(inplace=True)[1](with_gaps)

    output, grad = gradient(forward, x, dy)
    assert identical(output, expected) and same_gradient(activation, x, grad, expected_grad, dy)


@every_activation
def test_in_place_returns_its_input(activation: Activation) -> None:
    lean = activation.modules(inplace=True)[1]
    for x in (torch.randn(4, 4), torch.randn(4, 4, requires_grad=True) * 1):
        assert lean(x) is x


def test_in_place_over_what_another_operation_keeps_raises() -> None:
    for activation in ACTIVATIONS:
        lean = activation.modules(inplace=True)[1]
        kept = torch.randn(9, requires_grad=True).exp()  # exp keeps its output
        lean(kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()


@every_activation
def test_overwrites_input_where_told_so(activation: Activation) -> None:
    dense, lean = activation.modules()
    lean.overwrites_input = True
    x, dy = torch.randn(3, 5, 4, 7) * 4, torch.randn(3, 5, 4, 7)
    expected, expected_grad = gradient(dense, x, dy)
    leaf = x.clone().requires_grad_()
    middle = leaf * 1
    output = lean(middle)
    assert output.data_ptr() == middle.data_ptr() and torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, leaf, dy)[0], expected_grad)
    output = lean(leaf)  # a leaf that requires grad cannot be overwritten
    assert torch.equal(leaf, x) and torch.equal(output, expected)
    assert not activation.lean(**activation.arguments).overwrites_input


# ---- as part of networks --------------------------------------------------------------------------------------


@every_activation
def test_swapping_classes_copies_and_names(activation: Activation) -> None:
    dense, lean = activation.modules()
    assert isinstance(lean, type(dense)) and not lean.state_dict()
    assert lean.extra_repr() == dense.extra_repr()
    x = torch.randn(9, requires_grad=True)
    for copied in (
        copy.deepcopy(lean),
        pickle.loads(pickle.dumps(lean)),
        activation.lean(**activation.arguments),
    ):
        assert type(copied) is activation.lean and torch.equal(copied(x), dense(x))
        assert saved_bytes(copied, lambda copied=copied: copied(x)) == 2
    lean.__class__ = activation.dense
    assert vars(lean) == vars(dense)


@pytest.mark.parametrize("inplace", (False, True))
def test_used_twice_checkpointed_and_accumulated(inplace: bool) -> None:
    x = torch.randn(4, 6)
    grads = []
    for activation in RELU.modules(inplace):
        torch.manual_seed(1)
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)

        def network(x: torch.Tensor, first=first, second=second, activation=activation) -> torch.Tensor:
            return activation(second(activation(first(x))))

        losses = [network(x).pow(2).sum(), network(2 * x).pow(2).sum()]  # two forwards before one backward
        for loss in losses:
            loss.backward()
        checkpoint(network, x, use_reentrant=False).pow(2).sum().backward()
        grads.append([parameter.grad for parameter in (*first.parameters(), *second.parameters())])
    for lean, dense in zip(grads[1], grads[0], strict=True):
        assert torch.equal(lean, dense)


def test_retained_graph() -> None:
    x = torch.randn(9, requires_grad=True)
    output = RELU.modules()[1](x)
    first = torch.autograd.grad(output, x, torch.ones(9), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output, x, torch.ones(9))[0], first)


def test_autocast_keeps_the_dtype() -> None:
    for activation in ACTIVATIONS:
        lean = activation.modules()[1]
        with torch.autocast("cpu", torch.bfloat16):
            for dtype in FLOATING:
                x = torch.randn(9, dtype=dtype, requires_grad=True)
                output = lean(x)
                assert output.dtype == dtype
                assert torch.autograd.grad(output.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("activation", (RELU, ACTIVATIONS[5], ACTIVATIONS[7]), ids=str)
def test_compiles(activation: Activation, inplace: bool) -> None:
    dense, lean = activation.modules(inplace)
    lean.overwrites_input = True

    def network(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            middle = x * 2
            return module(middle) + (middle if inplace else 0)

        return forward

    x, dy = torch.randn(2, 5, 3, 4) * 4, torch.randn(2, 5, 3, 4)
    x = x.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(network(lean), fullgraph=True, backend="aot_eager")
    expected, expected_grad = gradient(network(dense), x, dy)
    output, grad = gradient(compiled, x, dy)
    assert torch.equal(output, expected) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("inplace", (False, True))
@every_activation
def test_runs_on_fake_tensors(activation: Activation, inplace: bool) -> None:
    lean = activation.modules(inplace)[1]
    with FakeTensorMode():
        leaf = torch.empty(3, 5, requires_grad=True)
        output = lean(leaf * 1)
        assert torch.autograd.grad(output.sum(), leaf)[0].shape == output.shape == leaf.shape


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    dense, lean = RELU.modules(inplace=True)
    compiled = torch.compile(lambda x: lean(x * 2) + 1, fullgraph=True)
    x, dy = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    for actual, expected in zip(
        gradient(compiled, x, dy), gradient(lambda x: dense(x * 2) + 1, x, dy), strict=True
    ):
        torch.testing.assert_close(actual, expected)


# ---- functions --------------------------------------------------------------------------------------------------


def test_functions() -> None:
    x = awkward(331, torch.float32)[~awkward(331, torch.float32).isnan()].requires_grad_()
    for lean, dense in (
        (relu, nn.functional.relu),
        (relu6, nn.functional.relu6),
        (hardtanh, nn.functional.hardtanh),
        (leaky_relu, nn.functional.leaky_relu),
        (hardsigmoid, nn.functional.hardsigmoid),
    ):
        assert identical(lean(x).detach(), dense(x).detach())
        assert saved_bytes(nn.Module(), lambda lean=lean: lean(x)) == (x.numel() + 7) // 8


def test_bounds_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="min_val cannot be greater than max_val"):
        hardtanh(torch.ones(3, requires_grad=True), 2.0, 1.0)
