"""Lean pooling modules against the ``torch.nn`` classes they stand for."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import FLOATING, laid_out
from saved import saved_bytes
from torch import nn
from torch.profiler import ProfilerActivity, profile

from trady_kernels.nn import (
    LeanAdaptiveAvgPool1d,
    LeanAdaptiveAvgPool2d,
    LeanAdaptiveAvgPool3d,
    LeanAdaptiveMaxPool2d,
    LeanAvgPool1d,
    LeanAvgPool2d,
    LeanAvgPool3d,
    LeanMaxPool2d,
)
from trady_kernels.ops import last_kernel
from trady_kernels.ops import max_pool2d as operators

LEAN: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool2d: LeanMaxPool2d,
    nn.AdaptiveMaxPool2d: LeanAdaptiveMaxPool2d,
    nn.AvgPool1d: LeanAvgPool1d,
    nn.AvgPool2d: LeanAvgPool2d,
    nn.AvgPool3d: LeanAvgPool3d,
    nn.AdaptiveAvgPool1d: LeanAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: LeanAdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: LeanAdaptiveAvgPool3d,
}


@dataclass(frozen=True)
class Case:
    name: str
    dense: type[nn.Module]
    shape: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The dense module and a lean one, which is another whose class was changed."""
        lean = self.dense(**self.arguments)
        lean.__class__ = LEAN[self.dense]
        return self.dense(**self.arguments), lean


MAX_CASES = (
    Case("max 3x3", nn.MaxPool2d, (2, 5, 13, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case("max, stride None", nn.MaxPool2d, (2, 5, 13, 11), {"kernel_size": 2}),
    Case(
        "max, lists, ceil",
        nn.MaxPool2d,
        (2, 5, 13, 11),
        {"kernel_size": [3, 2], "stride": [2], "ceil_mode": True},
    ),
    Case(
        "max, dilated", nn.MaxPool2d, (2, 5, 13, 11), {"kernel_size": (3, 2), "dilation": (2, 3), "stride": 1}
    ),
    Case("max, unbatched", nn.MaxPool2d, (5, 13, 11), {"kernel_size": 3, "stride": 2}),
    Case("max, empty batch", nn.MaxPool2d, (0, 5, 13, 11), {"kernel_size": 3, "stride": 2}),
    Case("adaptive max", nn.AdaptiveMaxPool2d, (2, 5, 12, 10), {"output_size": (3, 5)}),
    Case("adaptive max, own height", nn.AdaptiveMaxPool2d, (2, 5, 12, 10), {"output_size": (None, 2)}),
)
AVERAGE_CASES = (
    Case("avg 1d", nn.AvgPool1d, (2, 5, 13), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case("avg 1d, unbatched", nn.AvgPool1d, (5, 13), {"kernel_size": 4, "ceil_mode": True}),
    Case("avg 2d", nn.AvgPool2d, (2, 5, 13, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case(
        "avg 2d, padding not counted",
        nn.AvgPool2d,
        (2, 5, 13, 11),
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    ),
    Case("avg 2d, own divisor", nn.AvgPool2d, (5, 13, 11), {"kernel_size": 2, "divisor_override": 3}),
    Case("avg 3d", nn.AvgPool3d, (2, 3, 6, 7, 8), {"kernel_size": 3, "stride": 2, "padding": (1, 0, 1)}),
    Case("adaptive avg 1d", nn.AdaptiveAvgPool1d, (2, 5, 13), {"output_size": 4}),
    Case("adaptive avg 2d", nn.AdaptiveAvgPool2d, (2, 5, 13, 11), {"output_size": (4, 3)}),
    Case("adaptive avg 2d, own height", nn.AdaptiveAvgPool2d, (5, 13, 11), {"output_size": (None, 3)}),
    Case("adaptive avg 2d to 1", nn.AdaptiveAvgPool2d, (2, 5, 13, 11), {"output_size": 1}),
    Case("adaptive avg 3d", nn.AdaptiveAvgPool3d, (2, 3, 6, 7, 8), {"output_size": (2, 4, 3)}),
)
CASES = MAX_CASES + AVERAGE_CASES


def run(module: nn.Module, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and gradient of the input for the same random gradients."""
    x = input.detach().clone().requires_grad_()
    output = module(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    assert x.grad is not None
    return output.detach(), x.grad


def inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.randn(case.shape).to(dtype)
    formats = ("contiguous", "channels_last") if x.dim() == 4 else ("contiguous",)
    return [laid_out(x, layout) for layout in formats]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense(case: Case) -> None:
    dense, lean = case.modules()
    # torch has no half types for it on the CPU
    for dtype in FLOATING[:2] if case.dense is nn.AvgPool3d else FLOATING:
        for x in inputs(case, dtype):
            (output, grad), (expected, expected_grad) = run(lean, x), run(dense, x)
            assert torch.equal(output, expected) and output.dtype == expected.dtype
            assert torch.equal(grad, expected_grad)
            if x.dim() == 4 and x.shape[0] > 0:
                assert output.stride() == expected.stride() and grad.stride() == expected_grad.stride()


@pytest.mark.parametrize("case", MAX_CASES, ids=str)
def test_max_pooling_keeps_a_byte_for_each_element(case: Case) -> None:
    _, lean = case.modules()
    for x in inputs(case, torch.float32):
        assert saved_bytes(lean, lambda x=x: lean(x.requires_grad_())) == lean(x).numel()
    if case.shape[0]:
        assert last_kernel("max_pool2d_offsets") == "cpp"


@pytest.mark.parametrize("case", AVERAGE_CASES, ids=str)
def test_average_pooling_keeps_nothing(case: Case) -> None:
    _, lean = case.modules()
    for x in inputs(case, torch.float32):
        assert saved_bytes(lean, lambda x=x: lean(x.requires_grad_())) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_nothing_without_a_gradient(case: Case) -> None:
    dense, lean = case.modules()
    x = torch.randn(case.shape)
    assert torch.equal(lean(x), dense(x)) and not lean(x).requires_grad
    assert saved_bytes(lean, lambda: lean(x)) == 0
    with torch.no_grad():
        assert not lean(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    _, lean = case.modules()
    x = torch.randperm(math.prod(case.shape)).to(torch.float64).view(case.shape).requires_grad_()
    assert torch.autograd.gradcheck(lean, (x,), fast_mode=True)
    if case in AVERAGE_CASES:
        assert torch.autograd.gradgradcheck(lean, (x,), fast_mode=True)


@pytest.mark.parametrize("case", (MAX_CASES[0], MAX_CASES[6]), ids=str)
def test_max_pooling_refuses_double_backward_and_vmap(case: Case) -> None:
    dense, lean = case.modules()
    x = torch.randn(case.shape, requires_grad=True)
    (grad,) = torch.autograd.grad(lean(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="max_pool2d has no double backward"):
        grad.sum().backward()
    stacked = torch.stack([x.detach(), 2 * x.detach()])
    with pytest.raises(NotImplementedError, match=r"max_pool2d cannot run under torch.vmap while it trains"):
        torch.vmap(torch.func.grad(lambda x: lean(x).sum()))(stacked)
    assert torch.equal(torch.vmap(lean)(stacked), torch.vmap(dense)(stacked))
    assert torch.equal(torch.func.grad(lambda x: lean(x).sum())(x.detach()), run_sum(dense, x))


def run_sum(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x).sum(), x)[0]


@pytest.mark.parametrize("case", AVERAGE_CASES, ids=str)
def test_average_pooling_under_transforms(case: Case) -> None:
    dense, lean = case.modules()
    for x in inputs(case, torch.float32):
        stacked = torch.stack([x, 2 * x])

        ours, expected = (
            torch.vmap(torch.func.grad(lambda x, module=module: module(x).square().sum()))(stacked)
            for module in (lean, dense)
        )
        torch.testing.assert_close(ours, expected)


COMPILED = (
    (MAX_CASES[0], True),
    (MAX_CASES[4], False),
    (MAX_CASES[6], False),
    *(
        (case, case is AVERAGE_CASES[7])
        for case in AVERAGE_CASES
        if case.name in ("avg 1d", "avg 2d", "adaptive avg 2d")
    ),
)


@pytest.mark.parametrize(("case", "dynamic"), COMPILED, ids=lambda value: str(value))
def test_compiles(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    dense, lean = case.modules()
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x in inputs(case, torch.float32):
        for ours, expected in zip(run(compiled, x), run(dense, x), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_copies_and_pickles(case: Case) -> None:
    dense, lean = case.modules()
    x = torch.randn(case.shape, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        for ours, expected in zip(run(lean, x), run(dense, x), strict=True):
            assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(other) is LEAN[case.dense] and torch.equal(other(x.float()), lean(x.float()))
    lean.__class__ = case.dense
    assert str(lean) == str(dense) and vars(lean).keys() == vars(dense).keys()


def test_two_forwards_before_a_backward_and_reuse() -> None:
    dense, lean = MAX_CASES[0].modules()
    x = torch.randn(2, 5, 33, 31, requires_grad=True)

    def twice(module: nn.Module) -> torch.Tensor:
        return module(module(x)).sum() + module(2 * x).square().sum()

    (ours,), (expected,) = torch.autograd.grad(twice(lean), x), torch.autograd.grad(twice(dense), x)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("arguments", "shape", "dtype"),
    (
        ({"kernel_size": 17, "stride": 3, "padding": 8}, (2, 3, 20, 20), torch.float32),
        ({"kernel_size": 2, "return_indices": True}, (2, 3, 20, 20), torch.float32),
        ({"kernel_size": 2, "stride": 1}, (2, 3, 8, 8), torch.int64),
    ),
    ids=("289 elements", "indices", "integers"),
)
def test_what_a_byte_cannot_hold_is_torchs(
    arguments: Any, shape: Any, dtype: torch.dtype, monkeypatch: Any
) -> None:
    case = Case("", nn.MaxPool2d, shape, arguments)
    dense, lean = case.modules()
    monkeypatch.setattr(operators._operator, "kernels", {})  # nothing may be called
    x = (10 * torch.randn(shape)).to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    torch.testing.assert_close(lean(x), dense(x), rtol=0, atol=0)


def test_uneven_adaptive_max_pooling_is_torchs() -> None:
    dense, lean = Case("", nn.AdaptiveMaxPool2d, (2, 3, 11, 10), {"output_size": (4, 3)}).modules()
    x = torch.randn(2, 3, 11, 10)
    for ours, expected in zip(run(lean, x), run(dense, x), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "arguments", ({"kernel_size": 3, "padding": 2}, {"kernel_size": 9}, {"kernel_size": 2, "stride": 0})
)
def test_bad_input_raises_what_torch_raises(arguments: Any) -> None:
    dense, lean = Case("", nn.MaxPool2d, (), arguments).modules()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError) as expected:
        dense(x)
    with pytest.raises(RuntimeError) as error:
        lean(x)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", (AVERAGE_CASES[2], AVERAGE_CASES[7], AVERAGE_CASES[5]), ids=str)
def test_average_pooling_writes_no_stand_in_for_its_input(case: Case, layout: str) -> None:
    """In the backward nothing but the gradient is alive, and the peak is the dense module's."""
    torch.use_deterministic_algorithms(False)
    if len(case.shape) != 4 and layout == "channels_last":
        layout = "contiguous"
    shape = (4, *case.shape[1:])
    peaks = []
    for module in case.modules():
        x = laid_out(torch.randn(shape), layout).requires_grad_()
        output = module(x)
        grad_output = torch.ones_like(output)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            (grad,) = torch.autograd.grad(output, x, grad_output)
        alive = peak = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        peaks.append(peak)
        assert peak >= grad.numel() * 4
    assert peaks[1] <= peaks[0] + 64, peaks
