"""Optimisers and sparse layers: rows reach the weight after every step, state follows its channels.

Two hooks on every optimiser's step do it, so nothing in a training loop has to know. What an optimiser keeps
for a ``channel_weight`` says itself which channels its rows belong to (two tuples in ``optimizer.state``, which
``state_dict()`` carries along as tensors), so it is rearranged whenever the selection is another one at a step, be
it after a ``select()`` or after a ``load_state_dict()``.
"""

from __future__ import annotations

import gc
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

#: Entry of ``optimizer.state[channel_weight]``: the channel of each row.
CHANNELS = "trady_channels"
#: Entry beside it, where an optimiser's step count is shared: the step at which each row entered, 0 for a
#: row that was there from the start or whose age no longer matters; empty where that holds for all rows.
ENTERED = "trady_entered"


class Layer(Protocol):
    """What this module needs of a sparse layer."""

    weight: torch.Tensor
    channel_weight: nn.Parameter
    channels: torch.Tensor

    @property
    def selection(self) -> tuple[int, ...]: ...
    def is_own_rows(self, parameter: torch.Tensor) -> bool: ...
    def synchronize(self) -> None: ...
    def push_rows(self) -> None: ...
    def read_rows(self, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor: ...


# Parameter id -> the layer whose `channel_weight` it is. The layer keeps the parameter alive, so an id is not
# reused while its entry lives; `layer_of` compares identities all the same.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(layer: Layer) -> Layer:
    """Let optimiser steps know the layer that owns ``layer.channel_weight``.

    Returns:
        The layer that they know: another one of which this is a shallow copy, if it was there before.
    """
    known = layer_of(layer.channel_weight)
    if known is None:
        _layers[id(layer.channel_weight)] = known = layer
    return known


def unregister(rows: nn.Parameter) -> None:
    """Forget the layer that owned ``rows`` and is sparse no longer."""
    _layers.pop(id(rows), None)


def layer_of(parameter: torch.Tensor) -> Layer | None:
    """The sparse layer that has ``parameter`` as its ``channel_weight``, or None."""
    layer = _layers.get(id(parameter))
    return layer if layer is not None and layer.is_own_rows(parameter) else None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor.to(device)`` that waits for no GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -- what a fresh optimiser would do ---------------------------------------------------------------

Group = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class _Young:
    """Rows that entered later than the optimiser's shared step count says, before and after a step.

    Attributes:
        before: ``(n, ...)``, the rows before the step.
        grad: ``(n, ...)``, their gradient, as the optimiser was given it.
        state: the optimiser's row-shaped entries after the step, ``(n, ...)`` each.
        group: the parameter group.
        ages: how many steps each row has had, this one included.
    """

    before: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: Group
    ages: list[int]

    def each(self, coefficient: Callable[[int], float]) -> torch.Tensor:
        """``(n, 1, ...)``: a number that depends on the age."""
        values = [coefficient(age) for age in self.ages]
        shape = (-1, *(1,) * (self.before.dim() - 1))
        return to_device(torch.tensor(values, dtype=self.before.dtype), self.before.device).view(shape)

    def descent(self) -> torch.Tensor:
        """The gradient with its sign and L2 decay, where decay is not decoupled."""
        grad = -self.grad if self.group["maximize"] else self.grad
        if self.group.get("decoupled_weight_decay"):
            return grad
        return grad + float(self.group["weight_decay"]) * self.before

    def decayed(self) -> torch.Tensor:
        """The rows after decoupled weight decay."""
        if not self.group.get("decoupled_weight_decay"):
            return self.before
        return self.before * (1 - float(self.group["lr"]) * float(self.group["weight_decay"]))


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def _adam(rows: _Young) -> torch.Tensor:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1; AMSGrad: arXiv 1904.09237; decoupled: arXiv 1711.05101."""
    beta1, beta2 = _betas(rows.group)
    lr, eps = float(rows.group["lr"]), rows.group["eps"]
    second = rows.state["max_exp_avg_sq" if rows.group["amsgrad"] else "exp_avg_sq"]
    root = second.sqrt() / rows.each(lambda age: math.sqrt(1 - beta2**age)) + eps
    return rows.decayed() - rows.each(lambda age: lr / (1 - beta1**age)) * rows.state["exp_avg"] / root


def _nadam(rows: _Young) -> torch.Tensor:
    """Dozat, "Incorporating Nesterov Momentum into Adam", as ``torch.optim.NAdam`` writes it."""
    beta1, beta2 = _betas(rows.group)
    lr, eps, decay = float(rows.group["lr"]), rows.group["eps"], rows.group["momentum_decay"]

    def mu(age: int) -> float:
        return beta1 * (1 - 0.5 * 0.96 ** (age * decay))

    products = {0: 1.0}
    for age in range(1, max(rows.ages) + 2):
        products[age] = products[age - 1] * mu(age)
    root = (rows.state["exp_avg_sq"] / rows.each(lambda age: 1 - beta2**age)).sqrt() + eps
    of_grad = rows.each(lambda age: lr * (1 - mu(age)) / (1 - products[age]))
    of_average = rows.each(lambda age: lr * mu(age + 1) / (1 - products[age + 1]))
    return rows.decayed() - (of_grad * rows.descent() + of_average * rows.state["exp_avg"]) / root


def _radam(rows: _Young) -> torch.Tensor:
    """Liu et al., arXiv 1908.03265, algorithm 2."""
    beta1, beta2 = _betas(rows.group)
    lr, eps = float(rows.group["lr"]), rows.group["eps"]
    limit = 2 / (1 - beta2) - 1

    def rectification(age: int) -> float:  # 0: the variance is not tractable yet
        length = limit - 2 * age * beta2**age / (1 - beta2**age)
        if length <= 5:
            return 0.0
        ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        return math.sqrt(ratio * (1 - beta2**age))

    average = rows.each(lambda age: lr / (1 - beta1**age)) * rows.state["exp_avg"]
    rectified = rows.each(rectification)
    adaptive = rectified / (rows.state["exp_avg_sq"].sqrt() + eps)
    return rows.decayed() - average * torch.where(rectified > 0, adaptive, 1.0)


def _adagrad(rows: _Young) -> torch.Tensor:
    """Duchi et al., JMLR 12 (2011), with the learning rate decay of ``torch.optim.Adagrad``."""
    lr, decay = float(rows.group["lr"]), rows.group["lr_decay"]
    rate = rows.each(lambda age: lr / (1 + (age - 1) * decay))
    return rows.before - rate * rows.descent() / (rows.state["sum"].sqrt() + rows.group["eps"])


def _zero(group: Group) -> float:
    return 0.0


def _moments_settle(group: Group, age: int) -> float:
    return (1 + age) * max(_betas(group)) ** age


def _nadam_settles(group: Group, age: int) -> float:
    return max(_moments_settle(group, age), 0.96 ** (age * group["momentum_decay"]))


def _adagrad_settles(group: Group, age: int) -> float:
    return 1.0 if group["lr_decay"] else 0.0


@dataclass(frozen=True)
class _Rule:
    """How the state of one optimiser class follows its rows.

    Attributes:
        initial: the row-shaped entries, and what a fresh optimiser fills them with.
        scalars: the other entries, and what they are in a fresh optimiser.
        update: the step a fresh optimiser takes, where a shared step count makes the real one differ.
        remaining: relative size of that difference for a row of an age.
    """

    initial: Mapping[str, Callable[[Group], float]]
    scalars: Mapping[str, float] = field(default_factory=lambda: {"step": 0.0})
    update: Callable[[_Young], torch.Tensor] | None = None
    remaining: Callable[[Group, int], float] | None = None


_MOMENTS = {"exp_avg": _zero, "exp_avg_sq": _zero, "max_exp_avg_sq": _zero}
_ADAM = _Rule(_MOMENTS, update=_adam, remaining=_moments_settle)

RULES: dict[type[Optimizer], _Rule] = {
    # With dampening, the first step of an entering row is (1 - dampening) times a fresh optimiser's.
    torch.optim.SGD: _Rule({"momentum_buffer": _zero}),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _Rule(_MOMENTS, {"step": 0.0, "mu_product": 1.0}, _nadam, _nadam_settles),
    torch.optim.RAdam: _Rule(_MOMENTS, update=_radam, remaining=_moments_settle),
    torch.optim.RMSprop: _Rule({"square_avg": _zero, "momentum_buffer": _zero, "grad_avg": _zero}),
    torch.optim.Adagrad: _Rule(
        {"sum": lambda group: group["initial_accumulator_value"]}, update=_adagrad, remaining=_adagrad_settles
    ),
    torch.optim.Rprop: _Rule({"prev": _zero, "step_size": lambda group: float(group["lr"])}),
}


def _rule_of(optimizer: Optimizer) -> _Rule | None:
    """The rule of the optimiser's class, or of the class whose ``step`` a subclass inherits."""
    cls = type(optimizer)
    for base in cls.__mro__:
        if base in RULES:
            # torch wraps `step` in the first instance's class: in this one, where no `base` has been made before.
            inherits = cls.step is base.step or inspect.unwrap(cls.step) is inspect.unwrap(base.step)
            return RULES[base] if inherits else None
    return None


# -- the two entries in a state_dict ---------------------------------------------------------------

# Optimisers whose state_dict() carries the entries as tensors.
_packing: weakref.WeakSet[Optimizer] = weakref.WeakSet()
# load_state_dict() gives tensors the parameter's dtype; these digits are exact in all of them.
_DIGITS, _BASE = 4, 256


def _as_tensor(numbers: tuple[int, ...]) -> torch.Tensor:  # (k, 4)
    digits = [[number // _BASE**place % _BASE for place in range(_DIGITS)] for number in numbers]
    return torch.tensor(digits, dtype=torch.int64, device="cpu").view(-1, _DIGITS)


def _as_tuple(digits: torch.Tensor) -> tuple[int, ...]:
    return tuple(sum(int(digit) * _BASE**place for place, digit in enumerate(row)) for row in digits.tolist())


def _pack(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Hook of ``state_dict()``: the entries as tensors, since torch.distributed.checkpoint takes no tuples."""
    state_dict["state"] = {
        key: _packed(state) if isinstance(state, dict) and CHANNELS in state else state
        for key, state in state_dict["state"].items()
    }


def _packed(state: State) -> State:
    device = next((state[name].device for name in _row_shaped(state)), None)
    tensors = {
        name: _as_tensor(state[name]).to(device)
        for name in (CHANNELS, ENTERED)
        if isinstance(state.get(name), tuple)
    }
    return {**state, **tensors}


def _unpack(state: State) -> None:
    """Undo ``_pack`` after a ``load_state_dict()``."""
    for name in (CHANNELS, ENTERED):
        if isinstance(state.get(name), torch.Tensor):
            state[name] = _as_tuple(state[name])


# -- state follows its channels --------------------------------------------------------------------

# Optimiser -> parameter id -> selection, for classes without a rule: LBFGS keeps the history of all its
# parameters under the first one.
_seen: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def _group_of(optimizer: Optimizer, parameter: torch.Tensor) -> Group | None:
    for group in optimizer.param_groups:
        if any(held is parameter for held in group["params"]):
            return group
    return None


def _row_shaped(state: State) -> Iterator[str]:
    return (name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0)


def _holds_more_than_scalars(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() > 0
    return isinstance(value, list) and any(_holds_more_than_scalars(item) for item in value)


def _refusal(optimizer: Optimizer, layer: Layer) -> str | None:
    """Why the state of a layer's rows cannot be rearranged, or None."""
    state, rule = optimizer.state.get(layer.channel_weight, {}), _rule_of(optimizer)
    _unpack(state)
    name = type(optimizer).__name__
    advice = f"make a new {name} after select()"
    if rule is None:
        states = [state] if state else list(optimizer.state.values())
        if any(_holds_more_than_scalars(value) for one in states for value in one.values()):
            known = ", ".join(cls.__name__ for cls in RULES)
            return (
                f"optimizer: got {name}, whose state cannot follow a change of channels, expected one of "
                f"{known}; {advice}"
            )
        return None
    unknown = [entry for entry in _row_shaped(state) if entry not in rule.initial]
    if unknown:
        return (
            f"optimizer: got a {name} with the entry {unknown[0]!r}, expected only "
            f"{', '.join(rule.initial)}; {advice}"
        )
    return None


def check(optimizer: Optimizer, layer: Layer) -> None:
    """Raise if the state that ``optimizer`` keeps for the layer's rows could not follow a ``select()``.

    Raises:
        NotImplementedError: it could not; the message says which classes could.
    """
    reason = _refusal(optimizer, layer)
    if reason:
        raise NotImplementedError(reason)


def rearrange(optimizer: Optimizer, layer: Layer) -> None:
    """Make the state of the layer's rows that of the channels selected now.

    Rows of channels that stay carry their state; rows of channels that enter have a fresh optimiser's.

    Raises:
        NotImplementedError: the optimiser keeps state that cannot be rearranged.
    """
    rows, selection, rule = layer.channel_weight, layer.selection, _rule_of(optimizer)
    group = _group_of(optimizer, rows)
    state = optimizer.state.get(rows, {})
    _unpack(state)
    if rule is None:
        owners = state.get(CHANNELS, _seen.get(optimizer, {}).get(id(rows), selection))
        if owners != selection:
            check(optimizer, layer)
        return
    # Without the entry the optimiser has never stepped these rows: Adagrad fills its state when made.
    owners = state.get(CHANNELS, ())
    if not state or group is None or owners is selection or owners == selection:
        return
    check(optimizer, layer)
    old = {channel: row for row, channel in enumerate(owners)}
    staying = [(row, old[channel]) for row, channel in enumerate(selection) if channel in old]
    step = int(state["step"]) if rule.update is not None and staying else 0
    entered = state.get(ENTERED) or (0,) * len(owners)
    target, source = (
        to_device(torch.tensor(positions, dtype=torch.int64), rows.device)
        for positions in ([to for to, _ in staying], [origin for _, origin in staying])
    )
    for name in _row_shaped(state):
        fresh = torch.full_like(rows, rule.initial[name](group), dtype=state[name].dtype)
        if staying:
            fresh.index_copy_(0, target, state[name].index_select(0, source))
        if fresh.shape == state[name].shape:
            state[name].copy_(fresh)
        else:
            state[name] = fresh
    if rule.update is not None:
        state[ENTERED] = ()
    if not staying:
        for name, value in rule.scalars.items():
            if name in state:
                state[name].fill_(value)
    elif rule.update is not None:
        ages = [step] * len(selection)
        for row, origin in staying:
            ages[row] = entered[origin]
        if any(ages):
            state[ENTERED] = tuple(ages)
    state[CHANNELS] = selection


def _correct_young(optimizer: Optimizer, layer: Layer, group: Group, state: State) -> None:
    """Give rows younger than the shared step count the step that a fresh optimiser would have taken."""
    rule, rows = _rule_of(optimizer), layer.channel_weight
    if rule is None or rule.update is None or rule.remaining is None:
        return
    # There from the first step on: what loads a flat state_dict looks for the entries that it finds here.
    entered: tuple[int, ...] = state.setdefault(ENTERED, ())
    found_inf = getattr(optimizer, "found_inf", None)  # a fused step under GradScaler, skipped on overflow
    if not entered:
        return
    if found_inf is not None and float(found_inf):
        return
    step, eps = int(state["step"]), torch.finfo(rows.dtype).eps
    entered = tuple(
        start if start and rule.remaining(group, step - start) > eps / 8 else 0 for start in entered
    )
    young = [row for row, start in enumerate(entered) if start]
    if not young:
        state[ENTERED] = ()
        return
    state[ENTERED] = entered
    if step <= min(entered[row] for row in young):
        return
    assert rows.grad is not None
    index = to_device(torch.tensor(young, dtype=torch.int64), rows.device)
    compute = torch.promote_types(rows.dtype, torch.float32)

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, index).to(compute)

    updated = rule.update(
        _Young(
            # the optimiser changed the rows only: the weight still has the values before the step
            before=layer.read_rows(layer.weight.detach(), layer.channels.index_select(0, index)).to(compute),
            grad=pick(rows.grad),
            state={name: pick(state[name]) for name in _row_shaped(state)},
            group=group,
            ages=[step - entered[row] for row in young],
        )
    )
    rows.index_copy_(0, index, updated.to(rows.dtype))


# -- the hooks -------------------------------------------------------------------------------------


def _held(optimizer: Optimizer) -> Iterator[tuple[Group, Layer]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = layer_of(parameter)
            if layer is not None:
                yield group, layer


@torch._disable_dynamo
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, layer in _held(optimizer):
        layer.synchronize()
        rearrange(optimizer, layer)


@torch._disable_dynamo
@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    packs = optimizer in _packing
    for group, layer in _held(optimizer):
        rows = layer.channel_weight
        _stepped.add(layer)
        if rows.grad is None:
            continue
        state = optimizer.state.get(rows, {})
        if state:
            state[CHANNELS] = layer.selection
            if not packs:
                optimizer.register_state_dict_post_hook(_pack)
                _packing.add(optimizer)
                packs = True
            _correct_young(optimizer, layer, group, state)
        if _rule_of(optimizer) is None:
            _seen.setdefault(optimizer, {})[id(rows)] = layer.selection
        layer.push_rows()
    _warn_of_forgotten(optimizer)


# Layers that some optimiser has held at a step, and layers warned of.
_stepped: weakref.WeakSet[Any] = weakref.WeakSet()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()
# Optimiser -> layers that had a gradient at a step of it and were held by none yet: another one may step after it.
_suspects: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
# Optimiser -> layers that share no module with its parameters.
_strangers: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def _warn_of_forgotten(optimizer: Optimizer) -> None:
    """Warn once of layers that have a gradient which no optimiser has ever used.

    The rule: a layer with selected channels and a gradient, held by no optimiser that has stepped so far, at the
    second such step of this optimiser, in a module that also has a parameter which this optimiser holds.
    """
    idle = [
        layer
        for layer in list(_layers.values())
        if layer.channel_weight.grad is not None
        and len(layer.channels)
        and layer not in _stepped
        and layer not in _warned
        and layer not in _strangers.get(optimizer, ())
    ]
    if not idle:
        return
    suspects = _suspects.setdefault(optimizer, weakref.WeakSet())
    forgotten = [layer for layer in idle if layer in suspects]
    suspects.update(idle)
    if not forgotten:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    together: set[int] = set()
    # Modules do not know their parents; this search runs once for a layer and an optimiser.
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module) and "_parameters" in vars(module):
            parameters = {id(parameter) for parameter in module.parameters()}
            if not held.isdisjoint(parameters):
                together |= parameters
    strangers = _strangers.setdefault(optimizer, weakref.WeakSet())
    for layer in forgotten:
        (_warned if id(layer.channel_weight) in together else strangers).add(layer)
    count = sum(layer in _warned for layer in forgotten)
    if count:
        warnings.warn(
            f"{type(optimizer).__name__} steps without {count} selected channel_weight that has a gradient: "
            "give the optimiser trainable_parameters(model), which includes layers with no channel selected "
            "yet",
            stacklevel=7,  # the caller of optimizer.step()
        )


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
