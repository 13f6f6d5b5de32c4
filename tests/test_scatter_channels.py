from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import CONV_CASES, FLOATING, LINEAR_CASES, ConvCase, LinearCase, laid_out
from interpreted import on
from test_large_offsets import spread

from trady_kernels.ops import backend, last_kernel, scatter_channels_
from trady_kernels.ops.backend import TRITON_INSTALLED, unavailable

LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last slice", "transposed")


@dataclass(frozen=True)
class Kernel:
    """A backend, and the device of the tensors it takes."""

    name: str
    device: str


@pytest.fixture(params=("reference", "cpp", "cuda", "triton"))
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every kernel of the operator, forced."""
    name = request.param
    if name == "triton" and not TRITON_INSTALLED:
        pytest.skip("triton is not installed: pip install triton")
    device = request.getfixturevalue(f"{name}_device") if name in ("cuda", "triton") else "cpu"
    if unavailable(name) is not None:
        pytest.skip(unavailable(name))
    with backend(name):
        yield Kernel(name, device)
    assert last_kernel("scatter_channels_") == name


def written(weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor, groups: int) -> torch.Tensor:
    """What the weight is afterwards, channel by channel."""
    result = weight.clone()
    per_group, outputs = weight.shape[1], weight.shape[0] // groups
    for row, channel in zip(rows, channels.tolist(), strict=True):
        group, position = divmod(channel, per_group)
        result[group * outputs : (group + 1) * outputs, position] = row
    return result


def check(
    kernel: Kernel, weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor, groups: int = 1
) -> None:
    """Bit for bit, with nothing else of the weight's memory touched, and its version counted up."""
    expected = written(weight, channels, rows, groups)
    target = on(kernel.device, weight)
    memory = target.as_strided((target.untyped_storage().nbytes() // target.element_size(),), (1,), 0)
    outside = memory.clone()
    version, address = target._version, target.data_ptr()
    assert scatter_channels_(target, channels.to(kernel.device), on(kernel.device, rows), groups) is None
    assert torch.equal(target.cpu(), expected) and target.data_ptr() == address
    assert target._version > version
    # The weight's own elements set back, its memory is as it was, NaN too.
    target.copy_(weight)
    assert torch.equal(memory.view(torch.uint8), outside.view(torch.uint8))


def weight_of(case: ConvCase, dtype: torch.dtype) -> torch.Tensor:
    shape = (case.out_channels, case.in_channels // case.groups, *case.kernel_size)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def rows_of(weight: torch.Tensor, selected: int, groups: int) -> torch.Tensor:
    shape = (selected, weight.shape[0] // groups, *weight.shape[2:])
    return torch.randn(shape, dtype=torch.float64).to(weight.dtype)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolutions(case: ConvCase, kernel: Kernel) -> None:
    channels = torch.randperm(case.in_channels)[: case.selected]
    for i, layout in enumerate(LAYOUTS):
        weight = weight_of(case, FLOATING[i % len(FLOATING)])
        rows = rows_of(weight, case.selected, case.groups)
        check(kernel, laid_out(weight, layout), channels, rows, case.groups)
    if case.selected:
        check(kernel, weight, channels, laid_out(rows, "channels_last slice"), case.groups)
        check(kernel, weight, channels, laid_out(rows, "transposed"), case.groups)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linears(case: LinearCase, kernel: Kernel) -> None:
    for dtype in FLOATING:
        weight = torch.randn(case.out_features, case.in_features).to(dtype)
        for selected in (*case.selected, case.in_features):
            channels = torch.randperm(case.in_features)[:selected]
            rows = rows_of(weight, selected, 1)
            for layout in ("contiguous", "slice", "transposed"):
                check(kernel, laid_out(weight, layout), channels, rows)
            if selected:
                check(kernel, weight, channels, laid_out(rows, "transposed"))


@pytest.mark.parametrize("groups", (1, 2, 8))
def test_none_and_all_channels(groups: int, kernel: Kernel) -> None:
    weight = torch.randn(16, 8 // groups, 3, 2)
    check(kernel, weight, torch.arange(0), rows_of(weight, 0, groups), groups)
    check(kernel, weight, torch.arange(8), rows_of(weight, 8, groups), groups)
    channels = torch.arange(8).flip(0)[::2]
    assert not channels.is_contiguous()
    check(kernel, weight, channels, rows_of(weight, 4, groups), groups)


@pytest.mark.parametrize("dtype", (torch.complex128, torch.complex64, torch.int8, torch.bool), ids=str)
def test_other_dtypes(dtype: torch.dtype, kernel: Kernel) -> None:
    weight = torch.randn(6, 5, 3, 3).mul(3).to(dtype)
    check(kernel, weight, torch.tensor([4, 1]), torch.randn(2, 6, 3, 3).mul(3).to(dtype))


@pytest.mark.parametrize("groups", (1, 3))
def test_other_ranks(groups: int, kernel: Kernel) -> None:
    """As of nn.Conv1d and nn.Conv3d; and pixels that two, three and no dimensions go through in one order."""
    for shape in ((6, 4, 5), (6, 4, 2, 3, 5), (6, 4, 3, 0)):
        weight = torch.randn(shape)
        rows = rows_of(weight, 3, groups)
        for layout in ("contiguous", "slice", "transposed"):
            check(kernel, laid_out(weight, layout), torch.tensor([0, 3, 2]), rows, groups)
    weight = torch.randn(6, 4, 5, 3, 2).permute(0, 1, 4, 2, 3)
    check(kernel, weight, torch.tensor([0, 3, 2]), rows_of(weight, 3, groups), groups)


def test_values_that_only_their_bits_tell_apart(kernel: Kernel) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(64, 1024)
    weight, rows = torch.zeros(1024, 64, dtype=torch.float16), bits.view(torch.float16)
    target = weight.to(kernel.device)
    scatter_channels_(target, torch.arange(64, device=kernel.device), rows.to(kernel.device))
    assert torch.equal(target.view(torch.int16).cpu(), bits.t())


def test_more_outputs_than_are_written_together(kernel: Kernel) -> None:
    """Of pieces of every length, up to the last."""
    for outputs in range(1, 20):
        weight = torch.randn(outputs, 7)
        check(kernel, weight, torch.tensor([2, 6, 0]), rows_of(weight, 3, 1))


def test_large_enough_for_threads(threads: int) -> None:
    with backend("cpp"):
        for shape, groups in (((700, 100), 1), ((90, 40, 5, 5), 1), ((90, 10, 3, 3), 3)):
            weight = torch.randn(shape)
            selected = weight.shape[1] * groups
            check(
                Kernel("cpp", "cpu"),
                weight,
                torch.randperm(selected),
                rows_of(weight, selected, groups),
                groups,
            )


# Of such a tensor only the CPU's memory may be left untouched.
ON_THE_CPU = ("reference", "cpp", *(() if torch.cuda.is_available() else ("cuda", "triton")))


@pytest.mark.parametrize("kernel", ON_THE_CPU, indirect=True)
@pytest.mark.parametrize("dimension", range(4))
def test_offsets_past_2_to_the_31(dimension: int, kernel: Kernel) -> None:
    for groups in (1, 2):
        dense = torch.randn(6, 4, 3, 2)
        channels, rows = torch.tensor([3, 0]), rows_of(dense, 2, groups)
        weight = spread(dense, dimension)
        scatter_channels_(weight, channels, rows, groups)
        assert torch.equal(weight, written(dense, channels, rows, groups))
        if rows.shape[dimension] > 1:
            scatter_channels_(dense, channels, spread(rows, dimension), groups)
            assert torch.equal(weight, dense)


def test_a_leaf_without_grad_and_an_inference_tensor(kernel: Kernel) -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 5, device=kernel.device))
    channels, rows = torch.tensor([1], device=kernel.device), torch.ones(1, 6, device=kernel.device)
    before = weight._version
    with torch.no_grad():
        scatter_channels_(weight, channels, torch.nn.Parameter(rows))
    assert weight._version > before and weight[:, 1].eq(1).all()
    with torch.inference_mode():
        weight = torch.zeros(6, 5, device=kernel.device)
        scatter_channels_(weight, channels, rows)
        assert weight[:, 1].eq(1).all()


def test_writing_to_what_is_saved_for_backward_is_noticed(kernel: Kernel) -> None:
    weight = torch.ones(6, 5, device=kernel.device)
    x = torch.ones(2, 5, device=kernel.device, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    scatter_channels_(weight, torch.tensor([1], device=kernel.device), torch.ones(1, 6, device=kernel.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_without_memory() -> None:
    weight = torch.empty(6, 5, device="meta")
    scatter_channels_(weight, torch.tensor([1]), torch.empty(1, 6, device="meta"))
    assert weight._version == 1


def test_compiles_without_a_graph_break() -> None:
    weight, channels = torch.randn(6, 2, 3, 3), torch.tensor([1, 4])
    rows = rows_of(weight, 2, 3)
    compiled = torch.compile(scatter_channels_, fullgraph=True, backend="aot_eager")
    target = weight.clone()
    compiled(target, channels, rows, 3)
    assert torch.equal(target, written(weight, channels, rows, 3))


@pytest.mark.parametrize("name", ("cpp", "reference"))
@pytest.mark.parametrize("index", (8, -1, 1 << 40))
@pytest.mark.parametrize("groups", (1, 2))
def test_index_out_of_range(name: str, index: int, groups: int) -> None:
    if (name, index, groups) == ("reference", -1, 2):
        pytest.skip("torch's index_put_ counts negative indices from the end")
    weight = torch.randn(6, 8 // groups, 3, 3)
    before = weight.clone()
    with (
        backend(name),
        pytest.raises(
            IndexError,
            match=rf"channels: got index {index}, expected 0 <= index < 8, the input channels of weight",
        ),
    ):
        scatter_channels_(weight, torch.tensor([0, index]), rows_of(weight, 2, groups), groups)
    if name == "cpp":
        assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ("cpp", "reference"))
def test_bad_arguments(name: str) -> None:
    weight, channels, rows = torch.randn(6, 4, 3, 3), torch.tensor([0, 1]), torch.randn(2, 6, 3, 3)
    with backend(name):
        for bad, groups in (
            (rows[:1], 1),
            (rows[:, :2], 1),
            (rows[..., :2], 1),
            (rows[..., 0], 1),
            (rows, 2),
        ):
            with pytest.raises(
                ValueError,
                match=rf"rows: got shape \({', '.join(map(str, bad.shape))}\) of torch.float32, expected \(2, "
                rf"{6 // groups}, 3, 3\) of torch.float32, a row for each of 2 channels",
            ):
                scatter_channels_(weight, channels, bad, groups)
        with pytest.raises(ValueError, match=r"rows: got shape \(2, 6, 3, 3\) of torch.float64, expected"):
            scatter_channels_(weight, channels, rows.double())
        for groups in (0, -1, 4):
            with pytest.raises(ValueError, match=rf"groups: got {groups}, expected a divisor of 6"):
                scatter_channels_(weight, channels, rows, groups)
        with pytest.raises(ValueError, match="weight: got 1 dimensions, expected at least 2"):
            scatter_channels_(weight[0, 0, 0], channels, rows)
        with pytest.raises(ValueError, match=r"channels: got shape \(2,\) of torch.int32, expected a 1-D"):
            scatter_channels_(weight, channels.int(), rows)
        with pytest.raises(ValueError, match=r"channels: got shape \(2, 1\) of torch.int64"):
            scatter_channels_(weight, channels[:, None], rows)


_OUT_OF_RANGE = """
import sys
import torch
import cuda_on_host
from trady_kernels.ops.backend import OPERATORS

device = "cuda" if torch.cuda.is_available() else "cpu"
operator = OPERATORS["scatter_channels_"]
if device == "cpu":
    assert not isinstance(cuda_on_host.library(), str)
    cuda_on_host.Kernels().__enter__()
weight, rows = torch.zeros(6, 4, device=device), torch.zeros(2, 3, device=device)
operator.kernels["cuda"](weight, torch.tensor([0, int(sys.argv[1])], device=device), rows, 2)
if device == "cuda":
    torch.cuda.synchronize()
print("went on")
"""


@pytest.mark.parametrize("index", (7, 8, -1))
def test_index_out_of_range_ends_in_an_assertion(index: int, cuda_device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_RANGE, str(index)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    if index == 7:  # the last of 2 groups of 4
        assert done.returncode == 0 and "went on" in done.stdout
    else:
        assert done.returncode != 0 and "went on" not in done.stdout
        assert "scatter_channels_: an index in channels is out of range" in done.stderr
