"""One operator on one layer, at every number of selected channels, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.benchmark.layers import ConvLayer, Layer, LinearLayer, selections
from trady_kernels.benchmark.roofline import (
    Roofline,
    Work,
    conv2d_work,
    gather_work,
    linear_work,
    mask_work,
)
from trady_kernels.benchmark.timing import interleaved
from trady_kernels.ops import (
    conv2d_channel_grad,
    gather_channels,
    last_kernel,
    linear_channel_grad,
    rectify,
    scale_by_bits,
)
from trady_kernels.ops.backend import OPERATORS, unavailable
from trady_kernels.ops.choice import DTYPES
from trady_kernels.ops.layout import FORMATS


@dataclass(frozen=True)
class Setting:
    """How the layers are run.

    Attributes:
        memory_format: name of the format of a convolution's tensors.
        dtype: name of the inputs' dtype.
        batch: images or texts.
        selected: numbers of selected channels; by default those of :func:`selections`.
        rounds: calls of each contender; by default as many as fit into the operator's time.
        device: type of the device, ``"cpu"`` or ``"cuda"``.
    """

    memory_format: str = "contiguous"
    dtype: str = "float32"
    batch: int = 8
    selected: Sequence[int] | None = None
    rounds: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """An operator on a layer with ``selected`` of its channels.

    Attributes:
        kernel: the backend that ``auto`` took.
        microseconds: medians: ``auto`` is the operator as anyone calls it, ``cpp``, ``cuda`` or ``triton`` a kernel of
            ours that auto did not take, ``aten`` ATen's call alone on the compact input, ``dense`` the same on all
            channels, ``call`` (of gradients) the operator on one pixel, which among the layer's calls, whose data push its code out
            of the caches, takes about three times as long as in a loop of its own. On a GPU ``aten`` is the fastest of
            ATen's ways, each of which is there too: ``aten compact`` the call itself, ``aten padded`` with zero channels
            up to a multiple of 8, ``aten native`` without cuDNN.
        roofline: the least microseconds that the bytes and FLOPs allow; None without compiled code.
        lines: the same where bytes are counted in whole cache lines.
        device: type of the device.
        bytes: the least that is read and written.
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
    device: str = "cpu"
    bytes: int = 0

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
    """The operator's arguments, what one would otherwise run, and the peer's result in the operator's layout.

    Attributes:
        others: further ways of ATen to the same result, by name.
    """

    selected: int
    arguments: tuple[Any, ...]
    peer: Callable[[], Any]
    result: Callable[[Any], torch.Tensor]
    work: Work
    others: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def _laid_out(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """A copy with the format's own strides, also where one channel or pixel leaves them open.

    ATen reads the format off the strides, and lays everything out anew for one channel that looks contiguous.
    """
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format
    ).copy_(tensor)


def _channels(layer: Layer, selected: int) -> torch.Tensor:
    order = torch.randperm(layer.in_channels, generator=torch.Generator().manual_seed(selected))
    return order[:selected].sort().values


def _random(*shape: int, setting: Setting, seed: int) -> torch.Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=setting.device).to(DTYPES[setting.dtype])


def conv2d_calls(layer: ConvLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``conv2d_channel_grad`` beside ``convolution_backward`` on tensors that are compact already.

    Gathering the input, laying out and transposing are in nobody's time. A depthwise layer's channels of grad_output,
    which arrives whole, are in both's: the peer gathers them by ``gather_channels``, a fraction of ATen's own indexing.
    """
    dtype, memory_format = DTYPES[setting.dtype], FORMATS[setting.memory_format]
    x, dy = _input(layer, setting), _grad_output(layer, setting)
    geometry = tuple((v, v) for v in (layer.kernel, layer.stride, layer.padding, 1))
    calls = []
    for k in selected:
        order = _channels(layer, k)
        channels = order.to(setting.device)
        compact = _laid_out(x[:, channels], memory_format)
        if layer.dense:
            peer = _conv2d_peer(layer, compact, dy, groups=1)
            result: Callable[[Any], torch.Tensor] = lambda grads: grads[1].transpose(0, 1)  # noqa: E731
        else:
            peer = _gathering_peer(layer, compact, dy, channels)
            result = lambda grads: grads[1]  # noqa: E731
        arguments = (compact, dy, channels, layer.in_channels, *geometry, layer.groups)
        work = conv2d_work(layer, order, setting.batch, setting.memory_format, dtype, setting.device)
        others: dict[str, Callable[[], Any]] = {}
        if setting.device == "cuda" and not layer.dense:
            others["aten native"] = _without_cudnn(peer)
        elif setting.device == "cuda" and k % 8:
            padded = _laid_out(F.pad(compact, (0, 0, 0, 0, 0, -k % 8)), memory_format)
            others["aten padded"] = _conv2d_peer(layer, padded, dy, groups=1)
        calls.append(Call(k, arguments, peer, result, work, others))
    return calls


def _input(layer: ConvLayer, setting: Setting) -> torch.Tensor:
    x = _random(setting.batch, layer.in_channels, layer.size, layer.size, setting=setting, seed=0)
    return _laid_out(x, FORMATS[setting.memory_format])


def _grad_output(layer: ConvLayer, setting: Setting) -> torch.Tensor:
    dy = _random(setting.batch, layer.out_channels, layer.out_size, layer.out_size, setting=setting, seed=1)
    return _laid_out(dy, FORMATS[setting.memory_format])


def _without_cudnn(call: Callable[[], Any]) -> Callable[[], Any]:
    def native() -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return call()

    return native


def _conv2d_peer(layer: ConvLayer, x: torch.Tensor, dy: torch.Tensor, groups: int) -> Callable[[], Any]:
    weight = x.new_zeros((dy.shape[1], x.shape[1] // groups, layer.kernel, layer.kernel))
    last = ([1, 1], False, [0, 0], groups, [False, True, False])
    backward = torch.ops.aten.convolution_backward.default
    if layer.kernel == 1 and layer.stride > 1 and not x.is_cuda:
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
    dtype, x = DTYPES[setting.dtype], _input(layer, setting)
    calls = []
    for k in selected:
        order = _channels(layer, k)
        channels = order.to(setting.device)
        work = gather_work(layer, order, setting.batch, setting.memory_format, dtype, setting.device)
        calls.append(Call(k, (x, channels), partial(x.index_select, 1, channels), lambda y: y, work))
    return calls


def rectify_calls(layer: ConvLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``rectify`` as ReLU of the layer's output, beside ReLU and a mask of one byte an element."""
    y = _grad_output(layer, setting)
    work = mask_work(y.numel(), y.dtype)

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(y), y > 0

    return [Call(layer.in_channels, (y, 0.0), peer, lambda results: results[0], work)]


def scale_calls(layer: ConvLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``scale_by_bits`` as ReLU's backward pass on the layer's output, beside ATen's, which reads the output."""
    y = _grad_output(layer, setting)
    _, bits = rectify(y, 0.0)
    peer = partial(torch.ops.aten.threshold_backward.default, y, y, 0)
    return [
        Call(layer.in_channels, (y, bits, 1.0), peer, lambda result: result, mask_work(y.numel(), y.dtype))
    ]


def linear_calls(layer: LinearLayer, setting: Setting, selected: Sequence[int]) -> list[Call]:
    """``linear_channel_grad`` beside the matrix product that gives the same layout.

    It is the peer's better side: for 2 to 12 features ``mm(dy.t(), x)`` takes 2 to 20 times as long in float32.
    """
    dtype, rows = DTYPES[setting.dtype], setting.batch * layer.rows
    x = _random(rows, layer.in_features, setting=setting, seed=0)
    dy = _random(rows, layer.out_features, setting=setting, seed=1)
    calls = []
    for k in selected:
        compact = x[:, _channels(layer, k).to(setting.device)].contiguous()
        work = linear_work(layer, k, setting.batch, dtype)
        calls.append(Call(k, (compact, dy), partial(torch.mm, compact.t(), dy), lambda y: y, work))
    return calls


def _smallest_conv2d(setting: Setting) -> Callable[[], object]:
    """A depthwise layer of two channels on one pixel, one of them selected: what any call costs."""
    one, dtype, device = (1, 1), DTYPES[setting.dtype], setting.device
    x, dy = (torch.ones(1, outputs, 1, 1, dtype=dtype, device=device) for outputs in (1, 2))
    channels = torch.tensor([1], device=device)
    return partial(conv2d_channel_grad, x, dy, channels, 2, one, one, (0, 0), one, 2)


def _smallest_linear(setting: Setting) -> Callable[[], object]:
    """One row of one feature: what any call costs."""
    one = torch.ones(1, 1, dtype=DTYPES[setting.dtype], device=setting.device)
    return partial(linear_channel_grad, one, one)


def _as_they_are(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments


def _conv2d_operands(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    tensors, pairs, groups = arguments[:4], arguments[4:8], arguments[8]
    return *tensors, tuple(chain(*pairs)), groups


@dataclass(frozen=True)
class Benchmark:
    """An operator's front, its calls on a layer, the seconds that a layer's rows may take, and the smallest call.

    Its kernels take what ``operands`` makes of the front's arguments; ``result`` is the part of what it gives that a peer
    gives too.
    """

    front: Callable[..., Any]
    calls: Callable[[Any, Setting, Sequence[int]], list[Call]]
    seconds: float
    smallest: Callable[[Setting], Callable[[], object]] | None = None
    operands: Callable[[tuple[Any, ...]], tuple[Any, ...]] = _as_they_are
    result: Callable[[Any], torch.Tensor] = lambda output: output
    whole: bool = False


BENCHMARKS = {
    "conv2d_channel_grad": Benchmark(
        conv2d_channel_grad, conv2d_calls, 1.0, _smallest_conv2d, _conv2d_operands
    ),
    "gather_channels": Benchmark(gather_channels, gather_calls, 0.3),
    "linear_channel_grad": Benchmark(linear_channel_grad, linear_calls, 1.0, _smallest_linear),
    "rectify": Benchmark(
        rectify,
        rectify_calls,
        0.2,
        operands=lambda arguments: (*arguments, None, None),
        result=lambda output: output[0],
        whole=True,
    ),
    "scale_by_bits": Benchmark(
        scale_by_bits, scale_calls, 0.2, operands=lambda arguments: (*arguments, None), whole=True
    ),
}


def measure(operator: str, layer: Layer, setting: Setting, roofline: Roofline) -> list[Row]:
    """Time an operator on a layer, all numbers of channels and all contenders interleaved.

    Raises:
        ArithmeticError: operator and peer do not give the same.
    """
    benchmark = BENCHMARKS[operator]
    wanted = [layer.in_channels] if benchmark.whole else _selected(layer, setting)
    if not wanted:
        return []
    calls = benchmark.calls(layer, setting, sorted({*wanted, layer.in_channels}))
    contenders: dict[tuple[str, int], Callable[[], object]] = {}
    kernels: dict[int, str] = {}
    for call in calls:
        k = call.selected
        contenders["aten", k] = call.peer
        for name, other in call.others.items():
            contenders[name, k] = other
        if k not in wanted:
            continue
        ours = benchmark.result(benchmark.front(*call.arguments))
        kernels[k] = last_kernel(operator) or ""
        _check(operator, layer, setting, k, ours, call.result(call.peer()))
        contenders["auto", k] = partial(benchmark.front, *call.arguments)
        for name in _OURS[setting.device]:
            if name != kernels[k] and not unavailable(name) and _takes(operator, name, layer, setting):
                contenders[name, k] = partial(
                    OPERATORS[operator].kernels[name], *benchmark.operands(call.arguments)
                )
    if benchmark.smallest is not None:
        contenders["call", 0] = benchmark.smallest(setting)
    times = interleaved(contenders, setting.rounds, seconds=benchmark.seconds, device=setting.device)
    rows = []
    for call in calls:
        k = call.selected
        if k not in wanted:
            continue
        found = {name: times[name, k] for name, of in times if of == k}
        if call.others:
            found["aten compact"] = found["aten"]
            found["aten"] = min(found[name] for name in ("aten", *call.others))
        found["dense"] = min(
            time for (name, of), time in times.items() if of == layer.in_channels and "aten" in name
        )
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
                setting.device,
                call.work.bytes,
            )
        )
    return rows


#: Kernels that are timed beside the chosen one.
_OURS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def _takes(operator: str, kernel: str, layer: Layer, setting: Setting) -> bool:
    """Whether a kernel of ours runs the operator on a layer, and as what it was made for."""
    if kernel not in OPERATORS[operator].kernels:
        return False
    if setting.device == "cpu" or operator not in ("conv2d_channel_grad", "linear_channel_grad"):
        return True
    grouped = isinstance(layer, ConvLayer) and not layer.dense
    if kernel == "triton":
        return setting.dtype != "float64" and not grouped
    return grouped or (setting.dtype == "float32" and layer.family in ("1x1", "linear"))


def _selected(layer: Layer, setting: Setting) -> list[int]:
    if setting.selected is None:
        return list(selections(layer.in_channels))
    return sorted({k for k in setting.selected if k <= layer.in_channels})


#: Largest difference from a peer, relative to the largest element: both round, and the half types' peer to bfloat16.
_AGREEMENT = {"float32": 1e-3, "float64": 1e-10, "bfloat16": 3e-2, "float16": 4e-3}


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
