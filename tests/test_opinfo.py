"""PyTorch's own sample inputs for conv2d and linear through the sparse Functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import ROUNDING

from trady_kernels import sparse_conv2d, sparse_linear

samples = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="torch's own test cases cannot be imported: pip install expecttest",
)
OPS = {op.name: op for op in samples.op_db if op.name in ("nn.functional.conv2d", "nn.functional.linear")}

# torch itself notes that even kernels under 'same' cost a padded copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def assert_equal(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert actual is not None and expected is not None
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    bound = ROUNDING[torch.float64] * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, equal_nan=True)


def check(dense: Any, sparse: Any, input: Any, weight: Any, bias: Any, read: Any, count: int) -> None:
    for selected in {0, 1, count // 2, count}:
        channels = torch.randperm(count)[:selected].sort().values
        x, w = leaf(input), leaf(weight)
        x_sparse, rows = leaf(input), leaf(read(weight, channels))
        b, b_sparse = (None, None) if bias is None else (leaf(bias), leaf(bias))
        output, output_sparse = dense(x, w, b), sparse(x_sparse, weight.detach(), b_sparse, rows, channels)
        torch.testing.assert_close(output_sparse, output, rtol=0, atol=0)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        output_sparse.backward(grad_output)
        assert_equal(x_sparse.grad, x.grad)
        assert_equal(rows.grad, read(w.grad, channels))
        if b is not None and b_sparse is not None:
            assert_equal(b_sparse.grad, b.grad)


def samples(name: str) -> list[Any]:
    found = list(OPS[name].sample_inputs("cpu", torch.float64, requires_grad=False))
    assert len(found) > 5
    return found


def test_conv2d_samples() -> None:
    for sample in samples("nn.functional.conv2d"):
        arguments = dict(
            zip(("weight", "bias", "stride", "padding", "dilation", "groups"), sample.args, strict=False)
        )
        arguments |= sample.kwargs
        weight, bias = arguments.pop("weight"), arguments.pop("bias", None)
        groups = arguments.get("groups", 1)

        def read(weight: torch.Tensor, channels: torch.Tensor, groups: int = groups) -> torch.Tensor:
            by_channel = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            return by_channel[channels]

        def dense(x: Any, w: Any, b: Any, arguments: dict[str, Any] = arguments) -> torch.Tensor:
            return F.conv2d(x, w, b, **arguments)

        def sparse(*args: Any, arguments: dict[str, Any] = arguments) -> torch.Tensor:
            return sparse_conv2d(*args, **arguments)

        check(dense, sparse, sample.input, weight, bias, read, weight.shape[1] * groups)


def test_linear_samples() -> None:
    for sample in samples("nn.functional.linear"):
        weight, *rest = sample.args
        bias = sample.kwargs.get("bias", rest[0] if rest else None)
        if weight.dim() == 1:  # a product of vectors: not what nn.Linear does
            continue

        def read(weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
            return weight.t()[channels]

        check(F.linear, sparse_linear, sample.input, weight, bias, read, weight.shape[1])
