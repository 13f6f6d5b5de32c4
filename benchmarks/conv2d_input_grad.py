"""A convolution's input gradient beside ``convolution_backward``'s, in interleaved rounds.

python benchmarks/conv2d_input_grad.py
python benchmarks/conv2d_input_grad.py --json benchmarks/results/conv2d_input_grad.json
python benchmarks/conv2d_input_grad.py --device cuda

On every distinct convolution of MobileNetV2, ResNet-18, ResNet-50 and EfficientNet-Lite0: on one thread of a CPU batch 8 in
float32, on a GPU those that have a kernel of ours, batch 128 in bfloat16 and channels_last.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.goals import geometric_mean
from trady_kernels.benchmark.layers import CONVS, ConvLayer, distinct
from trady_kernels.benchmark.report import conditions
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.ops import conv2d_input_grad
from trady_kernels.ops.layout import FORMATS

BATCH = {"cpu": 8, "cuda": 128}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Names of the memory formats that are measured.
MEASURED = {"cpu": tuple(FORMATS), "cuda": ("channels_last",)}
#: Calls of each, and on a GPU as many as fit into these seconds.
ROUNDS = {"cpu": 7, "cuda": None}
SECONDS = 0.2


def measure(layer: ConvLayer, memory_format: torch.memory_format, device: str) -> dict[str, float]:
    """Median microseconds of ours and of ATen's."""
    shape = (BATCH[device], layer.in_channels, layer.size, layer.size)

    def drawn(*size: int) -> torch.Tensor:
        tensor = torch.randn(size, dtype=DTYPE[device], device=device)
        return tensor.contiguous(memory_format=memory_format)

    x, dy = drawn(*shape), drawn(shape[0], layer.out_channels, layer.out_size, layer.out_size)
    weight = drawn(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
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
        ROUNDS[device],
        seconds=SECONDS,
        device=device,
    )


def main() -> None:
    """Print times and their ratio by layer, then geometric mean and worst by family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=BATCH, default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    if args.device == "cpu":
        calm_malloc()
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = True  # the peer is cuDNN's best
    rows: list[dict[str, object]] = []
    ratios: dict[tuple[str, str], list[float]] = {}
    print(f"{'':<44}{'ours us':>9}{'ATen us':>9}{'ours/ATen':>11}")
    for layer in distinct(CONVS):
        if args.device == "cuda" and layer.dense:
            continue
        for name in MEASURED[args.device]:
            times = measure(layer, FORMATS[name], args.device)
            ratio = times["ours"] / times["ATen"]
            strided = " strided" if layer.stride > 1 else ""
            ratios.setdefault((f"{layer.family}{strided}", name), []).append(ratio)
            rows.append({**asdict(layer), "memory_format": name, "microseconds": times})
            label = f"{layer.label}, {layer.family}, {name}"
            print(f"{label:<44}{times['ours']:>9.0f}{times['ATen']:>9.0f}{ratio:>11.2f}", flush=True)
    print(f"\n{'family':<44}{'mean':>9}{'worst':>9}")
    for (family, name), values in sorted(ratios.items()):
        print(f"{f'{family}, {name}':<44}{geometric_mean(values):>9.2f}{max(values):>9.2f}")
    if args.json is not None:
        write_json(args.json, {**conditions(args.device), "rows": rows})


if __name__ == "__main__":
    main()
