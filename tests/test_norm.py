"""``FrozenBatchNorm2d`` against ``nn.BatchNorm2d`` in evaluation mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

from trady_kernels.functional import frozen_batch_norm
from trady_kernels.nn import FrozenBatchNorm2d
from trady_kernels.nn.norm import FoldedBatchNorm2d


def dense_norm(affine: bool = True, dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.2, affine=affine, dtype=dtype)
    state = {
        name: torch.randn_like(value)
        for name, value in norm.state_dict().items()
        if value.is_floating_point()
    }
    state["running_var"] = state["running_var"].square() + 0.1
    if affine:
        state["weight"][2] = 0  # a folded or divided scale loses this channel
    norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(7)})
    return norm


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equals_dense_in_evaluation(
    affine: bool, training: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    dense = dense_norm(affine, dtype).eval()
    frozen = FrozenBatchNorm2d.from_dense(dense).train(training)
    x = torch.randn(3, 5, 4, 7, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    x_frozen = x.detach().clone().requires_grad_()
    output, output_frozen = dense(x), frozen(x_frozen)
    assert torch.equal(output_frozen, output) and output_frozen.stride() == output.stride()
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    output_frozen.backward(grad_output)
    assert x.grad is not None and x_frozen.grad is not None
    bound = ROUNDING[dtype] * float(x.grad.abs().max())
    torch.testing.assert_close(x_frozen.grad, x.grad, rtol=0, atol=bound)
    assert x_frozen.grad.stride() == x.grad.stride()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
    for name, value in dense.state_dict().items():
        assert torch.equal(frozen.state_dict()[name], value), name


def test_bfloat16_activations_with_float32_statistics() -> None:
    dense = dense_norm(dtype=torch.float32).eval()
    frozen = FrozenBatchNorm2d.from_dense(dense)
    x = torch.randn(3, 5, 4, 7, dtype=torch.bfloat16, requires_grad=True)
    x_frozen = x.detach().clone().requires_grad_()
    with torch.autocast("cpu"):
        output, output_frozen = dense(x), frozen(x_frozen)
    assert torch.equal(output, output_frozen) and output_frozen.dtype == torch.bfloat16
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    output_frozen.backward(grad_output)
    bound = ROUNDING[torch.bfloat16] * float(x.grad.abs().max())  # type: ignore[union-attr]
    torch.testing.assert_close(x_frozen.grad, x.grad, rtol=0, atol=bound)


def test_saves_nothing() -> None:
    frozen = FrozenBatchNorm2d.from_dense(dense_norm()).train()
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(frozen, lambda: frozen(x)) == 0


def test_gradcheck_and_transforms() -> None:
    frozen = FrozenBatchNorm2d.from_dense(dense_norm())
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frozen, (x,)) and torch.autograd.gradgradcheck(frozen, (x,))
    grad = torch.func.grad(lambda x: frozen(x).square().sum())(x.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(frozen(x).square().sum(), x)[0])
    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(frozen)(batched), torch.stack([frozen(x), frozen(2 * x)]))


def test_round_trip_and_state_dict() -> None:
    dense = dense_norm().eval()
    frozen = FrozenBatchNorm2d.from_dense(dense)
    assert isinstance(frozen, nn.BatchNorm2d) and not frozen.training and dense.weight.requires_grad
    back = frozen.to_dense()
    assert type(back) is nn.BatchNorm2d and str(back) == str(dense) and not back.training
    assert back.weight.requires_grad
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    other = dense_norm().eval()
    frozen.load_state_dict(other.state_dict())
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64)
    assert torch.equal(frozen.train()(x), other(x))
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(copied(x), other(x))


@pytest.mark.parametrize("names", (("bias",), ("weight",), ("weight", "bias")), ids=str)
def test_unfrozen_affine_trains(names: tuple[str, ...]) -> None:
    dense = dense_norm().eval()
    frozen = FrozenBatchNorm2d.from_dense(dense).train()
    for name in names:
        getattr(frozen, name).requires_grad_(True)
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64)
    kept = saved_bytes(frozen, lambda: frozen(x))
    assert (kept >= x.numel() * 8) == ("weight" in names)
    assert kept == 0 or "weight" in names
    output, expected = frozen(x), dense(x)
    grad_output = torch.randn_like(expected)
    output.backward(grad_output)
    expected.backward(grad_output)
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is not None) == (name in names)
        if name in names:
            torch.testing.assert_close(parameter.grad, getattr(dense, name).grad)


def test_trained_bias_of_an_input_that_trains() -> None:
    frozen = FrozenBatchNorm2d.from_dense(dense_norm())
    frozen.bias.requires_grad_(True)
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(frozen, lambda: frozen(x)) == 0
    wanted = (x, frozen.bias)
    assert torch.autograd.gradcheck(lambda *_: frozen(x), wanted)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(x).square().sum(), wanted)
    expected = torch.autograd.grad(frozen(x).square().sum(), wanted)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)
    with torch.autocast("cpu"):
        output = frozen.float()(x.detach().bfloat16())
    (gradient,) = torch.autograd.grad(output, frozen.bias, grad_output := torch.randn_like(output))
    torch.testing.assert_close(gradient, grad_output.float().sum((0, 2, 3)))


def test_compiles() -> None:
    frozen = FrozenBatchNorm2d.from_dense(dense_norm())
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(frozen(x).square().sum(), x)[0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    (
        (
            lambda: FrozenBatchNorm2d.from_dense(nn.ReLU()),
            TypeError,
            "module: got ReLU, expected an nn.BatchNorm2d",
        ),  # type: ignore[arg-type]
        (
            lambda: FrozenBatchNorm2d.from_dense(nn.BatchNorm2d(3, track_running_stats=False)),
            ValueError,
            "module: got track_running_stats=False",
        ),
        (
            lambda: FrozenBatchNorm2d.from_dense(FoldedBatchNorm2d(3)),
            TypeError,
            "module: got a FoldedBatchNorm2d with a forward of its own",
        ),
        (
            lambda: FoldedBatchNorm2d(3).to_dense(),
            TypeError,
            r"to_dense\(\): got a FoldedBatchNorm2d with a forward of its own",
        ),
        (lambda: FrozenBatchNorm2d(3)(torch.ones(3, 4)), ValueError, "expected 4D input"),
    ),
)
def test_bad_input(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_function_without_module() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    mean, variance = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    expected = (x - mean[:, None]) / (variance[:, None] + 0.5).sqrt()
    torch.testing.assert_close(frozen_batch_norm(x, None, None, mean, variance, 0.5), expected)
