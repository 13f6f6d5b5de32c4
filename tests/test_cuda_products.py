"""Products summed over pixels in CUDA: 1x1 convolutions without groups, and linear layers, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CONV_CASES, LINEAR_CASES, POINT, ConvCase, LinearCase, laid_out
from test_conv2d_channel_grad import LAYOUTS, Exact, arguments
from test_cuda_conv2d_channel_grad import output_of
from tolerances import sum_tolerance

from trady_kernels.ops import backend, conv2d_channel_grad, last_kernel, linear_channel_grad
from trady_kernels.ops.backend import OPERATORS

F32 = torch.float32


def on_cuda(x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, *rest: object) -> torch.Tensor:
    with backend("cuda"):
        actual = conv2d_channel_grad(x, dy, channels.to(x.device), *rest)  # type: ignore[arg-type]
    assert last_kernel("conv2d_channel_grad") == "cuda"
    return actual


def check(case: ConvCase, device: str, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> None:
    x, dy, *rest = arguments(case, F32)
    exact = Exact(case, (x, dy, *rest))
    for layout in layouts:
        exact.check(on_cuda(*LAYOUTS[layout](x.to(device), dy.to(device)), *rest).cpu())


POINTS = [case for case in CONV_CASES if case.groups == 1 and case.kernel_size == POINT]


@pytest.mark.parametrize("case", POINTS, ids=str)
def test_odd_shapes(case: ConvCase, cuda_device: str) -> None:
    check(case, cuda_device)


def points(
    selected: int,
    outputs: int,
    size: tuple[int, int] = (7, 7),
    *,
    batch: int = 3,
    stride: tuple[int, int] = (1, 1),
) -> ConvCase:
    return ConvCase("", batch, selected + 2, outputs, size, selected, POINT, stride)


@pytest.mark.parametrize("selected", (1, 2, 3, 4, 5, 8, 12, 16, 17, 20))
def test_numbers_of_rows(selected: int, cuda_device: str) -> None:
    """All that a block takes together, those that leave some of its rows empty, and more than one block has."""
    for outputs, size in ((20, (14, 14)), (13, (7, 7)), (40, (4, 6))):
        check(points(selected, outputs, size), cuda_device)


@pytest.mark.parametrize("outputs", (1, 2, 4, 5, 12, 16, 24, 31, 36, 64, 96, 130, 144))
def test_numbers_of_outputs(outputs: int, cuda_device: str) -> None:
    """One warp and all of a block along them, and the warps that are left along pixels."""
    for selected, size in ((1, (8, 8)), (4, (6, 7)), (16, (8, 9))):
        check(points(selected, outputs, size), cuda_device, ("contiguous", "channels_last"))


@pytest.mark.parametrize("size", ((1, 1), (1, 4), (3, 1), (2, 2), (5, 9), (13, 12), (32, 33)))
@pytest.mark.parametrize("stride", ((1, 1), (2, 2), (3, 1)))
def test_maps(size: tuple[int, int], stride: tuple[int, int], cuda_device: str) -> None:
    check(points(5, 12, size, stride=stride), cuda_device)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("stride", ((1, 1), (2, 2)))
def test_blocks_of_several_steps(stride: tuple[int, int], layout: str, cuda_device: str) -> None:
    """So many tiles that each has a few blocks only, which take one step after the other through shared memory."""
    check(points(50, 640, (28, 28), batch=2, stride=stride), cuda_device, (layout,))
    check(points(3, 2600, (26, 27), batch=2, stride=stride), cuda_device, (layout,))


@pytest.mark.parametrize("first", (1, 2, 4))
def test_planes_anywhere_in_memory(first: int, cuda_device: str) -> None:
    """Among elements that are NaN: whole channels of larger tensors, aligned and not."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for more in (3, 4):
            case = points(8, 16, (8, 8))
            x, dy, *rest = arguments(case, F32)

            def moved(
                tensor: torch.Tensor, more: int = more, layout: torch.memory_format = layout
            ) -> torch.Tensor:
                n, c, h, w = tensor.shape
                shape = torch.Size((n, c + more, h, w))
                memory = torch.full((first + shape.numel(),), torch.nan, device=cuda_device)
                strides = torch.empty(shape, memory_format=layout).stride()
                return memory[first:].as_strided(shape, strides)[:, :c].copy_(tensor)

            Exact(case, (x, dy, *rest)).check(on_cuda(moved(x), moved(dy), *rest).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_alone(layout: str, cuda_device: str) -> None:
    """A channel that is NaN, an output that is, and infinities at the last pixels, behind which there are none."""
    case = points(6, 10, (5, 7))
    x, dy, *rest = arguments(case, F32)
    x[:, 1] = dy[:, 3] = torch.nan
    x[-1, 2, -1, -1] = dy[-1, 7, -1, -1] = torch.inf
    actual = on_cuda(*LAYOUTS[layout](x.to(cuda_device), dy.to(cuda_device)), *rest).cpu()
    expected = torch.ones(6, 10, 1, 1, dtype=torch.bool)
    expected[[1, 2]] = expected[:, [3, 7]] = False
    assert torch.equal(actual.isfinite(), expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_gradients_that_are_one_number(layout: str, cuda_device: str) -> None:
    """That of a sum or a mean, and a batch of the same image."""
    case = points(5, 12, (4, 5))
    x, dy, *rest = arguments(case, F32)
    x, dy = LAYOUTS[layout](x, dy)
    for part in (dy[:1, :1, :1, :1], dy[:1], dy[:, :, :1, :1]):
        exact = Exact(case, (x[:1].expand_as(x), part.expand_as(dy), *rest))
        same = x[:1].to(cuda_device).expand_as(x), part.to(cuda_device).expand_as(dy)
        exact.check(on_cuda(*same, *rest).cpu())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_the_same_bits_again(layout: str, cuda_device: str) -> None:
    x, dy, *rest = arguments(points(7, 50, (28, 28)), F32)
    x, dy = LAYOUTS[layout](x.to(cuda_device), dy.to(cuda_device))
    first = on_cuda(x, dy, *rest)
    assert all(torch.equal(on_cuda(x, dy, *rest), first) for _ in range(3))


# ---- linear layers ------------------------------------------------------------------------------------------


def linear_on_cuda(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    with backend("cuda"):
        actual = linear_channel_grad(x, dy)
    assert last_kernel("linear_channel_grad") == "cuda"
    return actual.cpu()


def check_linear(x: torch.Tensor, dy: torch.Tensor, device: str) -> None:
    rows, accumulate = dy.shape[:-1].numel(), torch.promote_types(x.dtype, F32)
    exact = torch.einsum("nk,no->ko", x.double().flatten(0, -2), dy.double().flatten(0, -2))
    sizes = torch.einsum("nk,no->ko", x.double().abs().flatten(0, -2), dy.double().abs().flatten(0, -2))
    actual = linear_on_cuda(x.to(device), dy.to(device))
    assert actual.dtype == accumulate and actual.shape == exact.shape and actual.is_contiguous()
    assert bool(((actual.double() - exact).abs() <= sum_tolerance(x.dtype, rows) * sizes).all())


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear(case: LinearCase, cuda_device: str) -> None:
    for selected in case.selected:
        x, dy = torch.randn(*case.leading, selected), torch.randn(*case.leading, case.out_features)
        check_linear(x, dy, cuda_device)
        for layout in ("slice", "transposed"):
            check_linear(laid_out(x, layout), laid_out(dy, layout), cuda_device)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_linear_in_other_dtypes(dtype: torch.dtype, cuda_device: str) -> None:
    """By a matrix product of ATen's, in what they are summed in."""
    for x, dy in (
        (torch.randn(3, 9, 5), torch.randn(3, 9, 12)),
        (torch.randn(0, 5), torch.randn(0, 2)),
    ):
        check_linear(x.to(dtype), dy.to(dtype), cuda_device)


def test_linear_of_one_number(cuda_device: str) -> None:
    check_linear(torch.randn(70, 5), torch.ones(()).expand(70, 12), cuda_device)


@pytest.mark.parametrize(
    ("x", "dy", "message"),
    (
        (torch.zeros(3), torch.zeros(3), "have 1 and 1 dimensions"),
        (torch.zeros(3, 2), torch.zeros(3, 1, 2), "have 2 and 3 dimensions"),
        (torch.zeros(3, 2), torch.zeros(4, 2), "size along dimension 0 is 4, expected 3"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), "has dtype Double, expected Float, that of input"),
    ),
)
def test_linear_refuses(x: torch.Tensor, dy: torch.Tensor, message: str, cuda_device: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPERATORS["linear_channel_grad"].kernels["cuda"](x.to(cuda_device), dy.to(cuda_device))


# ---- plans --------------------------------------------------------------------------------------------------

# Every pixel in one step of one part, every row and output in one tile, and few enough threads.
_PLANS = """
#include "cuda/products.h"
#include <cassert>
#include <cstdio>
using namespace trady::cuda;

int main() {
  int several = 0, narrow = 0;
  for (int64_t rows : {1, 2, 3, 7, 16, 17, 50})
    for (int64_t outputs : {1, 3, 4, 16, 24, 31, 33, 96, 130, 144, 512, 1000, 2048})
      for (int64_t images : {1, 3, 128})
        for (int64_t plane : {1, 49, 196, 3136, 12544}) {
          Product p{};
          p.rows = rows, p.outputs = outputs, p.images = images, p.height = plane, p.width = 1;
          const PointPlan points = plan_points(p);
          const int64_t steps = ceil_div(p.pixels(), POINT_PIXELS);
          assert(points.output_warps >= 1 && points.pixel_warps >= 1 && points.pixel_warps <= MOST_PIXEL_WARPS);
          assert(points.output_warps * points.pixel_warps * 32 <= SUM_THREADS);
          assert(static_cast<int64_t>(points.output_tiles) * points.output_warps * EACH >= outputs);
          assert(static_cast<int64_t>(points.output_tiles - 1) * points.output_warps * EACH < outputs);
          assert(points.row_tiles * points.rows >= rows && (points.row_tiles - 1) * points.rows < rows);
          assert(int64_t{points.parts()} * points.share >= steps);
          assert((int64_t{points.splits} - 1) * points.pixel_warps * points.share < steps);
          const int64_t tiles = int64_t{points.row_tiles} * points.output_tiles;
          assert(points.splits == 1 || points.splits * tiles <= blocks_of_wave(points.rows));

          const RowPlan of = plan_rows(p);
          assert(of.lanes >= 4 && of.lanes <= 32 && (of.lanes & (of.lanes - 1)) == 0);
          assert(of.step_pixels == SUM_THREADS / of.lanes * EACH && of.step_pixels <= MOST_STEP_PIXELS);
          assert(int64_t{of.output_tiles} * of.lanes * EACH >= outputs);
          assert((int64_t{of.output_tiles} - 1) * of.lanes * EACH < outputs);
          const int64_t row_steps = ceil_div(p.pixels(), of.step_pixels);
          assert(int64_t{of.splits} * of.share >= row_steps && (int64_t{of.splits} - 1) * of.share < row_steps);
          several += points.share > 1 && of.share > 1;
          narrow += of.lanes < 32;
        }
  Product p{};
  p.rows = p.outputs = 4, p.images = 2, p.height = p.width = 8;
  p.input_image = p.grad_image = 256, p.input_channel = p.grad_channel = 64;
  p.input_row = p.grad_row = 8, p.input_column = p.grad_column = 1;
  assert(is_along_pixels(p) && !is_along_outputs(p) && p.is_flat_input());
  p.input_image = int64_t{1} << 31;
  assert(!is_along_pixels(p));
  p.grad_channel = 1, p.grad_row = 32, p.grad_column = 4;
  assert(is_along_outputs(p));
  p.grad_image = 300;
  assert(!is_along_outputs(p));
  std::printf("%d %d", several, narrow);
}
"""


def test_plans(tmp_path: Path) -> None:
    several, narrow = map(int, output_of(_PLANS, tmp_path).split())
    assert several > 100 and narrow > 100
