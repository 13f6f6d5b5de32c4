"""``max_pool2d_offsets`` and its backward beside ATen's max pooling with int64 indices, in interleaved rounds.

python benchmarks/max_pool2d.py
python benchmarks/max_pool2d.py --json benchmarks/results/max_pool2d.json
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch

from trady_kernels.atomic_write import write_json
from trady_kernels.benchmark.report import conditions, json_argument
from trady_kernels.benchmark.timing import calm_malloc, interleaved
from trady_kernels.ops import max_pool2d_offsets, max_pool2d_offsets_backward
from trady_kernels.ops.layout import FORMATS

ATEN, ATEN_BACKWARD = (
    torch.ops.aten.max_pool2d_with_indices,
    torch.ops.aten.max_pool2d_with_indices_backward,
)


@dataclass(frozen=True)
class Pool:
    network: str
    shape: tuple[int, int, int, int]
    kernel_size: int
    stride: int
    padding: int = 0


POOLS = (
    Pool("ResNet-18, ResNet-50", (8, 64, 112, 112), 3, 2, 1),
    Pool("VGG-16", (8, 128, 112, 112), 2, 2),
    Pool("VGG-16", (8, 512, 28, 28), 2, 2),
    Pool("GoogLeNet", (8, 192, 28, 28), 3, 1, 1),
)


def measure(pool: Pool, memory_format: str, dtype: torch.dtype, rounds: int = 9) -> dict[str, float]:
    """Median microseconds of one thread, ours and ATen's, forward and backward."""
    x = torch.randn(pool.shape).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    window = tuple((v, v) for v in (pool.kernel_size, pool.stride, pool.padding, 1))
    output, offsets = max_pool2d_offsets(x, *window, False)
    _, indices = ATEN(x, *window, False)
    grad_output = torch.randn_like(output)
    return interleaved(
        {
            "forward": partial(max_pool2d_offsets, x, *window, False),
            "ATen forward": partial(ATEN, x, *window, False),
            "backward": partial(max_pool2d_offsets_backward, grad_output, offsets, pool.shape[2:], *window),
            "ATen backward": partial(ATEN_BACKWARD, grad_output, x, *window, False, indices),
        },
        rounds,
    )


def line(pool: Pool, memory_format: str, dtype: torch.dtype, times: dict[str, float]) -> str:
    """One row of the table."""
    label = f"{pool.network:<21}{pool.kernel_size}x{pool.kernel_size}/{pool.stride} {tuple(pool.shape)!s:<19}"
    cells = "".join(
        f"{times[name] / 1e3:>9.2f}{times[f'ATen {name}'] / 1e3:>9.2f}{times[f'ATen {name}'] / times[name]:>7.2f}"
        for name in ("forward", "backward")
    )
    return f"{label} {memory_format:<14}{str(dtype).removeprefix('torch.'):<9}{cells}"


def main() -> None:
    """Print a row for each pool, memory format and dtype."""
    path = json_argument(__doc__)
    calm_malloc()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':<69}{'forward ms':>9}{'ATen':>8}{'ratio':>7}{'backward':>9}{'ATen':>9}{'ratio':>7}")
    for dtype in (torch.float32, torch.bfloat16):
        for pool in POOLS:
            for memory_format in FORMATS:
                times = measure(pool, memory_format, dtype)
                print(line(pool, memory_format, dtype, times), flush=True)
                rows.append(
                    {
                        **asdict(pool),
                        "memory_format": memory_format,
                        "dtype": str(dtype),
                        "microseconds": times,
                    }
                )
    if path is not None:
        write_json(path, {**conditions(), "rows": rows})


if __name__ == "__main__":
    main()
