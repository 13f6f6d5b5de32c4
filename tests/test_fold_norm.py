"""``fold_norm``: the convolution that has a frozen batch norm in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trady_kernels.ops import backend, fold_norm, last_kernel
from trady_kernels.ops.backend import OPERATORS

OUTPUTS = 6
SHAPES = (
    (OUTPUTS, 5, 3, 3),
    (OUTPUTS, 1, 3, 3),
    (OUTPUTS, 7, 1, 1),
    (OUTPUTS, 65, 2, 3),
    (OUTPUTS, 0, 1, 1),
    (0, 3, 1, 1),
)
#: Which of bias, gamma, beta and mean there are.
GIVEN = (
    (True, True, True, True),
    (False, True, True, True),
    (True, False, False, True),
    (False, False, False, False),
)


def arguments(
    shape: tuple[int, ...], given: tuple[bool, ...] = GIVEN[0], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor | None, ...]:
    values = [torch.randn(shape[0], dtype=dtype) if there else None for there in given]
    return torch.randn(shape, dtype=dtype), *values, torch.rand(shape[0], dtype=dtype) + 0.1


@pytest.mark.parametrize("given", GIVEN[:3], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_one_convolution_for_two_operations(shape: tuple[int, ...], given: tuple[bool, ...]) -> None:
    weight, bias, gamma, beta, mean, variance = arguments(shape, given, torch.float64)
    assert weight is not None and variance is not None
    scaled, scale, shift = fold_norm(weight, bias, gamma, beta, mean, variance, 1e-3, torch.float64)
    x = torch.randn(2, shape[1], 5, 6, dtype=torch.float64)
    expected = F.batch_norm(F.conv2d(x, weight, bias), mean, variance, gamma, beta, eps=1e-3)
    torch.testing.assert_close(F.conv2d(x, scaled, shift), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scaled, weight * scale.view(-1, 1, 1, 1))


def test_without_a_mean_there_is_no_shift() -> None:
    weight, _, gamma, _, _, variance = arguments(SHAPES[0])
    assert weight is not None and variance is not None
    scaled, scale, shift = fold_norm(weight, None, gamma, None, None, variance, 1e-5, torch.bfloat16)
    assert shift.shape == (0,) and scale.dtype is torch.float32 and scaled.dtype is torch.bfloat16
    assert torch.equal(scaled, (weight * scale.view(-1, 1, 1, 1)).bfloat16())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_cuda(channels_last: bool, given: tuple[bool, ...], dtype: torch.dtype, cuda_device: str) -> None:
    for shape in SHAPES:
        values = [None if t is None else t.to(cuda_device) for t in arguments(shape, given)]
        weight = values[0]
        assert weight is not None
        if channels_last:
            values[0] = weight = weight.contiguous(memory_format=torch.channels_last)
        with backend("cuda"):
            found = fold_norm(*values, 1e-3, dtype)  # type: ignore[arg-type]
        assert last_kernel("fold_norm") == "cuda"
        expected = OPERATORS["fold_norm"].kernels["reference"](*values, 1e-3, dtype)
        assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
        assert [t.stride() for t in found] == [weight.stride(), (1,), (1,)]
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(found[0], expected[0], rtol=rounding, atol=0.0)
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_cuda_takes_values_with_gaps(cuda_device: str) -> None:
    weight, _, _, _, mean, variance = (None if t is None else t.to(cuda_device) for t in arguments(SHAPES[0]))
    assert weight is not None and mean is not None and variance is not None
    apart = [torch.stack((t, t), 1)[:, 0] for t in (mean, variance)]
    with backend("cuda"):
        for ours, theirs in zip(
            fold_norm(weight, None, None, None, *apart, 1e-3, torch.float32),
            fold_norm(weight, None, None, None, mean, variance, 1e-3, torch.float32),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_bad_arguments() -> None:
    weight, bias, gamma, beta, mean, variance = arguments(SHAPES[0])
    assert weight is not None and bias is not None and variance is not None
    with pytest.raises(ValueError, match=r"bias: got shape \(5,\), expected \(6,\)"):
        fold_norm(weight, bias[:5], gamma, beta, mean, variance, 1e-3, torch.float32)
    with pytest.raises(ValueError, match=r"running_var: got shape \(6, 1\)"):
        fold_norm(weight, bias, gamma, beta, mean, variance[:, None], 1e-3, torch.float32)
