"""Counted cost: what training an input channel takes in elements, bytes and multiply-accumulates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from trady_kernels.batch import Example, call, tensors_in, without_trace
from trady_kernels.ops.quantize_blocks import blocks_of

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Cost:
    """What training a set of channels takes.

    Attributes:
        weight_elements: elements of weight gradient.
        activation_elements: elements of stored input, of one sample.
        bytes: weight gradients and stored inputs of the whole example batch, in their own dtypes; of inputs
            stored in 8 bits codes and scales, rounded up for each channel.
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


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, to which the backward pass comes.

    Attributes:
        name: the layer's name in the network.
        channels: input channels (features) of the layer.
        macs: multiply-accumulates of one channel, of one sample: of its weight gradient, and of its input
            gradient.
        ancestors: names of the layers whose output this call's input is made from, directly or not: where
            one of them trains, the input needs a gradient. A layer called again can be its own ancestor.
        after_parameter: whether the input is also made from a parameter that trains outside of the layers
            (a norm's affine, an embedding), and so needs a gradient in any case.
    """

    name: str
    channels: int
    macs: int
    ancestors: frozenset[str]
    after_parameter: bool


@dataclass(frozen=True)
class Backward:
    """What a backward pass takes for one sample.

    Attributes:
        ends_at: name of the first layer, in the order of calls, that it comes to: nothing below is kept or
            computed. None where nothing trains.
        weight_grad_macs: multiply-accumulates of the weight gradients.
        input_grad_macs: multiply-accumulates of the input gradients.
    """

    ends_at: str | None
    weight_grad_macs: int
    input_grad_macs: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of both."""
        return self.weight_grad_macs + self.input_grad_macs

    @property
    def flops(self) -> int:
        """Floating-point operations, two a multiply-accumulate."""
        return 2 * self.macs


@dataclass(frozen=True)
class NetworkCost:
    """What a network's layers cost to train, and how gradients reach them.

    Attributes:
        layers: ``{layer name: LayerCost}`` in the order of the first call.
        calls: every call that a gradient of the network's output comes back to, in order.
    """

    layers: Mapping[str, LayerCost]
    calls: tuple[LayerCall, ...]

    def backward(self, trained: Mapping[str, int]) -> Backward:
        """Cost of a backward pass that ends at the lowest layer that trains.

        Args:
            trained: ``{layer name: input channels whose weights get a gradient}`` of every layer that
                trains; 0 for one that trains its bias alone.
        """
        ends_at = None
        weights = inputs = 0
        for layer in self.calls:
            flows_on = layer.after_parameter or not layer.ancestors.isdisjoint(trained)
            if ends_at is None and (flows_on or layer.name in trained):
                ends_at = layer.name
            weights += trained.get(layer.name, 0) * layer.macs
            inputs += flows_on * layer.channels * layer.macs
        return Backward(ends_at, weights, inputs)

    @property
    def full_backward(self) -> Backward:
        """Cost of all weight gradients and all input gradients but the first layer's."""
        return self.backward({name: layer.channels for name, layer in self.layers.items()})


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs."""
    return sum(costs, Cost())


def channels_of(layer: Layer) -> int:
    """Number of input channels (features) of a layer."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def weight_elements(layer: Layer) -> int:
    """Elements of the weight that belong to one input channel."""
    return layer.weight.numel() // channels_of(layer)


def _computes_as_base(layer: nn.Module) -> bool:
    """Whether a layer takes one tensor and returns one, as torch's and the sparse ones do."""
    forward = type(layer).forward
    return hasattr(layer, "channel_weight") or (
        "forward" not in layer.__dict__ and (forward is nn.Conv2d.forward or forward is nn.Linear.forward)
    )


def _stored_bytes(layer: Layer, input: torch.Tensor, elements: int) -> int:
    """Bytes of so many elements of a layer's input, as the layer keeps them for backward."""
    if getattr(layer, "stored", "exact") == "8bit":
        return elements + 4 * blocks_of(elements)
    device = input.device.type
    # To ask of a device without autocast, the meta device, is an error.
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts and input.is_floating_point() and input.dtype != torch.float64:
        return elements * torch.get_autocast_dtype(device).itemsize
    return elements * input.dtype.itemsize


class _Mark(torch.autograd.Function):
    """Makes a layer's output, itself unchanged, a node of the autograd graph that knows the call."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor, call: int) -> torch.Tensor:  # type: ignore[override]
        ctx.mark_dirty(output)  # no view, so that an activation in place may follow
        ctx.layer_call = call
        return output


@dataclass
class _Origin:
    """What tensors are made from, back to the nearest layers: numbers of their calls, and parameters."""

    calls: set[int]
    parameter: bool

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> _Origin:
        origin = cls(set(), False)
        edges: list[Any] = []
        for tensor in tensors:
            if tensor.grad_fn is not None:
                edges.append(tensor.grad_fn)
            elif tensor.requires_grad:
                origin.parameter = True
        seen = set(edges)
        while edges:
            node = edges.pop()
            if hasattr(node, "layer_call"):
                origin.calls.add(node.layer_call)
            elif hasattr(node, "variable"):  # AccumulateGrad
                origin.parameter = True
            else:
                further = {edge for edge, _ in node.next_functions if edge is not None} - seen
                seen |= further
                edges += further
        return origin


def _calls_reached(
    called: list[LayerCost], origins: list[_Origin], outputs: list[torch.Tensor]
) -> tuple[LayerCall, ...]:
    """The calls that a gradient of ``outputs`` reaches; ``called`` holds the layer and cost of each call."""
    ancestors: list[frozenset[str]] = []
    after_parameter: list[bool] = []
    for origin in origins:  # an input is made from earlier calls
        names = {called[earlier].name for earlier in origin.calls}
        ancestors.append(frozenset(names.union(*(ancestors[earlier] for earlier in origin.calls))))
        after_parameter.append(origin.parameter or any(after_parameter[earlier] for earlier in origin.calls))
    reached = _Origin.of(outputs).calls
    for number in reversed(range(len(called))):
        if number in reached:
            reached |= origins[number].calls
    return tuple(
        LayerCall(
            called[number].name,
            called[number].channels,
            called[number].channel.macs,
            ancestors[number],
            after_parameter[number],
        )
        for number in sorted(reached)
    )


def measure_network(model: nn.Module, example_input: Example) -> NetworkCost:
    """Cost of one channel of every ``nn.Conv2d`` and ``nn.Linear`` that a forward calls, and their data flow.

    The network runs once, in eval mode; modes, gradients, buffers and random numbers are left as they were.
    The run builds an autograd graph, which tells exactly what each layer's input is made from, but drops
    what the graph would keep. Not counted: products without such a layer (attention's, also the projections
    inside ``nn.MultiheadAttention``; products of functional calls), layers of subclasses whose forward takes no
    ``input`` or returns no tensor, norms, activations, pooling. The layers
    inside a reentrant activation checkpoint look as if no gradient reached them.

    Args:
        model: the network, dense or sparse.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, of the
            batch size, resolution, dtype and autocast mode that training will use.

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
    called: list[LayerCost] = []
    origins: list[_Origin] = []
    entered: list[tuple[_Origin, bool]] = []
    # A forward of a subclass's own may take and return anything.
    known = {layer for layer in names if _computes_as_base(layer)}

    def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs.get("input")

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((_Origin.of(tensors_in(input_of(args, kwargs))), torch.is_grad_enabled()))
        if layer in known:
            torch.set_grad_enabled(False)  # the mark stands for all that the layer does

    def count(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))  # dynamo of torch 2.10 knows no unions
        input = input_of(args, kwargs)
        origin, tracked = entered.pop()
        torch.set_grad_enabled(tracked)
        if not isinstance(input, torch.Tensor) or not isinstance(output, torch.Tensor):
            return output
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
            0, stored, _stored_bytes(layer, input, positions), per_channel * math.ceil(produced / samples)
        )
        before = seen.channel if seen else Cost()
        found[name] = LayerCost(name, channels, before + weight + activation)
        called.append(LayerCost(name, channels, activation))
        origins.append(origin)
        return _Mark.apply(output.detach(), anchor, len(called) - 1)

    handles: list[Any] = []
    with ExitStack() as run:
        run.enter_context(without_trace(model, training=False))
        run.enter_context(torch.inference_mode(False))
        run.enter_context(torch.enable_grad())
        run.enter_context(saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing))
        anchor = torch.ones((), requires_grad=True)
        try:
            for layer in names:
                handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(layer.register_forward_hook(count, with_kwargs=True))
            output = call(model, example_input)
        finally:
            for handle in handles:
                handle.remove()
    return NetworkCost(found, _calls_reached(called, origins, list(tensors_in(output))))


def measure_layers(model: nn.Module, example_input: Example) -> dict[str, LayerCost]:
    """Cost of one channel of every layer: ``measure_network(model, example_input).layers``."""
    return dict(measure_network(model, example_input).layers)


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
