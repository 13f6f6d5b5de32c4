"""Counted cost: what training an input channel takes in elements, bytes and multiply-accumulates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn

from trady_kernels.batch import Example, call, tensors_in, without_trace

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Cost:
    """What training a set of channels takes.

    Attributes:
        weight_elements: elements of weight gradient.
        activation_elements: elements of stored input, of one sample.
        bytes: weight gradients and stored inputs of the whole example batch, in their own dtypes.
        macs: multiply-accumulates of the weight gradient, of one sample.
    """

    weight_elements: int = 0
    activation_elements: int = 0
    bytes: int = 0
    macs: int = 0

    @property
    def elements(self) -> int:
        """Weight gradient and stored input of one sample: the papers' accounting."""
        return self.weight_elements + self.activation_elements

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_elements + other.weight_elements,
            self.activation_elements + other.activation_elements,
            self.bytes + other.bytes,
            self.macs + other.macs,
        )

    def __mul__(self, count: int) -> Cost:
        return Cost(
            self.weight_elements * count,
            self.activation_elements * count,
            self.bytes * count,
            self.macs * count,
        )


@dataclass(frozen=True)
class LayerCost:
    """A layer's input channels and what training one of them costs.

    Attributes:
        name: the layer's name in the network.
        channels: input channels (features) of the layer.
        channel: cost of one of them. ``weight_elements`` is ``(C'/groups) kh kw`` and
            ``activation_elements`` is ``H W`` of the input (rows per sample for a linear layer), summed over
            the calls of a layer that is called several times.

    Source: TraDy, arXiv 2510.19675, equations 3 and 4.
    """

    name: str
    channels: int
    channel: Cost

    @property
    def full(self) -> Cost:
        """Cost of all channels."""
        return self.channel * self.channels


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs."""
    return sum(costs, Cost())


def channels_of(layer: Layer) -> int:
    """Number of input channels (features) of a layer."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def weight_elements(layer: Layer) -> int:
    """Elements of the weight that belong to one input channel."""
    return layer.weight.numel() // channels_of(layer)


def _stored_dtype(input: torch.Tensor) -> torch.dtype:
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.is_floating_point() and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def measure_layers(model: nn.Module, example_input: Example) -> dict[str, LayerCost]:
    """Cost of one channel of every ``nn.Conv2d`` and ``nn.Linear`` that a forward calls.

    The network runs once, in eval mode and without gradients; modes, buffers and random numbers are left as
    they were.

    Args:
        model: the network, dense or sparse.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, of the
            batch size, resolution, dtype and autocast mode that training will use.

    Returns:
        ``{layer name: cost}`` in the order of the first call.

    Raises:
        TypeError: ``example_input`` is of another type, or holds no tensor.
    """
    first = next(tensors_in(example_input), None)
    if first is None:
        raise TypeError(
            f"example_input: got {type(example_input).__name__} without a tensor, expected a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments"
        )
    batch = max(first.shape[0] if first.dim() else 1, 1)
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            names[module] = name
    found: dict[str, LayerCost] = {}

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        assert isinstance(layer, Layer)
        input = args[0] if args else kwargs["input"]
        channels = channels_of(layer)
        per_channel = weight_elements(layer)
        samples = 1 if input.dim() == (3 if isinstance(layer, nn.Conv2d) else 1) else batch
        positions = input.numel() // channels
        # A layer may see another leading size than the batch (windows, tokens without a batch).
        stored = math.ceil(positions / samples)
        produced = output.numel() // (
            layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        )
        name = names[layer]
        seen = found.get(name)
        weight = Cost(per_channel, 0, per_channel * layer.weight.element_size()) if seen is None else Cost()
        activation = Cost(
            0, stored, positions * _stored_dtype(input).itemsize, per_channel * math.ceil(produced / samples)
        )
        before = seen.channel if seen else Cost()
        found[name] = LayerCost(name, channels, before + weight + activation)

    handles = [layer.register_forward_hook(count, with_kwargs=True) for layer in names]
    try:
        with without_trace(model, training=False), torch.no_grad():
            call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return found


_UNITS: Mapping[str, int] = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_NUMBER = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>%|[a-zA-Z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """What the selected channels may cost together.

    Attributes:
        kind: ``elements`` of one sample, ``bytes`` of the example batch, or ``share`` of the full cost in
            elements.
        amount: whole elements or bytes, or the share as a fraction (0.05 for "5%").
    """

    kind: Literal["elements", "bytes", "share"]
    amount: int | float

    @classmethod
    def parse(cls, budget: int | str | Budget) -> Budget:
        """The budget a user means.

        Args:
            budget: an int (or a string of digits) counts elements of one sample; a string with a unit
                ("256KiB", "1 MB") bytes; a percentage ("5%") is a share of the full cost.

        Raises:
            TypeError: not an int or a string.
            ValueError: not positive, or a string that reads as none of these.
        """
        if isinstance(budget, Budget):
            return budget
        expected = (
            'expected a positive int (elements of one sample), a size in bytes such as "256KiB" or "1 MB", or a '
            'share of the full cost such as "5%"'
        )
        if isinstance(budget, bool) or not isinstance(budget, Integral | str):
            raise TypeError(f"budget: got {budget!r}, {expected}")
        if not isinstance(budget, str):
            kind: Literal["elements", "bytes", "share"] = "elements"
            amount: int | float = int(budget)
        else:
            match = _NUMBER.fullmatch(budget)
            unit = match["unit"].lower() if match else ""
            number = float(match["number"]) if match else math.nan
            if match is None or math.isinf(number) or (unit not in _UNITS and unit not in ("", "%")):
                raise ValueError(f"budget: got {budget!r}, {expected}")
            if unit == "%":
                kind, amount = "share", number / 100
            elif unit:
                kind, amount = "bytes", math.floor(number * _UNITS[unit])
            elif match["number"].isdigit():
                kind, amount = "elements", int(match["number"])
            else:
                raise ValueError(f"budget: got {budget!r}, {expected}")
        if amount <= 0:
            raise ValueError(f"budget: got {budget!r}, {expected}")
        return cls(kind, amount)

    def limit(self, full: Cost) -> int:
        """The largest cost allowed, in ``of``'s unit, for a network whose full cost is ``full``."""
        return math.floor(self.amount * full.elements) if self.kind == "share" else int(self.amount)

    def of(self, cost: Cost) -> int:
        """What of a cost this budget counts: bytes, or elements."""
        return cost.bytes if self.kind == "bytes" else cost.elements

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{100 * self.amount:g}% of the full cost"
        return f"{self.amount:,} {self.kind}"
