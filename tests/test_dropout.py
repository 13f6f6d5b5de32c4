"""``LeanDropout`` against ``nn.Dropout``: the same elements dropped, the same bits in output and gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import FLOATING, laid_out
from corners import awkward, identical
from saved import saved_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trady_kernels.functional import dropout
from trady_kernels.nn import LeanDropout
from trady_kernels.ops import last_kernel


def modules(p: float, inplace: bool = False) -> tuple[nn.Dropout, LeanDropout]:
    dense = nn.Dropout(p, inplace)
    lean = copy.deepcopy(dense)
    lean.__class__ = LeanDropout  # what sparsify does: no constructor runs
    return dense, lean  # type: ignore[return-value]


def results(
    module: nn.Module, input: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient, and the random number that comes next."""
    torch.manual_seed(5)
    leaf = input.detach().requires_grad_()
    output = module(leaf.clone())
    (grad,) = torch.autograd.grad(output, leaf, grad_output)
    return output.detach(), grad, torch.rand(1)


def check(p: float, input: torch.Tensor, grad_output: torch.Tensor, inplace: bool) -> None:
    dense, lean = modules(p, inplace)
    expected, actual = (results(module, input, grad_output) for module in (dense, lean))
    for name, ours, theirs in zip(
        ("output", "gradient", "next random number"), actual, expected, strict=True
    ):
        assert identical(ours, theirs), (name, p)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("p", (0.0, 0.1, 0.3, 0.5, 0.97, 1.0))
def test_equals_dense(p: float, dtype: torch.dtype, inplace: bool) -> None:
    for count in (0, 1, 9, 64, 331):
        check(p, awkward(count, dtype), awkward(count, dtype), inplace)
    if 0 < p < 1:
        assert last_kernel("pack_bits") == last_kernel("scale_by_bits") == "cpp"


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize(
    "layout", ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")
)
def test_layouts(layout: str, inplace: bool) -> None:
    x, dy = (awkward(210, torch.float32).view(2, 5, 3, 7) for _ in range(2))
    for grad_layout in ("contiguous", "channels_last", "slice"):
        check(0.3, laid_out(x, layout), laid_out(dy, grad_layout), inplace)


@pytest.mark.parametrize("inplace", (False, True))
def test_keeps_one_bit_an_element(inplace: bool) -> None:
    lean = modules(0.3, inplace)[1]
    x = torch.randn(3, 5, 7, requires_grad=True) * 1
    assert saved_bytes(lean, lambda: lean(x)) == 14
    with torch.no_grad():
        assert saved_bytes(lean, lambda: lean(x)) == 0
    assert saved_bytes(lean, lambda: lean(torch.randn(9))) == 0
    assert saved_bytes(lean.eval(), lambda: lean(x)) == 0


def test_evaluation_returns_the_input() -> None:
    x = torch.randn(9, requires_grad=True)
    assert modules(0.5)[1].eval()(x) is x and modules(0.0)[1](x) is x


def test_without_a_gradient_the_same_elements_are_dropped() -> None:
    dense, lean = modules(0.4)
    x = torch.randn(99)
    for leaf in (x, x.clone().requires_grad_()):
        torch.manual_seed(3)
        expected = dense(x)
        torch.manual_seed(3)
        assert torch.equal(lean(leaf), expected)


def test_gradients_of_gradients() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(seeded, (x,)) and torch.autograd.gradgradcheck(seeded, (x,))


def test_transforms() -> None:
    dense, lean = modules(0.4)
    x = torch.randn(5, 7)
    gradients = []
    for module in (dense, lean):
        torch.manual_seed(0)
        gradients.append(torch.func.grad(lambda x, module=module: module(x * 2).pow(2).sum())(x))
    assert torch.equal(*gradients)
    batched = torch.vmap(torch.func.grad(lambda x: lean(x).sum()), randomness="different")(x)
    assert set(batched.unique().tolist()) <= {0.0, (1 / torch.tensor(0.6)).item()}


def test_in_place_on_leaves_and_views() -> None:
    lean = modules(0.4, inplace=True)[1]
    leaf = torch.randn(4, 4, requires_grad=True)
    before = leaf.detach().clone()
    for input in (leaf, leaf[1:]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            lean(input)
    assert torch.equal(leaf, before)
    gradients = []
    for module in modules(0.4, inplace=True):
        torch.manual_seed(0)
        base = leaf * 1
        assert module(base[1:3]).data_ptr() == base[1:3].data_ptr()
        gradients.append(torch.autograd.grad(base.pow(2).sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_copies_and_swaps_back() -> None:
    dense, lean = modules(0.25)
    x = torch.randn(99, requires_grad=True)
    for copied in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean)), LeanDropout(0.25)):
        torch.manual_seed(2)
        expected = dense(x)
        torch.manual_seed(2)
        assert torch.equal(copied(x), expected)
    assert str(lean) == "LeanDropout(p=0.25, inplace=False)"
    lean.__class__ = nn.Dropout
    assert str(lean) == str(dense) and vars(lean) == vars(dense)


def test_checkpointed_and_run_twice_before_backward() -> None:
    x = torch.randn(4, 6)
    grads = []
    for module in modules(0.4):
        torch.manual_seed(1)
        layer = nn.Linear(6, 6)
        losses = [module(layer(module(layer(x)))).pow(2).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
        checkpoint(lambda x, m=module, f=layer: m(f(x)), x, use_reentrant=False).pow(2).sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("inplace", (False, True))
def test_compiles(inplace: bool) -> None:
    lean = modules(0.5, inplace)[1]
    compiled = torch.compile(lambda x: lean(x * 2), fullgraph=True, backend="aot_eager")
    x = torch.rand(40, 41, requires_grad=True)
    output = compiled(x)
    (grad,) = torch.autograd.grad(output.sum(), x)
    kept = output != 0
    torch.testing.assert_close(output, torch.where(kept, 4 * x, 0))
    torch.testing.assert_close(grad, torch.where(kept, 4.0, 0.0))
    assert 0.4 < kept.float().mean() < 0.6


def test_runs_on_fake_tensors() -> None:
    lean = modules(0.123)[1]  # a probability that no other test has made a number of
    with FakeTensorMode(), torch.device("meta"):
        x = torch.empty(3, 5, device="cpu", requires_grad=True)
        output = lean(x)
        assert torch.autograd.grad(output.sum(), x)[0].shape == output.shape == x.shape


def test_bad_probability() -> None:
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1, but got 1.5"):
        dropout(torch.ones(3, requires_grad=True), 1.5)
