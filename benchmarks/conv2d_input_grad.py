"""A convolution's input gradient beside ``convolution_backward``'s, in interleaved rounds of one thread.

python benchmarks/conv2d_input_grad.py
python benchmarks/conv2d_input_grad.py --json benchmarks/results/conv2d_input_grad.json

On every distinct convolution of MobileNetV2, ResNet-18, ResNet-50 and EfficientNet-Lite0, batch 8, float32.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.goals import geometric_mean
from trady_kernels.benchmark.layers import CONVS, ConvLayer, distinct
from trady_kernels.benchmark.report import conditions, json_argument
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.functional.conv2d_input_grad import conv2d_input_grad
from trady_kernels.ops.layout import FORMATS

BATCH = 8


def measure(layer: ConvLayer, memory_format: torch.memory_format, rounds: int = 7) -> dict[str, float]:
    """Median microseconds of ours and of ATen's."""
    shape = (BATCH, layer.in_channels, layer.size, layer.size)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    weight = torch.randn(
        layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel
    ).contiguous(memory_format=memory_format)
    dy = torch.randn(BATCH, layer.out_channels, layer.out_size, layer.out_size)
    dy = dy.contiguous(memory_format=memory_format)
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    backward = torch.ops.aten.convolution_backward
    last = (None, stride, padding, [1, 1], False, [0, 0], layer.groups, [True, False, False])
    return interleaved(
        {
            "ours": lambda: conv2d_input_grad(
                dy, weight, shape, memory_format, stride, padding, [1, 1], layer.groups
            ),
            "ATen": lambda: backward(dy, x, weight, *last),
        },
        rounds,
    )


def main() -> None:
    """Print times and their ratio by layer, then geometric mean and worst by family."""
    path = json_argument(__doc__)
    calm_malloc()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    print(f"{'':<44}{'ours us':>9}{'ATen us':>9}{'ours/ATen':>11}")
    for layer in distinct(CONVS):
        for name, memory_format in FORMATS.items():
            times = measure(layer, memory_format)
            ratio = times["ours"] / times["ATen"]
            strided = " strided" if layer.stride > 1 else ""
            ratios.setdefault((f"{layer.family}{strided}", name), []).append(ratio)
            rows.append({**asdict(layer), "memory_format": name, "microseconds": times})
            label = f"{layer.label}, {layer.family}, {name}"
            print(f"{label:<44}{times['ours']:>9.0f}{times['ATen']:>9.0f}{ratio:>11.2f}", flush=True)
    print(f"\n{'family':<44}{'mean':>9}{'worst':>9}")
    for (family, name), values in sorted(ratios.items()):
        print(f"{f'{family}, {name}':<44}{geometric_mean(values):>9.2f}{max(values):>9.2f}")
    if path is not None:
        write_json(path, {**conditions(), "rows": rows})


if __name__ == "__main__":
    main()
