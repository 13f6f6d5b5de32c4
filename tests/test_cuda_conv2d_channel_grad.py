"""``conv2d_channel_grad`` in CUDA: planes through shared memory, planes as they lie, and any kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CONV_CASES, SAME, ConvCase
from test_conv2d_channel_grad import DTYPES, LAYOUTS, Exact, arguments

from trady_kernels.ops import backend, conv2d_channel_grad, last_kernel
from trady_kernels.ops.backend import OPERATORS

CSRC = Path(__file__).parent.parent / "csrc"


def on_cuda(x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor, *rest: object) -> torch.Tensor:
    with backend("cuda"):
        actual = conv2d_channel_grad(x, dy, channels.to(x.device), *rest)  # type: ignore[arg-type]
    assert last_kernel("conv2d_channel_grad") == "cuda"
    return actual


def check(case: ConvCase, dtype: torch.dtype, device: str, layouts: tuple[str, ...]) -> None:
    x, dy, *rest = arguments(case, dtype)
    exact = Exact(case, (x, dy, *rest))
    for layout in layouts:
        exact.check(on_cuda(*LAYOUTS[layout](x.to(device), dy.to(device)), *rest).cpu())


@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.groups > 1], ids=str)
def test_groups(case: ConvCase, cuda_device: str) -> None:
    # Without a GPU blocks run one after another: many of them are seen in every layout in one dtype only.
    many = case.selected * case.out_channels // case.groups > 200
    for dtype in DTYPES:
        few = many and dtype is not torch.float32
        check(case, dtype, cuda_device, ("contiguous", "channels_last") if few else tuple(LAYOUTS))


WITHOUT_GROUPS = (
    "1x1 map",
    "1x1 map under 3x3",
    "no channel",
    "empty batch",
    "stride 2",
    "two outputs",
    "padding beyond the input",
    "kernel of many columns",
    "all asymmetric",
    "dilation beyond a tile",
)


@pytest.mark.parametrize("case", [c for c in CONV_CASES if c.name in WITHOUT_GROUPS], ids=str)
def test_without_groups(case: ConvCase, cuda_device: str) -> None:
    """Correct, and not meant to be fast."""
    assert case.groups == 1
    check(case, torch.float32, cuda_device, tuple(LAYOUTS))
    for dtype in DTYPES:
        check(case, dtype, cuda_device, ("contiguous", "channels_last"))


def depthwise(
    size: tuple[int, int], kernel: int, stride: int, *, batch: int = 2, selected: int = 3, outputs: int = 1
) -> ConvCase:
    pairs = (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2)
    return ConvCase("", batch, 5, 5 * outputs, size, selected, *pairs, groups=5)


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (1, 3, 5, 7))
def test_sizes(kernel: int, stride: int, cuda_device: str) -> None:
    """Rows of the output that registers hold all of, or in parts of 7, 4, 2 and 1; groups with more outputs than are
    multiplied together."""
    for size in ((7, 7), (14, 14), (13, 20), (29, 5), (8, 9), (1, 1), (2, 40)):
        check(depthwise(size, kernel, stride), torch.float32, cuda_device, ("contiguous", "channels_last"))
    for outputs in (2, 3, 5):
        case = depthwise((10, 7), kernel, stride, selected=2, outputs=outputs)
        check(case, torch.bfloat16, cuda_device, ("contiguous", "channels_last"))
    check(depthwise((9, 12), kernel, stride), torch.float16, cuda_device, tuple(LAYOUTS))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "case",
    (
        depthwise((7, 7), 3, 1, batch=150, selected=2),
        depthwise((112, 112), 3, 2, selected=1),
        depthwise((70, 113), 5, 1, selected=1),
        depthwise((40, 256), 3, 1, selected=1),
        depthwise((41, 57), 7, 1, selected=1),
        depthwise((2, 256), 1, 1, selected=1, batch=600),
    ),
    ids=("images", "stride 2", "strips of 5x5", "widest rows", "strips of 7x7", "600 parts"),
)
def test_several_tiles(case: ConvCase, dtype: torch.dtype, cuda_device: str) -> None:
    """Blocks that copy the next tile while they multiply one, and sums of several blocks."""
    check(case, dtype, cuda_device, ("contiguous", "channels_last"))


def test_blocks_of_several_tiles_take_turns_in_shared_memory(cuda_device: str) -> None:
    """So many channels that each has two blocks, of three tiles of 128 images."""
    case = ConvCase("", 768, 512, 512, (2, 2), 512, (3, 3), padding=SAME, groups=512)
    check(case, torch.float32, cuda_device, ("contiguous",))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("first", (1, 2, 3, 5, 7))
def test_dense_planes_anywhere_in_memory(first: int, dtype: torch.dtype, cuda_device: str) -> None:
    """Vectors that contain a plane's first and last elements contain others' too, here NaN."""
    case = depthwise((7, 9), 3, 1, batch=5)
    x, dy, *rest = arguments(case, dtype)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        n, c, *size = tensor.shape
        shape = torch.Size((n + 1, c + 2, *size))
        memory = torch.full((first + shape.numel(),), torch.nan, dtype=dtype, device=cuda_device)
        window = memory[first:].view(shape)[1:, 1:-1]
        return window.copy_(tensor)

    Exact(case, (x, dy, *rest)).check(on_cuda(moved(x), moved(dy), *rest).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    (
        depthwise((9, 38), 3, 1),
        depthwise((9, 38), 3, 2),
        depthwise((9, 38), 5, 2),
        depthwise((12, 11), 7, 1),
        depthwise((6, 11), 3, 1, outputs=2),
        ConvCase("", 2, 5, 5, (9, 38), 3, padding=(2, 2), dilation=(2, 2), groups=5),
    ),
    ids=("3x3", "3x3, stride 2", "5x5, stride 2", "7x7", "two outputs", "dilation 2"),
)
def test_an_infinite_pixel_reaches_the_taps_that_meet_it(
    case: ConvCase, layout: str, cuda_device: str
) -> None:
    x, dy, *rest = arguments(case, torch.float32)
    height, width = case.size
    for row, column in ((height - 1, width - 1), (0, 0), (height // 2, width - 1), (height - 1, width // 2)):
        infinite = x.clone()
        infinite[1, 0, row, column] = torch.inf
        # The reference multiplies padding too, zeros, which is the same for a gradient that is finite.
        exact = Exact(case, (infinite, dy, *rest))
        actual = on_cuda(*LAYOUTS[layout](infinite.to(cuda_device), dy.to(cuda_device)), *rest).cpu()
        assert 0 < int(exact.expected.isfinite().sum()) < actual.numel()
        assert torch.equal(actual.isfinite(), exact.expected.isfinite())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_channel_that_is_nan_stays_alone(layout: str, cuda_device: str) -> None:
    case = depthwise((7, 7), 3, 1, batch=3, selected=5, outputs=2)
    x, dy, channels, *rest = arguments(case, torch.float32)
    x[:, 1] = torch.nan
    dy[:, 2 * channels[3] + 1] = torch.nan
    actual = on_cuda(*LAYOUTS[layout](x.to(cuda_device), dy.to(cuda_device)), channels, *rest).cpu()
    expected = torch.zeros(actual.shape, dtype=torch.bool)
    expected[1] = expected[3, 1] = True
    assert torch.equal(actual.isnan(), expected)


@pytest.mark.parametrize("kernel", (1, 3))
def test_gradients_that_are_one_number(kernel: int, cuda_device: str) -> None:
    """That of a sum or a mean, and a batch of the same image."""
    case = depthwise((9, 8), kernel, 1)
    x, dy, *rest = arguments(case, torch.float32)
    for part in (dy[:1, :1, :1, :1], dy[:1]):
        exact = Exact(case, (x[:1].expand_as(x), part.expand_as(dy), *rest))
        same = x[:1].to(cuda_device).expand_as(x), part.to(cuda_device).expand_as(dy)
        exact.check(on_cuda(*same, *rest).cpu())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "case",
    (
        depthwise((40, 57), 3, 1),
        ConvCase("", 2, 5, 5, (40, 57), 3, (3, 5), padding=(1, 2), groups=5),
    ),
    ids=("3x3", "3x5"),
)
def test_the_same_bits_again(case: ConvCase, layout: str, cuda_device: str) -> None:
    x, dy, *rest = arguments(case, torch.float32)
    x, dy = LAYOUTS[layout](x.to(cuda_device), dy.to(cuda_device))
    first = on_cuda(x, dy, *rest)
    assert all(torch.equal(on_cuda(x, dy, *rest), first) for _ in range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({0: torch.zeros(2, 3, 7)}, "have 3 and 4 dimensions"),
        ({0: torch.zeros(2, 4, 7, 7)}, "one index for each of the 4 channels"),
        ({0: torch.zeros(2, 3, 7, 7, dtype=torch.float64)}, "must have the dtype of input_selected"),
        ({0: torch.zeros(2, 3, 8, 7)}, "size along dimension 2 is 7"),
        ({0: torch.zeros(1, 3, 7, 7)}, "batch 1"),
        ({2: torch.zeros(3, dtype=torch.int32)}, "channels must be a 1-D int64 tensor"),
        ({4: (3, 3, 1, 1, 1, 1)}, "must be pairs"),
        ({4: (3, 3, 0, 1, 1, 1, 1, 1)}, "must be positive"),
        ({5: 3}, "groups = 3 must divide"),
        (
            {0: torch.zeros(2, 3, 7, 7).int(), 1: torch.zeros(2, 8, 7, 7).int()},
            "input_selected: got dtype Int",
        ),
    ),
)
def test_bad_arguments_are_refused_without_the_front(
    change: dict[int, object], message: str, cuda_device: str
) -> None:
    """Small calls go to the kernel before Python looks at their arguments."""
    zeros = torch.zeros(2, 3, 7, 7), torch.zeros(2, 8, 7, 7), torch.arange(3)
    args: list[object] = [*zeros, 8, (3, 3, 1, 1, 1, 1, 1, 1), 8]
    for index, value in change.items():
        args[index] = value
    args = [arg.to(cuda_device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises(RuntimeError, match=message):
        OPERATORS["conv2d_channel_grad"].kernels["cuda"](*args)


_OUT_OF_RANGE = """
import sys
import torch
import cuda_on_host
from trady_kernels.ops.backend import OPERATORS

index, layout, kernel_width = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
x, dy = torch.zeros(2, 2, 5, 5, device=device), torch.zeros(2, 4, 5, 5, device=device)
operator = OPERATORS["conv2d_channel_grad"]
if device == "cpu":
    assert not isinstance(cuda_on_host.library(), str)
    cuda_on_host.Kernels().__enter__()
channels, geometry = torch.tensor([0, index], device=device), (3, kernel_width, 1, 1, 1, kernel_width // 2, 1, 1)
operator.kernels["cuda"](x.contiguous(memory_format=layout), dy, channels, 4, geometry, 4)
if device == "cuda":
    torch.cuda.synchronize()
print("went on")
"""


@pytest.mark.parametrize(
    ("index", "layout", "kernel_width"),
    ((4, "contiguous_format", 3), (-1, "channels_last", 3), (1 << 40, "contiguous_format", 5)),
)
def test_index_out_of_range_ends_in_an_assertion(
    index: int, layout: str, kernel_width: int, cuda_device: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_RANGE, str(index), layout, str(kernel_width)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "conv2d_channel_grad: an index in channels is out of range" in done.stderr


# Every pixel of the output in one item of one tile, tiles within their shared memory, and few enough threads.
_PLANS = """
#include "cuda/conv2d_channel_grad.h"
#include <cassert>
#include <cstdio>
#include <vector>
using namespace trady::cuda;

static int staged = 0, strips = 0, several = 0;

void check(const Conv2dChannelGrad& q, int size, int together) {
  const DirectPlan direct = plan_direct(q, together);
  assert(direct.lanes * direct.columns * direct.slots <= SUM_THREADS && direct.slots >= 1);
  assert(direct.columns * direct.chunks >= q.out_width && direct.columns * (direct.chunks - 1) < q.out_width);
  assert(direct.item_rows <= ITEM_ROWS && direct.plane_items * direct.item_rows >= q.out_height);
  assert(direct.items == q.batch * direct.plane_items && direct.share % direct.slots == 0);
  assert(direct.splits * direct.share >= direct.items && (direct.splits - 1) * direct.share < direct.items);

  const StagedPlan plan = plan_staged(q, size, together);
  if (plan.planes == 0) return;
  ++staged;
  strips += plan.strips > 1;
  several += plan.planes > 1;
  assert(plan.columns == q.out_width && plan.columns * plan.slots <= SUM_THREADS && plan.item_rows <= ITEM_ROWS);
  assert(MARGIN_VECTORS + plan.planes * (plan.input_vectors + together * plan.grad_vectors) <= STAGE_VECTORS);
  assert((q.kernel[1] - 1) * size <= MARGIN_VECTORS * VECTOR_BYTES);
  assert(plan.splits * plan.share >= plan.tiles && (plan.splits - 1) * plan.share < plan.tiles);
  for (uint64_t i = 0; i < STAGE_VECTORS; ++i) {
    assert(i * plan.input_inverse >> 32 == i / plan.input_vectors);
    assert(i * plan.grad_inverse >> 32 == i / plan.grad_vectors);
  }
  std::vector<int> seen(q.batch * q.out_height);
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const int first = tile % plan.strips * plan.strip_items * plan.item_rows;
    const int last = std::min<int>(q.out_height, first + plan.strip_items * plan.item_rows);
    const Rows met = rows_met(q, first, last);
    assert(0 <= met.begin && met.begin < met.end && met.end <= q.height);
    // A vector more where a run begins anywhere in one.
    assert(((met.end - met.begin) * q.width * size + VECTOR_BYTES - size) / VECTOR_BYTES + 1 <= plan.input_vectors);
    assert(((last - first) * q.out_width * size + VECTOR_BYTES - size) / VECTOR_BYTES + 1 <= plan.grad_vectors);
    for (int64_t image = tile / plan.strips * plan.planes; image < q.batch && image < (tile / plan.strips + 1) * plan.planes; ++image)
      for (int row = first; row < last; ++row) ++seen[image * q.out_height + row];
  }
  for (int times : seen) assert(times == 1);
}

int main() {
  for (int64_t k : {1, 3, 5, 7})
    for (int64_t s : {1, 2})
      for (int64_t p = 0; p < k; p += k / 2 + 1)
        for (int64_t height : {1, 2, 7, 8, 9, 14, 17, 28, 31, 56, 112, 130})
          for (int64_t width : {1, 5, 7, 14, 33, 56, 112, 256, 300})
            for (int64_t batch : {1, 3, 128}) {
              if (height + 2 * p < k || width + 2 * p < k) continue;
              Conv2dChannelGrad q{};
              q.batch = batch;
              q.height = height;
              q.width = width;
              q.out_height = (height + 2 * p - k) / s + 1;
              q.out_width = (width + 2 * p - k) / s + 1;
              q.selected = 1 + (height * width + batch) % 40;
              q.outputs = 1 + height % 3;
              q.kernel[0] = q.kernel[1] = k;
              q.stride[0] = q.stride[1] = s;
              q.padding[0] = q.padding[1] = p;
              q.dilation[0] = q.dilation[1] = 1;
              for (int64_t channels_last : {0, 1}) {
                const int64_t plane = height * width, out_plane = q.out_height * q.out_width, c = 40;
                const int64_t planes[]{c * plane, plane, width, 1}, pixels[]{c * plane, 1, width * c, c};
                const int64_t out_planes[]{c * out_plane, out_plane, q.out_width, 1};
                for (int d = 0; d < 4; ++d) {
                  q.input_stride[d] = channels_last ? pixels[d] : planes[d];
                  q.grad_stride[d] = out_planes[d];
                }
                assert(is_usual(q));
                for (int size : {2, 4}) check(q, size, k == 1 ? 4 : k == 3 ? 2 : 1), check(q, size, 1);
              }
            }
  std::printf("%d %d %d", staged, strips, several);
}
"""


def output_of(program: str, folder: Path) -> str:
    """What a C++ program on the headers of csrc prints, once it has been compiled and its assertions held."""
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    (folder / "program.cpp").write_text(program)
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-UNDEBUG", "-I", CSRC]
    subprocess.run([*command, folder / "program.cpp", "-o", folder / "program"], check=True)
    done = subprocess.run([folder / "program"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plans(tmp_path: Path) -> None:
    staged, strips, several = map(int, output_of(_PLANS, tmp_path).split())
    assert staged > 1000 and strips > 100 and several > 100
