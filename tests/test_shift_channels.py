"""``shift_channels_``: a value a channel, added in place."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATING, laid_out

from trady_kernels.ops import backend, last_kernel, shift_channels_

#: Channels and pixels that fill vectors of 16 bytes and that do not, more than a block, and nothing.
SHAPES = (
    (2, 8, 3, 8),
    (2, 16, 3, 5),
    (3, 5, 4, 8),
    (2, 3, 7, 5),
    (1, 8, 1, 1),
    (2, 24, 17, 23),
    (0, 3, 2, 2),
    (4, 6),
    (2, 3, 4, 2, 2),
)


def shift_of(input: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    return torch.randn(input.shape[1], dtype=dtype).to(input.device)


def check(input: torch.Tensor) -> None:
    shift = shift_of(input)
    wide = input.double() + shift.double().view(-1, *(1,) * (input.dim() - 2))
    shift_channels_(input, shift)
    # One rounding of a sum that float32 holds almost exactly.
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14}.get(input.dtype, torch.finfo(input.dtype).eps)
    torch.testing.assert_close(input.double(), wide, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "slice", "transposed"))
def test_reference(layout: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:7]:
        check(laid_out(torch.randn(shape).to(dtype), layout))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_cuda(channels_last: bool, dtype: torch.dtype, cuda_device: str) -> None:
    for shape in SHAPES:
        input = torch.randn(shape).to(cuda_device, dtype)
        if channels_last and len(shape) == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        with backend("cuda"):
            check(input)
            assert last_kernel("shift_channels_") == "cuda"


def test_cuda_at_an_odd_address(cuda_device: str) -> None:
    for inner in (3, 8):
        flat = torch.randn(2 * 8 * inner + 1).to(cuda_device, torch.bfloat16)
        with backend("cuda"):
            check(flat[1:].view(2, 8, inner))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"shift: got shape \(4,\) for input \(2, 3, 5\), expected \(C,\)"):
        shift_channels_(torch.zeros(2, 3, 5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"shift: got torch.float64, expected torch.float32"):
        shift_channels_(torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"input: got torch.int64"):
        shift_channels_(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3))
