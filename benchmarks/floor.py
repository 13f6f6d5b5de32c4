"""The least bytes that a step must keep for backward, counted from shapes and from autograd's own graph.

The dense network runs once with norms frozen, every weight frozen and each selected layer's output made to
require a gradient. The graph that autograd then records is the graph that a step with this selection needs, cut
below its lowest selected layer. Counted:

* of a convolution or linear layer the selected channels of its input, and all channels of the head;
* of ReLU, ReLU6, Hardtanh, LeakyReLU and Hardsigmoid one bit an element, of dropout likewise;
* of max pooling one byte an output element; of average pooling, batch norm, reshaping and addition nothing;
* of attention with dropout the query, key and value, and one bit a probability: the probabilities can be
  computed again;
* of everything else (Hardswish, SiLU, GELU, layer norm, attention, products) the unique storages that autograd
  keeps: one full-size input each, both factors of a product, the query, key, value and output of attention.

The loss is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from trady_kernels.batch import Example, call, tensors_in

Layer = nn.Conv2d | nn.Linear
Node = Any  # torch.autograd.graph.Node, whose saved tensors have no declared names


@dataclass(frozen=True)
class Floor:
    """Least bytes of a step, by what they are for.

    Attributes:
        selected: channels that the selected layers and the head need.
        bits: one an element of ReLU-like activations and of dropout.
        pooled: one byte an element that max pooling returns.
        other: by operation, what cannot be had from fewer bytes without giving up exactness.
    """

    selected: int
    bits: int
    pooled: int
    other: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return self.selected + self.bits + self.pooled + sum(self.other.values())


def _saved(node: Node) -> Iterator[torch.Tensor]:
    for name in dir(node):
        if name.startswith("_saved_"):
            yield from tensors_in(getattr(node, name))


def _bits(elements: int) -> int:
    return math.ceil(elements / 8)


#: Elements that an operation with one bit or one byte an element has.
_ELEMENTS: Mapping[str, tuple[str, Callable[[Node], int]]] = {
    "ReluBackward0": ("bits", lambda node: node._saved_result.numel()),
    "HardtanhBackward0": ("bits", lambda node: node._saved_self.numel()),
    "LeakyReluBackward0": ("bits", lambda node: node._saved_self.numel()),
    "LeakyReluBackward1": ("bits", lambda node: node._saved_result.numel()),
    "HardsigmoidBackward0": ("bits", lambda node: node._saved_self.numel()),
    "MaxPool2DWithIndicesBackward0": ("pooled", lambda node: node._saved_result1.numel()),
}
#: Operations whose backward pass needs shapes, or a frozen affine, and no activation.
_FREE = frozenset({"NativeBatchNormBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0"})


def _nodes(ends: list[Node], stop: set[Node]) -> Iterator[Node]:
    """Every node of the graph above ``stop``, once."""
    seen = set(stop)
    while ends:
        node = ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ends += [before for before, _ in node.next_functions]


class _Attention(TorchFunctionMode):
    """Notes the nodes of attention with dropout, whose probabilities autograd would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: set[Node] = set()
        self.bytes = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if function is F.scaled_dot_product_attention and dropout and output.requires_grad:
            query, key, value = (
                args[:3] if len(args) > 2 else map(kwargs.__getitem__, ("query", "key", "value"))
            )
            self.inside.update(_nodes([output.grad_fn], {part.grad_fn for part in (query, key, value)}))
            probabilities = query.numel() // query.shape[-1] * key.shape[-2]
            parts = {part.data_ptr(): part.numel() for part in (query, key, value)}
            self.bytes += sum(parts.values()) * output.element_size() + _bits(probabilities)
        return output


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = [(module, module.training) for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        model.requires_grad_(False)
        for norm, _ in norms:
            norm.eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for norm, training in norms:
            norm.train(training)


def floor(model: nn.Module, example_input: Example, selected: Mapping[str, int], head: str | None) -> Floor:
    """The least bytes of a step that trains these channels.

    Args:
        model: the dense network, in the mode it trains in; left as it is.
        example_input: the batch that the step trains on, under the autocast mode that it runs in.
        selected: how many input channels each layer trains, by name; others train none.
        head: name of the layer that trains as a whole, or None.
    """
    names = {module: name for name, module in model.named_modules()}
    batch = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(example_input)}
    known = batch | {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    counted: Counter[str] = Counter()
    skipped: set[Node] = set()

    def layer_called(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
        assert isinstance(layer, Layer)
        input = args[0] if args else kwargs["input"]
        skipped.update(_nodes([output.grad_fn], {input.grad_fn}))
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        trained = channels if names[layer] == head else selected.get(names[layer], 0)
        if not trained:
            return None
        if trained < channels or input.untyped_storage().data_ptr() not in batch:
            counted["selected"] += input.numel() // channels * trained * output.element_size()
        return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)

    def dropout_called(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output is not args[0] and output.requires_grad and module.training and module.p:
            skipped.update(_nodes([output.grad_fn], {args[0].grad_fn}))
            counted["bits"] += _bits(output.numel())

    handles = [m.register_forward_hook(layer_called, with_kwargs=True) for m in names if isinstance(m, Layer)]
    handles += [m.register_forward_hook(dropout_called) for m in names if isinstance(m, nn.Dropout)]
    attention = _Attention()
    try:
        with _frozen(model), torch.random.fork_rng(), torch.enable_grad(), attention:
            outputs = list(tensors_in(call(model, example_input)))
    finally:
        for handle in handles:
            handle.remove()
    skipped |= attention.inside
    other: Counter[str] = Counter()
    if attention.bytes:
        other["attention"] = attention.bytes
    for node in _nodes([output.grad_fn for output in outputs], set()):
        name = node.name()
        if node in skipped or name in _FREE:
            continue
        if name in _ELEMENTS:
            kind, elements = _ELEMENTS[name]
            counted[kind] += _bits(elements(node)) if kind == "bits" else elements(node)
            continue
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                other[name.removesuffix("0").removesuffix("Backward")] += storage.nbytes()
    return Floor(counted["selected"], counted["bits"], counted["pooled"], dict(other))
