"""The torch.fx graphs of a module, one for each kind of arguments and answers that its forward may meet."""

from __future__ import annotations

import builtins
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import fx, nn

#: By module and name of an argument, the classes of what an example gives for it besides tensors: None, and what holds
#: tensors.
Others = Mapping[nn.Module, Mapping[str, Set[type]]]

#: Of a forward with more combinations of arguments than this, nothing is proven.
_MOST_COMBINATIONS = 16


class _Tracer(fx.Tracer):
    """Traces a forward whose ``arguments``, by name, are these values; all others are tensors.

    Args:
        leaves: modules that stay one node although they have children.
        arguments: values, by the name of the argument.
        tensors: what ``isinstance(value, torch.Tensor)`` is of everything that the graph stands for, tensors and sizes alike.

    Attributes:
        asked: whether the forward has asked that.
    """

    def __init__(self, leaves: Set[nn.Module], arguments: Mapping[str, object], tensors: bool) -> None:
        super().__init__()
        self._leaves = leaves
        self._arguments = arguments
        self._tensors = tensors
        self.asked = False

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self._leaves or next(module.children(), None) is None

    def create_arg(self, a: Any) -> Any:
        # fx would ask whether it is a tensor, and take it for a constant.
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        # Not fx's concrete_args: those know neither *args nor **kwargs, and take a dict apart.
        names = inspect.unwrap(root_fn).__code__.co_varnames
        return function, [self._arguments.get(name, arg) for name, arg in zip(names, args, strict=False)]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Say what proxies are, while a forward is traced.

        Not by a ``__class__`` of theirs: C++ would believe it, and read a tensor where there is none.
        """
        is_instance = builtins.isinstance

        def answer(value: object, kinds: Any) -> bool:
            if not issubclass(type(value), fx.Proxy):
                return is_instance(value, kinds)
            known = _flat(kinds)
            # A subclass, such as nn.Parameter, would look at flags of a tensor.
            others = tuple(kind for kind in known if not issubclass(kind, torch.Tensor))
            if torch.Tensor in known:
                self.asked = True
                if self._tensors:
                    return True
            return is_instance(value, others)

        builtins.isinstance = answer  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.isinstance = is_instance


def _flat(kinds: Any) -> list[type]:
    """The classes in the second argument of ``isinstance``: one, a union of them, or nested tuples."""
    members = kinds if type(kinds) is tuple else get_args(kinds) or None
    return [kinds] if members is None else [kind for member in members for kind in _flat(member)]


def _combinations(module: nn.Module, others: Mapping[str, Set[type]]) -> Iterator[dict[str, object]]:
    """What a caller may give a module's forward, as far as a graph tells it from tensors; all tensors come first.

    To a trace every argument is there: ``if skip is None`` would take the branch that no call without one takes.

    Raises:
        ValueError: there are too many, or the example gives tensors inside of something, which no proxy stands for.
    """
    _, *parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    values = {p.name: _values_besides_tensors(p, others.get(p.name, set())) for p in parameters}
    if math.prod(len(besides) + 1 for besides in values.values()) > _MOST_COMBINATIONS:
        raise ValueError(f"{type(module).__name__}: too many combinations of arguments")
    choices = ([{}, *({name: other} for other in besides)] for name, besides in values.items())
    for chosen in itertools.product(*choices):
        yield {name: value for choice in chosen for name, value in choice.items()}


def _values_besides_tensors(parameter: inspect.Parameter, others: Set[type]) -> list[object]:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return [()]
    if parameter.kind is parameter.VAR_KEYWORD:
        return [{}]
    may_be_none = type(None) in others
    if len(others) > may_be_none:
        raise ValueError(f"{parameter.name}: tensors inside of {others}")
    default = parameter.default
    if isinstance(default, bool):
        return [True, False]
    values = [] if default is parameter.empty or isinstance(default, torch.Tensor) else [default]
    annotation = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
    may_be_none |= "None" in annotation or "Optional" in annotation
    if default is not None and may_be_none:
        values.append(None)
    return values


def graphs_of(
    module: nn.Module, leaves: Set[nn.Module], others: Mapping[str, Set[type]]
) -> Iterator[fx.Graph]:
    """Trace a forward with tensors for all of its arguments, and with what else they may be.

    A forward that asks whether a value is a tensor has two graphs: as if everything were one, and as if nothing were.

    Args:
        module: whose forward it is.
        leaves: modules that stay one node although they have children.
        others: what an example gives the module besides tensors.

    Raises:
        Exception: it cannot be traced; whatever the forward raises.
    """
    for arguments in _combinations(module, others):
        for tensors in (True, False):
            tracer = _Tracer(leaves, arguments, tensors)
            with tracer.answering():
                graph = tracer.trace(module)
            yield graph
            if not tracer.asked:
                break
