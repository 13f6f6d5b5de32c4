"""``conv2d_depthwise_input_grad`` in Triton against autograd in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import FLOATING, ConvCase, laid_out
from interpreted import on, round_bfloat16
from test_conv2d_input_grad import DEPTHWISE, GEOMETRY, check, tensors

from trady_kernels import SparseConv2d
from trady_kernels.ops import backend, last_kernel
from trady_kernels.ops.backend import OPERATORS
from trady_kernels.ops.layout import memory_format_of

kernel = pytest.importorskip(
    "trady_kernels.ops.conv2d_input_grad.triton_kernel", reason="triton is not installed"
)
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_bfloat16(monkeypatch)


@pytest.fixture
def larger_programs(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """Where they are interpreted: one of many elements takes no longer there than one of few."""
    if triton_device == "cpu":
        monkeypatch.setattr(kernel, "LANES", 4096)


def run(device: str, case: ConvCase, grad_output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with backend("triton"):
        grad = OPERATORS["conv2d_depthwise_input_grad"].call(
            on(device, grad_output), weight.to(device), case.size, *(getattr(case, n) for n in GEOMETRY)
        )
    assert last_kernel("conv2d_depthwise_input_grad") == "triton"
    assert grad.is_contiguous(memory_format=memory_format_of(grad_output)) and grad.dtype == grad_output.dtype
    return grad


def of_channels(case: ConvCase, channels: int) -> ConvCase:
    return dataclasses.replace(case, in_channels=channels, out_channels=channels, groups=channels)


@pytest.mark.usefixtures("larger_programs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_cases(case: ConvCase, layout: str, triton_device: str) -> None:
    dtype = FLOATING[(DEPTHWISE.index(case) + LAYOUTS.index(layout)) % len(FLOATING)]
    grad_output, weight = tensors(case, dtype)
    grad_output = laid_out(grad_output, layout)
    check(case, run(triton_device, case, grad_output, weight), grad_output, weight)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("usual", (*kernel.USUAL_KERNELS, (2, 2), (7, 3)), ids=str)
def test_vectors_of_channels(usual: tuple[int, int], dtype: torch.dtype, triton_device: str) -> None:
    """Every variant, on several programs, with padding of every kind: none, half the kernel, and more."""
    size, stride = usual
    for padding in (0, size // 2, size):
        case = ConvCase(
            "", 2, 16, 16, (size + 4, size + 7), 1, (size,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), 16
        )
        grad_output, weight = tensors(case, dtype)
        grad_output = laid_out(grad_output, "channels_last")
        vector = kernel.vector_of(16, grad_output)
        assert vector == 16 // dtype.itemsize
        check(case, run(triton_device, case, grad_output, weight), grad_output, weight)


def test_weights_in_any_layout(triton_device: str) -> None:
    case = of_channels(DEPTHWISE[0], 8)
    grad_output, weight = tensors(case, torch.float32)
    grad_output = laid_out(grad_output, "channels_last")
    for layout in LAYOUTS:
        check(case, run(triton_device, case, grad_output, laid_out(weight, layout)), grad_output, weight)


@pytest.mark.usefixtures("larger_programs")
def test_the_same_bits_each_time(triton_device: str) -> None:
    case = of_channels(DEPTHWISE[0], 16)
    grad_output, weight = tensors(case, torch.bfloat16)
    grad_output = laid_out(grad_output, "channels_last")
    first, second = (run(triton_device, case, grad_output, weight) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("larger_programs")
def test_elements_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    monkeypatch.setattr(kernel, "MOST_NARROW_LANES", 0)
    for layout in LAYOUTS:
        for case in DEPTHWISE[:3]:
            grad_output, weight = tensors(case, torch.float32)
            grad_output = laid_out(grad_output, layout)
            check(case, run(triton_device, case, grad_output, weight), grad_output, weight)


def test_under_a_transform(triton_device: str) -> None:
    layer = SparseConv2d(8, 8, 3, padding=1, groups=8, channels=[1, 4]).to(triton_device)
    x = torch.randn(2, 8, 5, 4, device=triton_device).contiguous(memory_format=torch.channels_last)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    with backend("triton"):
        grad = torch.func.grad(loss)(x)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(x.requires_grad_()), x)[0])
