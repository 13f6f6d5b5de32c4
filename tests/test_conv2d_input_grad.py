"""``conv2d_input_grad`` against autograd in float64, by whichever way it takes, and its refusals."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CONV_CASES, FLOATING, ConvCase
from tolerances import DTYPE_ROUNDOFF, sum_tolerance
from torch._subclasses.fake_tensor import FakeTensorMode

from trady_kernels.ops import conv2d_input_grad
from trady_kernels.ops.backend import OPERATORS
from trady_kernels.ops.layout import FORMATS, memory_format_of

#: The package, whose name in trady_kernels.ops is its function's.
conv2d_input_grad_package = importlib.import_module("trady_kernels.ops.conv2d_input_grad")
DEPTHWISE = tuple(case for case in CONV_CASES if case.groups == case.in_channels == case.out_channels)
GEOMETRY = ("stride", "padding", "dilation")


def tensors(case: ConvCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``grad_output`` and weight."""
    grad_output = torch.randn(case.batch, case.out_channels, *case.out_size).to(dtype)
    weight = torch.randn(case.out_channels, case.in_channels // case.groups, *case.kernel_size).to(dtype)
    return grad_output, weight


def expected(
    case: ConvCase, grad_output: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient in float64, and of each element the sum of its products' magnitudes."""
    found = []
    for dy, w in ((grad_output, weight), (grad_output.abs(), weight.abs())):
        x = torch.zeros(case.batch, case.in_channels, *case.size, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x, w.double(), None, case.stride, case.padding, case.dilation, case.groups)
        found.append(torch.autograd.grad(y, x, dy.double())[0])
    return found[0], found[1]


def check(case: ConvCase, grad: torch.Tensor, grad_output: torch.Tensor, weight: torch.Tensor) -> None:
    """Its values, to a rounding to the dtype and those of sums."""
    reference, magnitude = expected(case, grad_output, weight)
    length = case.out_channels // case.groups * case.kernel_size[0] * case.kernel_size[1]
    bound = magnitude * sum_tolerance(grad.dtype, length) + reference.abs() * DTYPE_ROUNDOFF[grad.dtype]
    bound += torch.finfo(grad.dtype).smallest_normal * DTYPE_ROUNDOFF[grad.dtype]  # of a subnormal number
    assert ((grad.cpu().double() - reference).abs() <= 2 * bound).all()


def check_of_aten(
    case: ConvCase, grad: torch.Tensor, grad_output: torch.Tensor, weight: torch.Tensor
) -> None:
    """ATen may sum half types in themselves: there each product may cost a rounding."""
    if grad.dtype.itemsize > 2:
        check(case, grad, grad_output, weight)
        return
    reference, magnitude = expected(case, grad_output, weight)
    products = case.out_channels // case.groups * case.kernel_size[0] * case.kernel_size[1]
    bound = 2 * products * DTYPE_ROUNDOFF[grad.dtype] * (magnitude + torch.finfo(grad.dtype).smallest_normal)
    assert ((grad.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_cases(case: ConvCase, memory_format: str) -> None:
    """In every dtype in turn."""
    dtype = FLOATING[CONV_CASES.index(case) % len(FLOATING)]
    grad_output, weight = tensors(case, dtype)
    shape = (case.batch, case.in_channels, *case.size)
    grad = conv2d_input_grad(
        grad_output, weight, shape, FORMATS[memory_format], *(getattr(case, n) for n in GEOMETRY), case.groups
    )
    assert grad.shape == shape and grad.is_contiguous(memory_format=FORMATS[memory_format])
    check_of_aten(case, grad, grad_output, weight)


@pytest.mark.parametrize("kernel", ("reference", "aten"))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_depthwise_kernels(dtype: torch.dtype, kernel: str) -> None:
    for case in DEPTHWISE:
        for memory_format in FORMATS.values():
            grad_output, weight = tensors(case, dtype)
            grad_output = grad_output.contiguous(memory_format=memory_format)
            grad = OPERATORS["conv2d_depthwise_input_grad"].kernels[kernel](
                grad_output, weight, case.size, *(getattr(case, n) for n in GEOMETRY)
            )
            assert grad.dtype == dtype
            check_of_aten(case, grad, grad_output, weight)


@pytest.mark.parametrize(
    ("dtype", "channels", "memory_format", "size", "stride", "dilation", "taken"),
    (
        (torch.bfloat16, 16, "channels_last", 3, 1, 1, "triton"),
        (torch.float16, 16, "channels_last", 5, 2, 1, "triton"),
        (torch.float32, 16, "channels_last", 3, 1, 1, "reference"),
        (torch.bfloat16, 12, "channels_last", 3, 1, 1, "reference"),
        (torch.bfloat16, 16, "contiguous", 3, 1, 1, "reference"),
        (torch.bfloat16, 16, "channels_last", 3, 3, 1, "reference"),
        (torch.bfloat16, 16, "channels_last", 7, 1, 1, "reference"),
        (torch.bfloat16, 16, "channels_last", 3, 1, 2, "reference"),
    ),
)
def test_choice_on_a_gpu(
    dtype: torch.dtype,
    channels: int,
    memory_format: str,
    size: int,
    stride: int,
    dilation: int,
    taken: str,
) -> None:
    with FakeTensorMode():
        grad_output = torch.empty(
            2, channels, 9, 9, dtype=dtype, device="cuda", memory_format=FORMATS[memory_format]
        )
        weight = torch.empty(channels, 1, size, size, dtype=dtype, device="cuda")
        geometry = ((stride, stride), (size // 2, size // 2), (dilation, dilation))
        assert (
            OPERATORS["conv2d_depthwise_input_grad"].choose(grad_output, weight, (9, 9), *geometry) == taken
        )


def test_a_gpu_without_triton_takes_convolution_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_input_grad_package, "TRITON_INSTALLED", False)
    with FakeTensorMode():
        grad_output = torch.empty(
            2, 16, 9, 9, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
        )
        weight = torch.empty(16, 1, 3, 3, dtype=torch.bfloat16, device="cuda")
        choose = OPERATORS["conv2d_depthwise_input_grad"].choose
        assert choose(grad_output, weight, (9, 9), (1, 1), (1, 1), (1, 1)) == "reference"


def test_format_of_the_result_is_that_of_the_gradient() -> None:
    case = DEPTHWISE[0]
    for memory_format in FORMATS.values():
        grad_output, weight = tensors(case, torch.float32)
        grad_output = grad_output.contiguous(memory_format=memory_format)
        grad = torch.ops.trady.conv2d_depthwise_input_grad(
            grad_output, weight, case.size, *(getattr(case, n) for n in GEOMETRY)
        )
        assert memory_format_of(grad) is memory_format


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"grad_output": torch.zeros(2, 6, 4)}, r"grad_output: got shape \(2, 6, 4\)"),
        (
            {"grad_output": torch.zeros(2, 6, 4, 4, dtype=torch.int64)},
            "grad_output: .*int64, expected .* floating",
        ),
        ({"weight": torch.zeros(6, 2, 3, 3)}, r"weight: got shape \(6, 2, 3, 3\).*expected \(6, 1, kh, kw\)"),
        ({"weight": torch.zeros(6, 1, 3, 3).double()}, "weight: .*float64, expected .*float32"),
        ({"stride": (0, 1)}, r"stride, padding, dilation: got \(0, 1\)"),
        ({"padding": (-1, 1)}, r"stride, padding, dilation: got .*\(-1, 1\)"),
        ({"input_size": (5, 4)}, r"input_size: got \(5, 4\), expected .*\(4, 4\)"),
        ({"input_size": (4, 0)}, r"input_size: got \(4, 0\)"),
    ),
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "grad_output": torch.zeros(2, 6, 4, 4),
        "weight": torch.zeros(6, 1, 3, 3),
        "input_size": (4, 4),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
    }
    with pytest.raises(ValueError, match=message):
        OPERATORS["conv2d_depthwise_input_grad"].call(*{**arguments, **changed}.values())
