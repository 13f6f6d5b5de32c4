"""``SparseLinear`` and ``sparse_linear`` against ``nn.Linear``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bad_rows import bad_channels_of_two_rows
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

from trady_kernels import SparseLinear, sparse_linear


@dataclass(frozen=True)
class Case:
    """A layer, the leading dimensions of its input and the features selected."""

    name: str
    in_features: int
    out_features: int
    leading: tuple[int, ...]
    channels: tuple[int, ...]
    bias: bool = True
    transposed: bool = False  # the input is a transposed view, as from NCHW to tokens

    def __str__(self) -> str:
        return self.name

    def dense(self, dtype: torch.dtype = torch.float64) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias, dtype=dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        if self.transposed:
            *first, last = self.leading
            return torch.randn(*first, self.in_features, last, dtype=dtype).transpose(-1, -2)
        return torch.randn(*self.leading, self.in_features, dtype=dtype)


CASES = (
    Case("matrix", 7, 5, (9,), (0, 3, 6)),
    Case("no bias", 7, 5, (9,), (0, 3, 6), bias=False),
    Case("tokens", 7, 5, (2, 9), (1, 2)),
    Case("transposed tokens", 7, 5, (2, 9), (1, 2), transposed=True),
    Case("four dimensions", 6, 5, (2, 3, 4), (5,)),
    Case("one vector", 7, 5, (), (1, 2)),
    Case("empty batch", 7, 5, (0,), (1, 2)),
    Case("no feature", 7, 5, (2, 9), ()),
    Case("all features", 4, 5, (2, 9), (0, 1, 2, 3)),
    Case("one vector, no feature", 4, 5, (), ()),
    Case("one feature in, one out", 1, 1, (3,), (0,)),
)


def compare(dense: nn.Linear, sparse: SparseLinear, input: torch.Tensor, rounding: float) -> None:
    """Output bit-equal, every gradient equal."""
    x = input.detach().requires_grad_()
    x_sparse = input.detach().requires_grad_()
    output, output_sparse = dense(x), sparse(x_sparse)
    torch.testing.assert_close(output_sparse, output, rtol=0, atol=0)
    assert output_sparse.stride() == output.stride()
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    output_sparse.backward(grad_output)
    assert x.grad is not None and x_sparse.grad is not None and dense.weight.grad is not None
    pairs = [(x_sparse.grad, x.grad)]
    if len(sparse.channels):
        assert sparse.channel_weight.grad is not None
        pairs.append((sparse.channel_weight.grad, sparse.read_rows(dense.weight.grad, sparse.channels)))
    else:
        assert sparse.channel_weight.grad is None
    if dense.bias is not None:
        assert sparse.bias.grad is not None and dense.bias.grad is not None
        pairs.append((sparse.bias.grad, dense.bias.grad))
    for actual, expected in pairs:
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * scale)
    assert sparse.weight.grad is None


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense(case: Case, dtype: torch.dtype) -> None:
    dense = case.dense(dtype)
    compare(dense, SparseLinear.from_dense(dense, case.channels), case.input(dtype), ROUNDING[dtype])


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case.leading], ids=str)
def test_gradcheck(case: Case) -> None:
    sparse = SparseLinear.from_dense(case.dense(), case.channels)
    weight = sparse.weight.detach()

    def layer(input: torch.Tensor, rows: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": weight, "channel_weight": rows}
        parameters |= {"bias": bias[0]} if bias else {}
        return torch.func.functional_call(sparse, parameters, (input,))

    bias = [] if sparse.bias is None else [sparse.bias]
    inputs = (
        case.input().requires_grad_(),
        sparse.channel_weight.detach().clone().requires_grad_(),
        *bias,
    )
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True, check_undefined_grad=False)


def test_autocast() -> None:
    dense = nn.Linear(7, 5)
    sparse = SparseLinear.from_dense(dense, [0, 4])
    x = torch.randn(3, 4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, output_sparse = dense(x), sparse(x)
        assert torch.equal(output, output_sparse) and output_sparse.dtype == torch.bfloat16
        assert saved_bytes(sparse, lambda: sparse(x)) == 3 * 4 * 2 * 2
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    output_sparse.backward(grad_output)
    expected = sparse.read_rows(dense.weight.grad, sparse.channels)  # type: ignore[arg-type]
    assert sparse.channel_weight.grad is not None and sparse.channel_weight.grad.dtype == torch.float32
    bound = ROUNDING[torch.bfloat16] * float(expected.abs().max())
    torch.testing.assert_close(sparse.channel_weight.grad, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("tokens", "transposed tokens", "no feature")], ids=str
)
def test_saves_selected_features_only(case: Case) -> None:
    sparse = SparseLinear.from_dense(case.dense(), case.channels)
    x = case.input().requires_grad_()
    assert saved_bytes(sparse, lambda: sparse(x)) == 2 * 9 * len(case.channels) * 8
    x.requires_grad_(False)
    sparse.requires_grad_(False)
    assert saved_bytes(sparse, lambda: sparse(x)) == 0
    assert sparse.bias is not None
    sparse.bias.requires_grad_(True)
    assert saved_bytes(sparse, lambda: sparse(x)) == 0
    grad_output = torch.randn(*x.shape[:-1], sparse.out_features, dtype=x.dtype)
    sparse(x).backward(grad_output)
    torch.testing.assert_close(sparse.bias.grad, grad_output.flatten(0, -2).sum(0))


def test_double_backward_and_vmap_are_refused() -> None:
    sparse = SparseLinear(4, 3, channels=2)
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(sparse(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_linear has no double backward"):
        grad.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"sparse_linear cannot run under torch.vmap"):
        torch.vmap(sparse)(x)


def test_second_derivatives_are_no_zeros() -> None:
    sparse = SparseLinear(4, 3, channels=2)
    x = torch.randn(2, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sparse(x).square().sum()

    with pytest.raises(RuntimeError, match="sparse_linear has no double backward"):
        torch.autograd.functional.hessian(loss, x)
    (grad,) = torch.autograd.grad(loss(x), sparse.channel_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_linear has no double backward"):
        torch.autograd.grad(grad.sum(), sparse.channel_weight)


def test_all_features_of_a_part_save_a_copy() -> None:
    """As a pooler's, of the first token: the input itself would keep all tokens."""
    sparse = SparseLinear(6, 3, channels=list(range(6)))
    tokens = torch.randn(2, 50, 6)
    assert saved_bytes(sparse, lambda: sparse(tokens[:, 0])) == 2 * 6 * 4
    sparse(tokens[:, 0]).square().sum().backward()
    weight = sparse.weight.detach().clone().requires_grad_()
    torch.nn.functional.linear(tokens[:, 0], weight, sparse.bias).square().sum().backward()
    torch.testing.assert_close(sparse.channel_weight.grad, weight.grad.t())


@pytest.mark.parametrize(
    ("input", "error", "words"),
    (
        (torch.ones(2, 5), ValueError, r"input: got shape \(2, 5\), expected \(..., 4\)"),
        (torch.tensor(1.0), ValueError, r"input: got shape \(\)"),
        ([[1.0]], TypeError, "input: got list, expected a tensor"),
    ),
)
def test_bad_input(input: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SparseLinear(4, 4, channels=2)(input)


def test_function_without_module() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    channels = torch.tensor([0, 2])
    rows = weight.t()[channels].clone().requires_grad_()
    dense = weight.clone().requires_grad_()
    x, grad_output = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    sparse_linear(x, weight, None, rows, channels).backward(grad_output)
    nn.functional.linear(x, dense).backward(grad_output)
    torch.testing.assert_close(rows.grad, dense.grad.t()[channels])  # type: ignore[union-attr]
    assert not sparse_linear(x, weight, None, None, channels).requires_grad


@bad_channels_of_two_rows
def test_bad_channels_of_the_function(channels: Any, error: type[Exception], words: str) -> None:
    rows = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(error, match=words):
        sparse_linear(torch.randn(2, 3), torch.randn(4, 3), None, rows, channels)
