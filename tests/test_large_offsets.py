"""Offsets past 2**31: every operator that follows strides, on tensors of which only a few pages are ever touched."""

from __future__ import annotations

import mmap

import pytest
import torch
from cases import POINT, SAME, ConvCase
from tolerances import sum_tolerance

from trady_kernels.ops import (
    backend,
    conv2d_channel_grad,
    gather_channels,
    linear_channel_grad,
    max_pool2d_offsets,
    max_pool2d_offsets_backward,
    pack_bits,
)
from trady_kernels.ops.conv2d_channel_grad import reference as conv2d_reference
from trady_kernels.ops.linear_channel_grad import reference as linear_reference

#: Linux's own number; the mmap module names it from Python 3.13 on.
MAP_NORESERVE = 0x4000


def untouched(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # 2 MiB for every element that lies alone would be too much
    return torch.frombuffer(memory, dtype=dtype)


def spread(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """The same values, the last ones along ``dimension`` 2**31 elements on; the other dimensions keep their strides."""
    strides = list(values.stride())
    strides[dimension] = 2**31 // (values.shape[dimension] - 1) + 12345
    size = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    return untouched(size, values.dtype).as_strided(values.shape, strides).copy_(values)


def in_format(values: torch.Tensor, layout: str) -> torch.Tensor:
    return values.contiguous(memory_format=getattr(torch, layout))


LAYOUTS = ("contiguous_format", "channels_last")

CASES = (
    ConvCase("1x1", 3, 9, 40, (7, 9), 5, kernel_size=POINT),
    ConvCase("3x3", 2, 8, 12, (5, 33), 2, padding=SAME),
    ConvCase("3x3, stride 2", 2, 8, 12, (6, 34), 2, stride=(2, 2), padding=SAME),
    ConvCase("4x5, dilation 2", 2, 4, 6, (12, 15), 3, kernel_size=(4, 5), padding=(1, 2), dilation=(2, 2)),
    ConvCase("depthwise", 2, 12, 12, (9, 17), 5, padding=SAME, groups=12),
    ConvCase("depthwise 5x5, stride 2", 2, 9, 9, (14, 19), 5, (5, 5), (2, 2), (2, 2), (1, 1), 9),
    ConvCase("groups", 2, 8, 24, (9, 9), 5, padding=SAME, groups=4),
)


@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_channels(layout: str, dimension: int, isa: str) -> None:
    channels = torch.tensor([0, 2, 6])
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        values = in_format(torch.randn(3, 7, 5, 6).mul(9).to(dtype), layout)
        with backend("cpp"):
            assert torch.equal(gather_channels(spread(values, dimension), channels), values[:, channels])


@pytest.mark.parametrize("dimension", range(2))
def test_gather_features(dimension: int, isa: str) -> None:
    values, channels = torch.randn(9, 7), torch.tensor([0, 2, 6])
    with backend("cpp"):
        assert torch.equal(gather_channels(spread(values, dimension), channels), values[:, channels])


@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_channel_grad(case: ConvCase, layout: str, dimension: int) -> None:
    channels = torch.arange(case.in_channels)[-case.selected :]
    x = in_format(torch.randn(case.batch, case.selected, *case.size), layout)
    dy = in_format(torch.randn(case.batch, case.out_channels, *case.out_size), layout)
    geometry = (case.kernel_size, case.stride, case.padding, case.dilation, case.groups)
    rest = (channels, case.in_channels, *geometry)
    length = case.batch * case.out_size[0] * case.out_size[1]
    expected = conv2d_reference(x.double(), dy.double(), *rest)
    allowed = sum_tolerance(x.dtype, length) * conv2d_reference(x.double().abs(), dy.double().abs(), *rest)
    for inputs in ((spread(x, dimension), dy), (x, spread(dy, dimension))):
        with backend("cpp"):
            actual = conv2d_channel_grad(*inputs, *rest)
        assert bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("features", (3, 40))
@pytest.mark.parametrize("dimension", range(2))
def test_linear_channel_grad(dimension: int, features: int, isa: str) -> None:
    x, dy = torch.randn(37, features), torch.randn(37, 65)
    expected = linear_reference(x.double(), dy.double())
    allowed = sum_tolerance(x.dtype, 37) * linear_reference(x.double().abs(), dy.double().abs())
    for inputs in ((spread(x, dimension), dy), (x, spread(dy, dimension))):
        with backend("cpp"):
            actual = linear_channel_grad(*inputs)
        assert bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool2d(layout: str, dimension: int, isa: str) -> None:
    x = in_format(torch.randn(2, 5, 9, 12), layout)
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1))
    with backend("reference"):
        expected, places = max_pool2d_offsets(x, *geometry, False)
        grad_output = in_format(torch.randn(expected.shape), layout)
        expected_grad = max_pool2d_offsets_backward(grad_output, places, (9, 12), *geometry)
    with backend("cpp"):
        output, offsets = max_pool2d_offsets(spread(x, dimension), *geometry, False)
        grad = max_pool2d_offsets_backward(spread(grad_output, dimension), places, (9, 12), *geometry)
    assert torch.equal(output, expected) and torch.equal(offsets, places) and torch.equal(grad, expected_grad)


# ---- more than 2**31 elements -------------------------------------------------------------------------------

#: Images that are all the same one, so that only one is in memory.
REPEATED = 2**11


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", (1, 64))
def test_conv2d_channel_grad_of_more_elements(layout: str, groups: int) -> None:
    kernel, padding = (POINT, (0, 0)) if groups == 1 else ((3, 3), SAME)
    x = in_format(torch.randint(-2, 3, (1, 2, 128, 129)).float(), layout)
    dy = in_format(torch.randint(-2, 3, (1, 64, 128, 129)).float(), layout)
    rest = (torch.tensor([3, 63]), 64, kernel, (1, 1), padding, (1, 1), groups)
    one = conv2d_reference(x.double(), dy.double(), *rest)
    many = dy.expand(REPEATED, -1, -1, -1)
    assert many.numel() > 2**31
    with backend("cpp"):
        actual = conv2d_channel_grad(x.expand(REPEATED, -1, -1, -1), many, *rest)
    magnitude = REPEATED * conv2d_reference(x.double().abs(), dy.double().abs(), *rest)
    allowed = sum_tolerance(torch.float32, REPEATED * 128 * 129) * magnitude
    assert bool(((actual.double() - REPEATED * one).abs() <= allowed).all())


def test_linear_channel_grad_of_more_elements() -> None:
    rows = 2**21 + 1
    x, dy = torch.randint(-2, 3, (1, 2)).float(), torch.randint(-2, 3, (1, 1024)).float()
    many = dy.expand(rows, -1)
    assert many.numel() > 2**31
    with backend("cpp"):
        actual = linear_channel_grad(x.expand(rows, -1), many)
    assert torch.equal(actual.double(), rows * (x.double().T @ dy.double()))  # integers under 2**24: exact


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_channels_of_more_elements(layout: str) -> None:
    input = in_format(torch.randint(-9, 10, (1, 4, 1024, 1025), dtype=torch.int8), layout)
    channels = torch.tensor([1, 3])
    with backend("cpp"):
        output = gather_channels(input.expand(1025, -1, -1, -1), channels)
    assert output.numel() > 2**31
    for n in (0, 512, 1023, 1024):
        assert torch.equal(output[n], input[0, channels])


@pytest.mark.slow
def test_pack_bits_of_more_elements() -> None:
    mask = untouched(2**31 + 70, torch.bool)
    places = torch.tensor([5, 2**31 - 1, 2**31 + 3, 2**31 + 69])
    mask[places] = True
    with backend("cpp"):
        bits = pack_bits(mask)
    assert bits.numel() == (2**31 + 77) // 8
    assert bits.nonzero()[:, 0].tolist() == (places // 8).tolist()
    assert bits[places // 8].tolist() == (1 << places % 8).tolist()
