"""What a graph proves, and above all what it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import pytest
import torch
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.convert.example_run import all_calls, example_calls
from trady_kernels.convert.graph import Flow, trace_flow


class Net(nn.Module):
    """Two convolutions, a norm and an activation; the forward is the case's."""

    def __init__(self, forward: Callable[[Net, torch.Tensor], object]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()
        self.same = nn.Identity()
        self.body = forward

    def forward(self, x: torch.Tensor) -> object:
        return self.body(self, x)


def flow_of(model: nn.Module, example: Example | None = None) -> Flow:
    names = {module: name for name, module in model.named_modules()}
    calls = all_calls(names) if example is None else example_calls(model, names, example)
    fresh = {m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    return trace_flow(model, leaves=set(), fresh=fresh, calls=calls.counts, others=calls.others)


@dataclass(frozen=True)
class Case:
    name: str
    forward: Callable[[Net, torch.Tensor], object]
    feeds: bool  # conv's output goes to the norm and nowhere else
    overwrites: bool  # nobody but the activation needs its input

    def __str__(self) -> str:
        return self.name


def by_mode(net: Net, x: torch.Tensor) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) if net.training else net.act(net.norm(y)) + y


def added_in_place(net: Net, x: torch.Tensor) -> object:
    y = net.norm(net.conv(x))
    y += x
    return net.act(y)


def added_in_place_to_what_is_used(net: Net, x: torch.Tensor) -> object:
    y = net.norm(net.conv(x))
    z = y
    z += x
    return net.act(z) * y


CASES = (
    Case("chain", lambda n, x: n.act(n.norm(n.conv(x))), True, True),
    Case("keyword", lambda n, x: n.act(input=n.norm(input=n.conv(x))), True, True),
    Case("twice in a row", lambda n, x: n.act(n.norm(n.conv(n.act(n.norm(n.conv(x)))))), True, True),
    Case("output used beside the norm", lambda n, x: (y := n.conv(x), n.act(n.norm(y)) + y)[1], False, True),
    Case("output returned too", lambda n, x: (y := n.conv(x), (n.act(n.norm(y)), y))[1], False, True),
    Case("norm of two", lambda n, x: n.act(n.norm(n.conv(x))) + n.norm(n.other(x)), False, True),
    Case("conv twice, once without", lambda n, x: n.act(n.norm(n.conv(x))) + n.conv(x), False, True),
    Case("function between", lambda n, x: n.act(n.norm(n.conv(x).abs())), False, True),
    Case("the norm's output is used", lambda n, x: (y := n.norm(n.conv(x)), n.act(y) + y)[1], True, False),
    Case("acts on the input", lambda n, x: n.norm(n.conv(n.act(x))), True, False),
    Case("acts on what exp keeps", lambda n, x: n.act(n.norm(n.conv(x)).exp()), True, False),
    Case("acts on a view", lambda n, x: n.act(n.norm(n.conv(x)).flatten(1)), True, False),
    Case("once of two", lambda n, x: n.act(n.act(n.norm(n.conv(x)))), True, False),
    Case("after an addition", lambda n, x: n.act(n.norm(n.conv(x)) + x), True, True),
    Case("after an addition to the input", lambda n, x: n.act(x + n.norm(n.conv(x))), True, False),
    Case("after torch.add", lambda n, x: n.act(torch.add(x, n.norm(n.conv(x)))), True, True),
    Case("after an addition in place", added_in_place, True, True),
    Case("after an addition to what is used", added_in_place_to_what_is_used, True, False),
    Case("through an identity", lambda n, x: n.act(n.same(n.norm(n.conv(x)))), True, True),
    Case(
        "through an identity that is used", lambda n, x: (y := n.norm(n.conv(x)), n.act(n.same(y)) + y)[1], True, False
    ),
    Case("only in training", by_mode, False, True),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_graph_proves(case: Case) -> None:
    net = Net(case.forward)
    flow = flow_of(net)
    assert flow.feeds_only(net.conv, net.norm) == case.feeds
    assert (flow.user_of(net.conv) is net.norm) == case.feeds
    assert flow.may_overwrite(net.act) == case.overwrites
    assert not flow.feeds_only(net.norm, net.conv) and flow.user_of(net.other) is not net.act


class Untraceable(nn.Module):
    """Control flow on values around a block that can be traced."""

    def __init__(self, reaches_in: bool) -> None:
        super().__init__()
        self.block = Net(lambda n, x: n.act(n.norm(n.conv(x))))
        self.reaches_in = reaches_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            return x
        y = self.block(x)
        return y + self.block.conv(x) if self.reaches_in else y


@pytest.mark.parametrize("reaches_in", [False, True])
def test_parts_are_proven_by_an_example_alone(reaches_in: bool) -> None:
    net = Untraceable(reaches_in)
    block = net.block
    assert not flow_of(net).feeds_only(block.conv, block.norm)
    flow = flow_of(net, torch.randn(1, 4, 3, 3))
    assert flow.feeds_only(block.conv, block.norm) == (not reaches_in)
    assert flow.may_overwrite(block.act)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.conv(x)
        return self.norm(self.last)


def test_tracing_leaves_no_trace() -> None:
    net = Remembers().train()
    net.norm.eval()
    before = {module: dict(module.__dict__) for module in net.modules()}
    assert not flow_of(net).feeds_only(net.conv, net.norm)  # the attribute is one more place it goes to
    assert {module: dict(module.__dict__) for module in net.modules()} == before


# -- arguments that are no tensors -----------------------------------------------------------------


def skip_by_default(net: Net, x: torch.Tensor, skip: torch.Tensor | None = None) -> object:
    y = net.conv(x)
    if skip is None:
        skip = y
    return net.act(net.norm(y)) + skip


def skip_if_given(net: Net, x: torch.Tensor, skip: torch.Tensor | None = None) -> object:
    y = net.act(net.norm(net.conv(x)))
    return y if skip is None else y + skip


def skip_without_default(net: Net, x: torch.Tensor, skip: torch.Tensor | None) -> object:
    return skip_by_default(net, x, skip)


def overwritten_by_default(net: Net, x: torch.Tensor, context: torch.Tensor | None = None) -> object:
    y = net.norm(net.conv(x))
    if context is None:
        context = y
    return net.act(y) + context


def only_without_both(net: Net, x: torch.Tensor, one: object = None, other: object = None) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if one is None and other is None else 0)


def either_bool(net: Net, x: torch.Tensor, plain: bool = True) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if plain is False else 0)


def by_number(net: Net, x: torch.Tensor, *, scale: int | None = 1) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if scale is None else 0)


def by_further(net: Net, x: torch.Tensor, *further: object, **named: object) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if named.get("skip") is None else 0)


def asks_a_tensor(net: Net, x: object) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if isinstance(x, torch.Tensor) else 0)


def asks_something_else(net: Net, x: object) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (0 if isinstance(x, torch.Tensor) else y)


def asks_in_other_words(net: Net, x: object) -> object:
    y = net.conv(x)
    z = net.act(net.norm(y))
    if isinstance(x, int | torch.Tensor) and isinstance(x, (float, (torch.Tensor,))):
        return z + y if isinstance(x, Optional[torch.Tensor]) else z  # noqa: UP045
    return z


def makes_a_tensor(net: Net, x: torch.Tensor) -> object:
    """C++ looks at the size itself, and must not take it for a tensor."""
    return net.act(net.norm(net.conv(x))) + torch.arange(x.shape[3]) if torch.is_tensor(x) else net.conv(x)


def asks_of_an_output(net: Net, x: torch.Tensor) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if torch.is_tensor(y) else 0)


def asks_of_an_attribute(net: Net, x: torch.Tensor) -> object:
    y = net.conv(x)
    return net.act(net.norm(y)) + (y if isinstance(x.mT, torch.Tensor) else 0)


def asks_a_tensor_first(net: Net, x: object) -> object:
    return net.act(net.norm(net.conv(x))) if isinstance(x, torch.Tensor) else x


def asks_for_a_parameter(net: Net, x: object) -> object:
    y = net.conv(x)
    return y if isinstance(y, nn.Parameter) else net.act(net.norm(y))


def too_many(
    net: Net, x: torch.Tensor, a: object = None, b: object = None, c: object = None, d: object = None, e: object = None
) -> object:  # fmt: skip
    return net.act(net.norm(net.conv(x)))


@dataclass(frozen=True)
class Arguments:
    forward: Callable[..., object]
    feeds: bool
    overwrites: bool
    given: tuple[object, ...] = ()

    def __str__(self) -> str:
        return self.forward.__name__


ARGUMENTS = (
    Arguments(skip_by_default, False, True),
    Arguments(skip_if_given, True, True),
    Arguments(skip_without_default, False, True, (None,)),
    Arguments(overwritten_by_default, True, False),
    Arguments(only_without_both, False, True),
    Arguments(either_bool, False, True),
    Arguments(by_number, False, True),
    Arguments(by_further, False, True),
    Arguments(asks_a_tensor, False, True),
    Arguments(asks_something_else, False, True),
    Arguments(asks_in_other_words, False, True),
    Arguments(makes_a_tensor, False, False),
    Arguments(asks_of_an_output, False, True),
    Arguments(asks_of_an_attribute, False, True),
    Arguments(asks_a_tensor_first, False, False),
    Arguments(asks_for_a_parameter, True, True),
    Arguments(too_many, False, False),
)


@pytest.mark.parametrize("inside", [False, True], ids=["root", "part"])
@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_what_holds_without_a_tensor_too(case: Arguments, inside: bool) -> None:
    class Takes(Net):
        forward = case.forward

    net = Takes(lambda n, x: x)
    if not inside:
        flow = flow_of(net)
    else:
        outer = Untraceable(reaches_in=False)
        outer.block, given = net, case.given
        net.register_forward_pre_hook(lambda module, args: (*args, *given))
        flow = flow_of(outer, torch.randn(1, 4, 3, 3))
    assert flow.feeds_only(net.conv, net.norm) == case.feeds
    assert flow.may_overwrite(net.act) == case.overwrites


class AsksOfATuple(Net):
    def forward(self, x: torch.Tensor, further: object) -> object:
        y = self.conv(x)
        return self.act(self.norm(y)) + (y if isinstance(further, tuple) else 0)


@pytest.mark.parametrize("inside", [False, True], ids=["root", "part"])
def test_nothing_holds_of_what_gets_a_tuple_of_tensors(inside: bool) -> None:
    """No proxy stands for a tuple: the graph shows what happens without one."""
    net, x, further = AsksOfATuple(lambda n, x: x), torch.randn(1, 4, 3, 3), (torch.ones(1),)
    if not inside:
        flow = flow_of(net, (x, further))
    else:
        outer = Untraceable(reaches_in=False)
        outer.block = net
        net.register_forward_pre_hook(lambda module, args: (*args, further))
        flow = flow_of(outer, x)
    assert not flow.feeds_only(net.conv, net.norm)
    assert not flow.may_overwrite(net.act)
