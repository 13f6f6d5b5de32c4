"""Small networks whose norms, affines and biases are random, as after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from trady_kernels.models.front import ImageFront
from trady_kernels.models.loading import LoadedModel, Sizes

Model = TypeVar("Model", bound=nn.Module)


def as_trained(model: Model) -> Model:
    """Random statistics, affines and biases: at zero and one they hide half of all mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.Tensor):
                bias.normal_(0, 0.3)
            for name, parameter in module.named_parameters(recurse=False):
                if name != "bias" and parameter.dim() == 1:  # of norms and layer scales
                    parameter.uniform_(0.5, 1.5)
    return model


def near_own_statistics(model: Model, forward: Callable[[Model], object]) -> Model:
    """Batch norms whose statistics are near those of what they see.

    At random ones the signal of a deep network dies out on its way, and with it every mistake in its first
    layers.
    """
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    before = [(norm.momentum, norm.training) for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.train().momentum = 1.0
        forward(model)
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.train(training).momentum = momentum
            deviation = norm.running_var.sqrt()
            norm.running_mean += torch.empty_like(deviation).uniform_(-0.5, 0.5) * deviation
            norm.running_var *= torch.empty_like(deviation).uniform_(0.5, 2)
            norm.running_var += 1e-3
    return model


class Residual(nn.Module):
    """Expansion, depthwise, grouped projection, and a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, groups=2)
        self.norm3 = nn.GroupNorm(2, channels)
        self.act = nn.ReLU6()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.expand(input)))
        x = self.act(self.norm2(self.depthwise(x)))
        return input + self.norm3(self.project(x))


class ResidualNet(nn.Module):
    """Strided stem, two residual blocks, a linear with a norm, a head: 8 layers that can be sparse."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.neck = nn.Linear(8, 12)
        self.neck_norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(12, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, 3, H, W) -> (N, classes)
        x = self.blocks(torch.relu(self.norm(self.stem(input))))
        x = torch.relu(self.neck_norm(self.neck(self.pool(x).flatten(1))))
        return self.head(self.dropout(x))


def load_tiny(
    name: str, classes: int, weights: object = None, seed: int = 0, sizes: Sizes | None = None
) -> LoadedModel:
    """Stands in for ``load_model`` in a training loop, whatever network is asked for."""
    torch.manual_seed(seed)
    side = (sizes or Sizes()).image_size
    return LoadedModel(
        as_trained(ResidualNet(classes)), name, ImageFront(side, (0.5,) * 3, (0.5,) * 3), "random"
    )
