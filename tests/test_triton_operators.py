"""What holds for every operator with a Triton kernel: opcheck of the one that graphs call, and that graphs do call it."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_operators import SAMPLES

from trady_kernels.ops import backend
from trady_kernels.ops.backend import OPERATORS, TRITON_INSTALLED, TRITON_LIBRARY

NAMES = [name for name, operator in OPERATORS.items() if "triton" in operator.kernels]

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed: pip install triton")


def moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The operator's arguments on another device, in the dtypes that Triton's sums take."""
    return tuple(
        copy.deepcopy(argument).to(device) if isinstance(argument, torch.Tensor) else argument
        for argument in arguments
    )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, triton_device: str) -> None:
    overload = getattr(torch.ops.trady_triton, name).default
    for arguments in SAMPLES[name]:
        torch.library.opcheck(overload, moved(arguments, triton_device))


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_reference(name: str, triton_device: str) -> None:
    """On the samples of all operators; what is written in place, and the strides, too."""
    operator = OPERATORS[name]
    for sample in SAMPLES[name]:
        expected_arguments, arguments = moved(sample, triton_device), moved(sample, triton_device)
        expected = operator.kernels["reference"](*expected_arguments)
        with backend("triton"):
            found = operator(*arguments)
        torch.testing.assert_close(found, expected)
        for argument, expected_argument in zip(arguments, expected_arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                torch.testing.assert_close(argument, expected_argument)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_calls_it(name: str, triton_device: str) -> None:
    """As an operator of its own: dynamo must not trace into a launch."""
    arguments = moved(SAMPLES[name][0], triton_device)
    called: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with backend("triton"):
        torch.compile(OPERATORS[name].call, backend=note, fullgraph=True)(*arguments)
    assert f"trady_triton.{name}.default" in called
    torch._dynamo.reset()


def test_the_library_has_the_schemas_of_the_operators() -> None:
    assert TRITON_LIBRARY.ns == "trady_triton"
    for name in NAMES:
        ours, theirs = (getattr(getattr(torch.ops, ns), name).default for ns in ("trady", "trady_triton"))
        assert str(ours._schema).partition("::")[2] == str(theirs._schema).partition("::")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_without_a_gpu_and_interpreter_it_is_refused() -> None:
    code = (
        "from trady_kernels.ops import available, backend\n"
        "try:\n    with backend('triton'): pass\nexcept RuntimeError as error: print(error)\n"
        "import sys; print('triton' in sys.modules)"
    )
    environment = {"PATH": "/usr/bin:/bin", "TRADY_CHOICE": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    refused, imported = done.stdout.splitlines()
    assert refused == (
        "backend 'triton' cannot run here: torch.cuda.is_available() is False: TRITON_INTERPRET=1 in the environment "
        "runs its kernels without a GPU"
    )
    assert imported == "False", "importing the package does not import Triton"
