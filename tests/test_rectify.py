from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATING, laid_out
from corners import awkward, identical

from trady_kernels.ops import backend, last_kernel, pack_bits, rectify, rectify_


@dataclass(frozen=True)
class Kind:
    """One of torch's activations: as ``rectify`` has it, and torch's output and gradient of a sum."""

    name: str
    min: float
    max: float | None = None
    slope: float | None = None

    def __str__(self) -> str:
        return self.name

    def output(self, input: torch.Tensor) -> torch.Tensor:
        if self.slope is not None:
            return F.leaky_relu(input, self.slope)
        return F.relu(input) if self.max is None else F.hardtanh(input, self.min, self.max)

    def passes(self, input: torch.Tensor) -> torch.Tensor:
        """Where torch's gradient is that of the identity, by its own backward pass."""
        ones = torch.ones_like(input)
        if self.slope is not None:
            return torch.ops.aten.leaky_relu_backward(ones, input, 7.0, False) == 1
        if self.max is None:
            return torch.ops.aten.threshold_backward(ones, input, 0) == 1
        # ATen lets the gradient of NaN pass in its scalar loop and on GPUs, and not in its vector loop.
        return (torch.ops.aten.hardtanh_backward(ones, input, self.min, self.max) == 1) | input.isnan()


KINDS = (
    Kind("relu", 0.0),
    Kind("relu6", 0.0, 6.0),
    Kind("hardtanh", -3.0, 2.3),
    Kind("bounds that no half type has", -0.1, 6.1),
    Kind("leaky", 0.0, slope=0.1),
    Kind("leaky, slope 0", 0.0, slope=0.0),
    Kind("leaky, negative slope", 0.0, slope=-0.5),
)


def check(kind: Kind, input: torch.Tensor) -> None:
    expected, passes = kind.output(input), kind.passes(input)
    output, bits = rectify(input, kind.min, kind.max, kind.slope)
    assert identical(output, expected), kind
    assert output.stride() == torch.empty_like(input).stride()
    assert bits.shape == ((input.numel() + 7) // 8,) and bits.dtype == torch.uint8
    assert torch.equal(bits, pack_bits(torch.empty_like(input, dtype=torch.bool).copy_(passes))), kind
    overwritten = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype).copy_(input)
    assert torch.equal(rectify_(overwritten, kind.min, kind.max, kind.slope), bits)
    assert overwritten.stride() == input.stride() and identical(overwritten, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values(kind: Kind, dtype: torch.dtype, isa: str) -> None:
    with backend("cpp"):
        for count in (0, 1, 7, 64, 65, 130, 331):
            check(kind, awkward(count, dtype))
    assert last_kernel("rectify") == last_kernel("rectify_") == "cpp"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference(kind: Kind) -> None:
    with backend("reference"):
        for dtype in FLOATING:
            check(kind, awkward(331, dtype))


@pytest.mark.parametrize("kernel", ("cpp", "reference"))
@pytest.mark.parametrize(
    "layout", ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")
)
def test_layouts(layout: str, kernel: str) -> None:
    with backend(kernel):
        for shape in ((2, 5, 3, 7), (1, 3, 1, 1), (3, 1, 4, 5), (0, 3, 2, 2)):
            x = laid_out(awkward(torch.Size(shape).numel(), torch.float32).view(shape), layout)
            check(KINDS[1], x)
        check(KINDS[1], awkward(60, torch.float32).view(3, 4, 5).permute(2, 0, 1))
        check(KINDS[4], torch.tensor(-2.0))


def test_every_bfloat16_and_float16(isa: str) -> None:
    """Rounding to the half types, on every value there is."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        with backend("cpp"):
            for slope in (0.1, 3.3, 1e-4):
                check(Kind("leaky", 0.0, slope=slope), numbers.view(dtype))


def test_a_slice_leaves_its_neighbours_alone() -> None:
    for kernel in ("cpp", "reference"):
        whole = torch.randn(7, 9)
        expected = whole.clone()
        expected[2:5, 1:8].relu_()
        with backend(kernel):
            rectify_(whole[2:5, 1:8], 0.0)
        assert torch.equal(whole, expected)


def test_large_enough_for_threads(threads: int, isa: str) -> None:
    with backend("cpp"):
        check(KINDS[1], torch.randn(300, 1001))


def test_bad_arguments() -> None:
    for operator in (rectify, rectify_):
        with pytest.raises(ValueError, match=r"input: got torch.int64, expected one of torch.float32, "):
            operator(torch.ones(3, dtype=torch.int64), 0.0)
        with pytest.raises(
            ValueError, match=r"max: got 6.0 beside slope 0.1, expected one of them to be None"
        ):
            operator(torch.ones(3), 0.0, 6.0, 0.1)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda x: rectify(x, 0.0, 6.0), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    for actual, expected in zip(compiled(x), rectify(x, 0.0, 6.0), strict=True):
        assert torch.equal(actual, expected)
