"""``conv2d_channel_grad_squares`` and ``linear_channel_grad_squares``: every kernel against the gradient itself."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, FLOATING, LINEAR_CASES, ConvCase, LinearCase
from test_conv2d_channel_grad import LAYOUTS, arguments
from test_linear_channel_grad import arguments as linear_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from trady_kernels.ops import (
    backend,
    conv2d_channel_grad_squares,
    last_kernel,
    linear_channel_grad_squares,
)
from trady_kernels.ops.conv2d_channel_grad import reference
from trady_kernels.ops.linear_channel_grad import reference as linear_reference
from trady_kernels.ops.squares import SQUARED_ROWS

#: Largest relative error of a sum of squares, each element's error being a few roundoffs of a far longer sum's terms.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def check(actual: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype) -> None:
    expected = gradient.flatten(1).square().sum(1)
    assert actual.dtype == torch.promote_types(dtype, torch.float32) and actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("kernel", ("cpp", "auto"))
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolutions(case: ConvCase, kernel: str) -> None:
    for layout in ("contiguous", "channels_last", "slices"):
        for dtype in FLOATING:
            x, dy, *rest = arguments(case, dtype)
            gradient = reference(x.double(), dy.double(), *rest)
            with backend(kernel):
                check(conv2d_channel_grad_squares(*LAYOUTS[layout](x, dy), *rest), gradient, dtype)
            assert kernel == "auto" or last_kernel("conv2d_channel_grad_squares") == kernel


@pytest.mark.parametrize("kernel", ("cpp", "auto"))
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_layers(case: LinearCase, kernel: str) -> None:
    for selected in case.selected:
        for dtype in FLOATING:
            x, dy = linear_arguments(case, selected, dtype)
            with backend(kernel):
                check(linear_channel_grad_squares(x, dy), linear_reference(x.double(), dy.double()), dtype)


@pytest.mark.parametrize("case", [case for case in CONV_CASES if case.groups in (1, 16, 19)], ids=str)
def test_triton_on_convolutions(case: ConvCase, triton_device: str) -> None:
    for layout in ("contiguous", "channels_last"):
        x, dy, channels, *rest = arguments(case, torch.float32)
        gradient = reference(x.double(), dy.double(), channels, *rest)
        tensors = [tensor.to(triton_device) for tensor in (*LAYOUTS[layout](x, dy), channels)]
        with backend("triton"):
            check(conv2d_channel_grad_squares(*tensors, *rest).cpu(), gradient, torch.float32)
        assert last_kernel("conv2d_channel_grad_squares") == "triton"


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_triton_on_linear_layers(case: LinearCase, triton_device: str) -> None:
    for selected in case.selected:
        x, dy = linear_arguments(case, selected, torch.float32)
        with backend("triton"):
            squares = linear_channel_grad_squares(x.to(triton_device), dy.to(triton_device))
        check(squares.cpu(), linear_reference(x.double(), dy.double()), torch.float32)


class Largest(TorchDispatchMode):
    """Elements of the largest result of an operator of ATen that runs inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_gradient_never_exists_as_a_whole() -> None:
    case = ConvCase("", 1, 200, 50, (4, 4), 200, padding=(1, 1))
    args = arguments(case, torch.float32)
    with backend("aten"), Largest() as largest:
        conv2d_channel_grad_squares(*args)
    assert largest.elements == SQUARED_ROWS * 50 * 9
    x, dy = torch.randn(3, 300), torch.randn(3, 70)
    with backend("aten"), Largest() as largest:
        linear_channel_grad_squares(x, dy)
    assert largest.elements == SQUARED_ROWS * 70


def test_bad_arguments() -> None:
    x, dy, channels, *rest = arguments(CONV_CASES[1], torch.float32)
    with pytest.raises(ValueError, match="channels: got shape"):
        conv2d_channel_grad_squares(x, dy, channels[1:], *rest)
    with pytest.raises(ValueError, match="grad_output: got shape"):
        linear_channel_grad_squares(torch.randn(5, 2), torch.randn(4, 3))
