"""Activations of one bit an element beside torch's own, forward and backward, under pytest-benchmark.

pytest benchmarks/rectify.py                            all kernels
python benchmarks/rectify.py                            interleaved, one thread: the ratios to ATen
python benchmarks/rectify.py --json benchmarks/results/rectify.json
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.report import conditions, json_argument
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.ops import backend, pack_bits, rectify, rectify_, scale_by_bits

#: EfficientNet-Lite0's largest activation at batch 8, and its last one.
SHAPES = ((8, 96, 112, 112), (8, 1280, 7, 7))


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectify(benchmark, shape: tuple[int, ...], kernel: str) -> None:
    input = torch.randn(shape)
    with backend(kernel):
        benchmark(rectify, input, 0.0, 6.0)


@pytest.mark.parametrize("kernel", ("auto", "reference"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_by_bits(benchmark, shape: tuple[int, ...], kernel: str) -> None:
    input = torch.randn(shape)
    bits = pack_bits(input > 0)
    with backend(kernel):
        benchmark(scale_by_bits, input, bits, 1.0)


def pairs(
    shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ours and ATen's by name. In place, the values stay in range after the first call: a clamp all the same."""
    aten = torch.ops.aten
    x, dy = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    ours, theirs = x.clone(), x.clone()
    _, bits = rectify(x, 0.0, 6.0)
    mask = x > 0
    return {
        "ReLU": (lambda: rectify(x, 0.0), lambda: F.relu(x)),
        "ReLU6": (lambda: rectify(x, 0.0, 6.0), lambda: F.relu6(x)),
        "LeakyReLU": (lambda: rectify(x, 0.0, None, 0.1), lambda: F.leaky_relu(x, 0.1)),
        "ReLU6 in place": (lambda: rectify_(ours, 0.0, 6.0), lambda: F.hardtanh_(theirs, 0.0, 6.0)),
        "ReLU backward": (lambda: scale_by_bits(dy, bits, 1.0), lambda: aten.threshold_backward(dy, x, 0)),
        "ReLU6 backward": (
            lambda: scale_by_bits(dy, bits, 1.0),
            lambda: aten.hardtanh_backward(dy, x, 0.0, 6.0),
        ),
        "LeakyReLU backward": (
            lambda: scale_by_bits(dy, bits, 1.0, 0.1),
            lambda: aten.leaky_relu_backward(dy, x, 0.1, False),
        ),
        "mask to bits, a copy of it": (lambda: pack_bits(mask), lambda: mask.clone()),
    }


def main() -> None:
    """Print medians and their ratios."""
    path = json_argument(__doc__)
    calm_malloc()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':<48}{'ours us':>9}{'ATen us':>9}{'ours/ATen':>11}")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for name, (ours, theirs) in pairs(shape, dtype).items():
                times = interleaved({"ours": ours, "ATen": theirs}, 31 if shape[-1] > 7 else 301)
                rows.append({"call": name, "shape": shape, "dtype": str(dtype), "microseconds": times})
                label = f"{name}, {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                ratio = times["ours"] / times["ATen"]
                print(f"{label:<48}{times['ours']:>9.0f}{times['ATen']:>9.0f}{ratio:>11.2f}", flush=True)
    if path is not None:
        write_json(path, {**conditions(), "rows": rows})


if __name__ == "__main__":
    main()
