"""What a torch.fx graph proves about where the outputs of modules go."""

from __future__ import annotations

import builtins
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import fx, nn

#: Functions and methods whose result is a new tensor that their backward does not need.
_ADDITIONS = (torch.add, "add")
#: ``y += x`` writes into y, and fx shows it as ``y + x``.
_IN_PLACE_ADDITIONS = (operator.add, operator.iadd, "add_")

#: By module and name of an argument, the classes of what an example gives for it besides tensors: None, and what holds
#: tensors.
Others = Mapping[nn.Module, Mapping[str, Set[type]]]

#: Of a forward with more combinations of arguments than this, nothing is proven.
_MOST_COMBINATIONS = 16


@dataclass(frozen=True)
class _Site:
    """One call of a module in a graph.

    Attributes:
        source: the module whose output it takes, where nothing else uses that output; None otherwise.
        user: the module that takes its output, where nothing else does; None otherwise.
        alone: nothing else holds the storage of its input, and no backward needs it.
    """

    source: nn.Module | None
    user: nn.Module | None
    alone: bool


@dataclass
class Flow:
    """Where module outputs go, as far as graphs could prove it.

    A module that no graph contains has no entry, and nothing is proven about it.
    """

    sites: dict[nn.Module, list[_Site]] = field(default_factory=dict)

    def feeds_only(self, source: nn.Module, user: nn.Module) -> bool:
        """Whether every output of ``source`` goes to ``user`` and nowhere else, and ``user`` sees nothing else."""
        from_source, of_user = self.sites.get(source, []), self.sites.get(user, [])
        return (
            bool(from_source and of_user)
            and all(site.user is user for site in from_source)
            and all(site.source is source for site in of_user)
        )

    def user_of(self, source: nn.Module) -> nn.Module | None:
        """The module that every output of ``source`` goes to, and nothing else does; None if there is none."""
        users = {site.user for site in self.sites.get(source, [])}
        user = users.pop() if len(users) == 1 else None
        return user if user is not None and self.feeds_only(source, user) else None

    def may_overwrite(self, module: nn.Module) -> bool:
        """Whether nobody else ever needs what ``module`` gets as input."""
        sites = self.sites.get(module, [])
        return bool(sites) and all(site.alone for site in sites)


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
    if math.prod(len(others) + 1 for others in values.values()) > _MOST_COMBINATIONS:
        raise ValueError(f"{type(module).__name__}: too many combinations of arguments")
    choices = ([{}, *({name: other} for other in others)] for name, others in values.items())
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


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Attributes as they were: a forward that stores what it sees would leave proxies behind."""
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    try:
        yield
    finally:
        for module, values in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(values)


def trace_flow(
    model: nn.Module,
    *,
    leaves: Set[nn.Module],
    fresh: Set[nn.Module],
    calls: Mapping[nn.Module, int] | None,
    others: Others,
) -> Flow:
    """Trace a network, in training and in evaluation mode, and read off what holds in both.

    A forward is traced with tensors for all of its arguments and with what else they may be: None or another
    default, either bool, nothing for ``*args`` and ``**kwargs``; one that asks whether a value is a tensor, with
    both answers. What holds in all of these graphs is proven. Where the whole cannot be traced, each child is by
    itself. What the graph of a part shows is proven only if nobody reaches into the part from outside, which takes
    the counted calls of an example run.

    Args:
        model: the network; it stays as it is.
        leaves: modules that stay one node although they have children.
        fresh: modules whose output is a new tensor that their backward does not need.
        calls: how often an example run calls each module; None without an example.
        others: what it gives modules besides tensors.
    """
    flows = []
    with _restored(model):
        for training in (True, False):
            for module in model.modules():
                module.training = training
            flow = Flow()
            _trace(model, leaves, fresh, calls, others, flow, is_root=True)
            flows.append(flow.sites)
    return Flow(_in_all(flows))


def _in_all(graphs: Sequence[Mapping[nn.Module, list[_Site]]]) -> dict[nn.Module, list[_Site]]:
    """The sites of the modules that every graph contains, from all graphs."""
    first, *others = graphs
    return {
        module: [site for sites in graphs for site in sites[module]]
        for module in first
        if all(module in sites for sites in others)
    }


def _trace(
    module: nn.Module,
    leaves: Set[nn.Module],
    fresh: Set[nn.Module],
    calls: Mapping[nn.Module, int] | None,
    others: Others,
    flow: Flow,
    is_root: bool,
) -> None:
    graphs: list[dict[nn.Module, list[_Site]]] = []
    try:
        for arguments in _combinations(module, others.get(module, {})):
            graphs += _graphs(module, leaves, fresh, arguments)
    except Exception:  # control flow on values, foreign calls: anything that a forward may do
        if calls is None:
            return
        for child in module.children():
            if child not in leaves and next(child.children(), None) is not None:
                _trace(child, leaves, fresh, calls, others, flow, is_root=False)
        return
    if not is_root:
        assert calls is not None
        graphs = [
            {
                inner: sites
                for inner, sites in found.items()
                if calls.get(inner, 0) == len(sites) * calls.get(module, 0)
            }
            for found in graphs
        ]
    for inner, sites in _in_all(graphs).items():
        flow.sites.setdefault(inner, []).extend(sites)


def _graphs(
    module: nn.Module, leaves: Set[nn.Module], fresh: Set[nn.Module], arguments: Mapping[str, object]
) -> Iterator[dict[nn.Module, list[_Site]]]:
    """The calls in the graph of a module whose forward gets these arguments, and tensors for the others.

    A forward that asks what a value is has two graphs: as if everything were a tensor, and as if nothing were.
    """
    for tensors in (True, False):
        tracer = _Tracer(leaves, arguments, tensors)
        with tracer.answering():
            graph = tracer.trace(module)
        yield _sites(graph, module, fresh)
        if not tracer.asked:
            return


def _sites(graph: fx.Graph, module: nn.Module, fresh: Set[nn.Module]) -> dict[nn.Module, list[_Site]]:
    found: dict[nn.Module, list[_Site]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    _show_attributes(graph, module)
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(modules[node.target], []).append(_site(node, modules, fresh))
    return found


def _show_attributes(graph: fx.Graph, module: nn.Module) -> None:
    """Give every tensor that a forward stored in an attribute one more user: the graph does not show it."""
    stored: list[fx.Node] = []

    def note(value: object) -> None:
        if isinstance(value, fx.Proxy) and value.node.graph is graph:
            stored.append(value.node)

    fx.node.map_aggregate([dict(inner.__dict__) for inner in module.modules()], note)
    for node in stored:
        graph.call_method("stored", (node,))


def _site(node: fx.Node, modules: Mapping[str, nn.Module], fresh: Set[nn.Module]) -> _Site:
    source_node = _input_of(node)
    source = None
    if source_node is not None and len(source_node.users) == 1 and source_node.op == "call_module":
        source = modules[source_node.target]  # type: ignore[index]
    user = None
    if len(node.users) == 1:
        user_node = next(iter(node.users))
        if user_node.op == "call_module" and _input_of(user_node) is node:
            user = modules[user_node.target]  # type: ignore[index]
    return _Site(source, user, source_node is not None and _is_alone(source_node, modules, fresh))


def _input_of(node: fx.Node) -> fx.Node | None:
    """The one tensor a module is called with."""
    given = node.all_input_nodes
    return given[0] if len(given) == 1 and len(node.args) + len(node.kwargs) == 1 else None


def _is_alone(node: fx.Node, modules: Mapping[str, nn.Module], fresh: Set[nn.Module]) -> bool:
    """Whether the tensor of ``node`` has one user, and no other tensor and no backward needs its storage."""
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        module = modules[node.target]  # type: ignore[index]
        if module in fresh:
            return True
        source = _input_of(node)
        return isinstance(module, nn.Identity) and source is not None and _is_alone(source, modules, fresh)
    if node.op not in ("call_function", "call_method"):
        return False
    if _is_one_of(node.target, _ADDITIONS):
        return True
    first: Any = node.args[0] if node.args else None
    return (
        _is_one_of(node.target, _IN_PLACE_ADDITIONS)
        and isinstance(first, fx.Node)
        and _is_alone(first, modules, fresh)
    )


def _is_one_of(target: Callable[..., Any] | str, known: tuple[Callable[..., Any] | str, ...]) -> bool:
    return any(target is entry or (isinstance(entry, str) and target == entry) for entry in known)
