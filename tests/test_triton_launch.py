"""``launch``: when a Triton kernel goes through Triton's own way to a launch, and when to the compiled variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trady_kernels.ops import triton_launch


class Compiled:
    """Stands in for what Triton returns of a launch: it launches again, with every argument by position."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """Stands in for a function under ``triton.jit``."""

    arg_names = ("x", "y", "count", "BLOCK", "PRECISION")
    constexprs = (3, 4)

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "_variants", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def launch(kernel: Kernel, x: Any, count: int = 5, block: int = 64) -> None:
    triton_launch.launch(kernel, (3, 2), x, None, count, PRECISION="ieee", BLOCK=block, num_warps=4)


def test_a_second_launch_takes_the_compiled_variant(kernel: Kernel) -> None:
    x = torch.zeros(64)
    launch(kernel, x)
    launch(kernel, x, count=7)
    launch(kernel, torch.ones(64), count=16)
    (compiled,) = kernel.compiled
    # Every argument in the kernel's order, whatever that of the call's constants.
    assert [of[:1] + of[2:] for of in compiled.launches] == [
        ((3, 2, 1), None, count, 64, "ieee") for count in (7, 16)
    ]


def test_what_is_compiled_anew(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    launch(kernel, x)
    for number, change in enumerate(
        (
            lambda: launch(kernel, x.bfloat16()),
            lambda: launch(kernel, x[1:]),  # not aligned
            lambda: launch(kernel, x, count=2**31),
            lambda: launch(kernel, x, block=32),
            lambda: launch(kernel, None),
            lambda: monkeypatch.setattr(torch.cuda, "current_device", lambda: 1) or launch(kernel, x),
        ),
        start=2,
    ):
        change()
        assert len(kernel.compiled) == number
        change()
        assert len(kernel.compiled) == number


def test_a_constant_by_position_would_not_be_told_from_another(kernel: Kernel) -> None:
    with pytest.raises(TypeError, match="BLOCK: expected by name, it is a constant"):
        triton_launch.launch(kernel, (1,), None, None, 5, 64, PRECISION="ieee")


def test_a_plan_is_made_once_for_tensors_that_lie_alike() -> None:
    made = []

    @triton_launch.remembered
    def plan(x: torch.Tensor, rows: int) -> int:
        made.append(rows)
        return len(made)

    x = torch.zeros(4, 8)
    assert [plan(x, 3), plan(torch.ones(4, 8), 3), plan(x, 4)] == [1, 1, 2]
    others = (x.t(), x.half(), torch.zeros(33)[1:].view(4, 8), x[:, :4], torch.zeros(8, 4))
    assert [plan(other, 3) for other in others] == [3, 4, 5, 6, 7]


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MOST_PLANS", 3)
    made = []
    plan = triton_launch.remembered(lambda rows: made.append(rows) or rows)
    assert [plan(rows) for rows in (1, 2, 3, 1, 4, 4, 1)] == [1, 2, 3, 1, 4, 4, 1]
    assert made == [1, 2, 3, 4, 1]
