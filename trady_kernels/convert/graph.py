"""What a torch.fx graph proves about where the outputs of modules go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from trady_kernels.convert.tracer import Others, graphs_of

#: Functions and methods whose result is a new tensor that their backward does not need.
_ADDITIONS = (torch.add, "add")
#: ``y += x`` writes into y, and fx shows it as ``y + x``.
_IN_PLACE_ADDITIONS = (operator.add, operator.iadd, "add_")


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
        for graph in graphs_of(module, leaves, others.get(module, {})):
            graphs.append(_sites(graph, module, fresh))
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
