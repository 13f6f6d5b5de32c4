"""One operator on one layer, at every number of selected channels, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from trady_kernels.benchmark.layers import ConvLayer, Layer, LinearLayer, selections
from trady_kernels.benchmark.roofline import Roofline, Work, conv2d_work, gather_work, linear_work
from trady_kernels.benchmark.timing import interleaved
from trady_kernels.ops import conv2d_channel_grad, gather_channels, last_kernel, linear_channel_grad
from trady_kernels.ops.backend import OPERATORS, unavailable

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Setting:
    """How the layers are run.

    Attributes:
        memory_format: name of the format of a convolution's tensors.
        dtype: name of the inputs' dtype.
        batch: images or texts.
        selected: numbers of selected channels; by default those of :func:`selections`.
        rounds: calls of each contender; by default as many as fit into the operator's time.
    """

    memory_format: str = "contiguous"
    dtype: str = "float32"
    batch: int = 8
    selected: Sequence[int] | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Row:
    """An operator on a layer with ``selected`` of its channels.

    Attributes:
        kernel: the backend that ``auto`` took.
        microseconds: medians: ``auto`` is the operator as anyone calls it, ``cpp`` the C++ kernel where auto took
            another, ``aten`` ATen's call alone on the compact input, ``dense`` the same on all channels, ``call``
            (of gradients) the operator on one pixel, which among the layer's calls, whose data push its code out
            of the caches, takes about three times as long as in a loop of its own.
        roofline: the least microseconds that the bytes and FLOPs allow; None without compiled code.
        lines: the same where bytes are counted in whole cache lines.
    """

    operator: str
    network: str
    family: str
    label: str
    in_channels: int
    selected: int
    memory_format: str
    dtype: str
    kernel: str
    roofline: float | None
    lines: float | None
    microseconds: dict[str, float] = field(default_factory=dict)

    @property
    def auto(self) -> float:
        return self.microseconds["auto"]

    @property
    def floor(self) -> float | None:
        """The roofline, plus one call for a depthwise layer, whose work can be less than that."""
        return self._with_call(self.roofline) if self.family.startswith("depthwise") else self.roofline

    @property
    def limit(self) -> float | None:
        """The least that an operator with such a call could take: one call, and the roofline of whole cache lines."""
        return self._with_call(self.lines)

    def _with_call(self, least: float | None) -> float | None:
        return None if least is None else least + self.microseconds.get("call", 0.0)

    def ratio(self, peer: str) -> float:
        """How many times the operator is faster than ``peer``."""
        return self.microseconds[peer] / self.auto


@dataclass(frozen=True)
class Call:
    """The operator's arguments, what one would otherwise run, and the peer's result in the operator's layout."""

    selected: int
    arguments: tuple[Any, ...]
    peer: Callable[[], Any]
    result: Callable[[Any], torch.Tensor]
    work: Work


def _laid_out(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """A copy with the format's own strides, also where one channel or pixel leaves them open.

    ATen reads the format off the strides, and lays everything out anew for one channel that looks contiguous.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format).copy_(tensor)


def _channels(layer: Layer, selected: int) -> torch.Tensor:
    order = torch.randperm(layer.in_channels, generator=torch.Generator().manual_seed(selected))
    return order[:selected].sort().values


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv2d_calls(layer: ConvLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``conv2d_channel_grad`` beside ``convolution_backward`` on tensors that are compact already.

    Gathering the input, laying out and transposing are in nobody's time. A depthwise layer's channels of grad_output,
    which arrives whole, are in both's: the peer gathers them by ``gather_channels``, a fraction of ATen's own indexing.
    """
    dtype, memory_format = DTYPES[setting.dtype], FORMATS[setting.memory_format]
    x = _random(setting.batch, layer.in_channels, layer.size, layer.size, dtype=dtype, seed=0)
    dy = _random(setting.batch, layer.out_channels, layer.out_size, layer.out_size, dtype=dtype, seed=1)
    x, dy = _laid_out(x, memory_format), _laid_out(dy, memory_format)
    geometry = tuple((v, v) for v in (layer.kernel, layer.stride, layer.padding, 1))
    calls = []
    for k in selected:
        channels = _channels(layer, k)
        compact = _laid_out(x[:, channels], memory_format)
        if layer.dense:
            peer = _conv2d_peer(layer, compact, dy, groups=1)
            result: Callable[[Any], torch.Tensor] = lambda grads: grads[1].transpose(0, 1)  # noqa: E731
        else:
            peer = _gathering_peer(layer, compact, dy, channels)
            result = lambda grads: grads[1]  # noqa: E731
        arguments = (compact, dy, channels, layer.in_channels, *geometry, layer.groups)
        work = conv2d_work(layer, channels, setting.batch, setting.memory_format, dtype)
        calls.append(Call(k, arguments, peer, result, work))
    return calls


def _conv2d_peer(layer: ConvLayer, x: torch.Tensor, dy: torch.Tensor, groups: int) -> Callable[[], Any]:
    weight = x.new_zeros((dy.shape[1], x.shape[1] // groups, layer.kernel, layer.kernel))
    last = ([1, 1], False, [0, 0], groups, [False, True, False])
    backward = torch.ops.aten.convolution_backward.default
    if layer.kernel == 1 and layer.stride > 1:
        # oneDNN's own strided 1x1 gradient crashes or errs with few channels in channels_last (see
        # ops/conv2d_channel_grad/aten.py), and in contiguous layout takes up to five times as long as this.
        step = layer.stride
        return lambda: backward(dy, x[:, :, ::step, ::step], weight, None, [1, 1], [0, 0], *last)
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    return partial(backward, dy, x, weight, None, stride, padding, *last)


def _gathering_peer(
    layer: ConvLayer, x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor
) -> Callable[[], Any]:
    def call() -> Any:
        return _conv2d_peer(layer, x, gather_channels(dy, channels), groups=channels.shape[0])()

    return call


def gather_calls(layer: ConvLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``gather_channels`` on the layer's input beside ``index_select``."""
    dtype = DTYPES[setting.dtype]
    x = _random(setting.batch, layer.in_channels, layer.size, layer.size, dtype=dtype, seed=0)
    x = _laid_out(x, FORMATS[setting.memory_format])
    calls = []
    for k in selected:
        channels = _channels(layer, k)
        work = gather_work(layer, k, setting.batch, dtype)
        calls.append(Call(k, (x, channels), partial(x.index_select, 1, channels), lambda y: y, work))
    return calls


def linear_calls(layer: LinearLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``linear_channel_grad`` beside the matrix product that gives the same layout.

    It is the peer's better side: for 2 to 12 features ``mm(dy.t(), x)`` takes 2 to 20 times as long in float32.
    """
    dtype, rows = DTYPES[setting.dtype], setting.batch * layer.rows
    x = _random(rows, layer.in_features, dtype=dtype, seed=0)
    dy = _random(rows, layer.out_features, dtype=dtype, seed=1)
    calls = []
    for k in selected:
        compact = x[:, _channels(layer, k)].contiguous()
        work = linear_work(layer, k, setting.batch, dtype)
        calls.append(Call(k, (compact, dy), partial(torch.mm, compact.t(), dy), lambda y: y, work))
    return calls


def _smallest_conv2d(dtype: torch.dtype) -> Callable[[], object]:
    """A depthwise layer of two channels on one pixel, one of them selected: what any call costs."""
    one = (1, 1)
    x, dy = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 2, 1, 1, dtype=dtype)
    return partial(conv2d_channel_grad, x, dy, torch.tensor([1]), 2, one, one, (0, 0), one, 2)


def _smallest_linear(dtype: torch.dtype) -> Callable[[], object]:
    """One row of one feature: what any call costs."""
    return partial(linear_channel_grad, torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))


def _as_they_are(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments


def _conv2d_operands(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    tensors, pairs, groups = arguments[:4], arguments[4:8], arguments[8]
    return *tensors, tuple(chain(*pairs)), groups


@dataclass(frozen=True)
class Benchmark:
    """An operator's front, its calls on a layer, the seconds that a layer's rows may take, and the smallest call.

    Its kernels take what ``operands`` makes of the front's arguments.
    """

    front: Callable[..., torch.Tensor]
    calls: Callable[[Any, Setting, Sequence[int]], list[Call]]
    seconds: float
    smallest: Callable[[torch.dtype], Callable[[], object]] | None = None
    operands: Callable[[tuple[Any, ...]], tuple[Any, ...]] = _as_they_are


BENCHMARKS = {
    "conv2d_channel_grad": Benchmark(
        conv2d_channel_grad, conv2d_calls, 1.0, _smallest_conv2d, _conv2d_operands
    ),
    "gather_channels": Benchmark(gather_channels, gather_calls, 0.3),
    "linear_channel_grad": Benchmark(linear_channel_grad, linear_calls, 1.0, _smallest_linear),
}


def measure(operator: str, layer: Layer, setting: Setting, roofline: Roofline) -> list[Row]:
    """Time an operator on a layer, all numbers of channels and all contenders interleaved.

    Raises:
        ArithmeticError: operator and peer do not give the same.
    """
    benchmark = BENCHMARKS[operator]
    wanted = _selected(layer, setting)
    if not wanted:
        return []
    calls = benchmark.calls(layer, setting, sorted({*wanted, layer.in_channels}))
    contenders: dict[tuple[str, int], Callable[[], object]] = {}
    kernels: dict[int, str] = {}
    for call in calls:
        k = call.selected
        contenders["aten", k] = call.peer
        if k not in wanted:
            continue
        ours = benchmark.front(*call.arguments)
        kernels[k] = last_kernel(operator) or ""
        _check(operator, layer, setting, k, ours, call.result(call.peer()))
        contenders["auto", k] = partial(benchmark.front, *call.arguments)
        if kernels[k] != "cpp" and not unavailable("cpp"):
            contenders["cpp", k] = partial(
                OPERATORS[operator].kernels["cpp"], *benchmark.operands(call.arguments)
            )
    if benchmark.smallest is not None:
        contenders["call", 0] = benchmark.smallest(DTYPES[setting.dtype])
    times = interleaved(contenders, setting.rounds, seconds=benchmark.seconds)
    rows = []
    for call in calls:
        k = call.selected
        if k not in wanted:
            continue
        found = {name: times[name, k] for name in ("auto", "cpp", "aten") if (name, k) in times}
        found["dense"] = times["aten", layer.in_channels]
        if ("call", 0) in times:
            found["call"] = times["call", 0]
        rows.append(
            Row(
                operator,
                layer.network,
                layer.family,
                layer.label,
                layer.in_channels,
                k,
                setting.memory_format,
                setting.dtype,
                kernels[k],
                roofline.microseconds(call.work, setting.dtype),
                roofline.microseconds(call.work.in_lines(), setting.dtype),
                found,
            )
        )
    return rows


def _selected(layer: Layer, setting: Setting) -> list[int]:
    if setting.selected is None:
        return list(selections(layer.in_channels))
    return sorted({k for k in setting.selected if k <= layer.in_channels})


#: Largest difference from a peer, relative to the largest element: both round, and the half types' peer to bfloat16.
_AGREEMENT = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 3e-2}


def _check(
    operator: str,
    layer: Layer,
    setting: Setting,
    selected: int,
    ours: torch.Tensor,
    peer: torch.Tensor,
) -> None:
    scale = float(peer.double().abs().max())
    error = float((ours.double() - peer.double()).abs().max())
    if ours.shape != peer.shape or not error <= _AGREEMENT[setting.dtype] * scale:
        raise ArithmeticError(
            f"{operator} on {layer.label}, {selected} channels, {setting.memory_format}, {setting.dtype}: differs "
            f"from ATen by {error:.3g} where the largest element is {scale:.3g}; run trady doctor and the tests"
        )
