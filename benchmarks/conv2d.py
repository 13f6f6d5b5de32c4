"""What a sparse layer's call costs beside ``nn.Conv2d``'s, on a layer too small for anything else to matter.

pytest benchmarks/conv2d.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trady_kernels import SparseConv2d


@pytest.fixture(params=("dense", 0, 1), ids=("dense", "k=0", "k=1"))
def layer(request: pytest.FixtureRequest) -> nn.Conv2d:
    torch.set_num_threads(1)
    if request.param == "dense":
        return nn.Conv2d(8, 8, 3, padding=1)
    return SparseConv2d(8, 8, 3, padding=1, channels=request.param)


def test_forward(benchmark, layer: nn.Conv2d) -> None:
    benchmark(layer, torch.randn(1, 8, 4, 4, requires_grad=True))


def test_forward_and_backward(benchmark, layer: nn.Conv2d) -> None:
    input = torch.randn(1, 8, 4, 4, requires_grad=True)
    benchmark(lambda: layer(input).sum().backward())
