"""``conv2d_channel_grad`` beside ATen on the compact input and the dense weight gradient.

python benchmarks/conv2d_channel_grad.py --json benchmarks/results/conv2d_channel_grad.json
pytest benchmarks/conv2d_channel_grad.py    (pytest-benchmark, a few layers)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from trady_kernels.benchmark import (
    LAYERS,
    SELECTED,
    ConvLayer,
    calm_malloc,
    conv2d_rows,
    distinct,
    report,
    table,
)
from trady_kernels.ops import backend, conv2d_channel_grad

FEW = [layer for layer in LAYERS if layer.network == "resnet18" and layer.size <= 28]


@pytest.mark.parametrize("kernel", ("auto", "aten"))
@pytest.mark.parametrize("selected", (1, 4, 16))
@pytest.mark.parametrize("layer", FEW, ids=lambda layer: layer.label)
def test_conv2d_channel_grad(benchmark, layer: ConvLayer, selected: int, kernel: str) -> None:
    x = torch.randn(8, selected, layer.size, layer.size)
    dy = torch.randn(8, layer.out_channels, layer.out_size, layer.out_size)
    geometry = tuple((v, v) for v in (layer.kernel, layer.stride, layer.padding, 1))
    with backend(kernel):
        benchmark(
            conv2d_channel_grad, x, dy, torch.arange(selected), layer.in_channels, *geometry, layer.groups
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = sorted({layer.network for layer in LAYERS})
    parser.add_argument("--network", choices=networks, nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--selected", type=int, nargs="+", default=list(SELECTED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also writes the table beside it, as .txt")
    args = parser.parse_args()
    calm_malloc()
    torch.set_num_threads(args.threads)
    layers = distinct(layer for layer in LAYERS if layer.network in args.network)
    rows, texts = [], []
    for memory_format in ("contiguous", "channels_last"):
        of = []
        for layer in layers:
            of += conv2d_rows([layer], args.selected, memory_format=memory_format, rounds=args.rounds)
            print(table(of[-1:]).splitlines()[1], flush=True)
        texts.append(f"{memory_format}, batch 8, float32, {args.threads} thread(s)\n{table(of)}")
        rows += of
    text = "\n\n".join(texts)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = report(rows)
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        head = "\n".join(f"{name}: {value}" for name, value in facts.items() if name != "rows")
        args.json.with_suffix(".txt").write_text(f"{head}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
