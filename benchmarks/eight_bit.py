"""What saved tensors in 8 bits cost: bytes kept and gradient error of single operations, each after a linear.

python benchmarks/eight_bit.py

Whole networks: python benchmarks/saved_memory.py. The error is that of the linear's weight gradient, the median of
ten draws with random weights, inputs and incoming gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import trady_kernels as tk
from trady_kernels.nn.eight_bit import keep_in_eight_bits

BATCH, TOKENS, FEATURES, HEADS, DRAWS = 8, 64, 192, 3, 10


class After(nn.Module):
    """A linear, and what follows it."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int = FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, width)
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(input))


def attention(qkv: torch.Tensor) -> torch.Tensor:
    shape = (*qkv.shape[:2], 3, HEADS, FEATURES // HEADS)
    q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


CASES: dict[str, Callable[[], After]] = {
    "GELU": lambda: After(F.gelu),
    "SiLU": lambda: After(F.silu),
    "Hardswish": lambda: After(F.hardswish),
    "sigmoid gate": lambda: After(lambda x: x * x.sigmoid()),
    "LayerNorm": lambda: After(lambda x: F.layer_norm(x, (FEATURES,))),
    "softmax": lambda: After(lambda x: x.softmax(-1)),
    "attention": lambda: After(attention, 3 * FEATURES),
}


def measure(build: Callable[[], After]) -> tuple[int, int, float, float]:
    """Bytes kept exactly and in 8 bits, length of the error relative to the gradient, and 1 - cosine."""
    lengths, angles = [], []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        model, x = build(), torch.randn(BATCH, TOKENS, FEATURES)
        nn.init.normal_(model.linear.weight, std=2 / FEATURES**0.5)
        grad_output = torch.randn_like(model(x))
        kept, gradients = [], []
        for eight_bits in (False, True):
            if eight_bits:
                keep_in_eight_bits(model)
            kept.append(tk.measure_memory(model, x).saved_bytes)
            (gradient,) = torch.autograd.grad(model(x), model.linear.weight, grad_output)
            gradients.append(gradient.double().flatten())
        exact, coarse = gradients
        lengths.append(float((coarse - exact).norm() / exact.norm()))
        angles.append(1 - float(torch.cosine_similarity(coarse, exact, dim=0)))
    return *kept, median(lengths), median(angles)


def main() -> None:
    table = Table("operation", "kept", "in 8 bits", "ratio", "relative L2 error", "1 - cosine")
    for name, build in CASES.items():
        exact, packed, length, angle = measure(build)
        table.add_row(
            name, f"{exact:,} B", f"{packed:,} B", f"{packed / exact:.3f}", f"{length:.2%}", f"{angle:.1e}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
