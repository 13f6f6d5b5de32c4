"""What holds for every registered operator: opcheck, the fake, the backends and which kernel ran."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import on
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import trady_kernels
from trady_kernels.functional import relu6
from trady_kernels.ops import available, backend, last_kernel
from trady_kernels.ops.backend import BACKENDS, OPERATORS, by_device_or_fused, unavailable


def _images(*shape: int, channels_last: bool = False) -> torch.Tensor:
    images = torch.randn(shape)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def _offsets(*shape: int, channels_last: bool = False) -> torch.Tensor:
    """Winners of windows of two columns that lie in the input."""
    return (_images(*shape, channels_last=channels_last) > 0).to(torch.uint8)


def _convolution(channels_last: bool = False, groups: int = 1) -> tuple[Any, ...]:
    x = _images(2, 3, 7, 6, channels_last=channels_last)
    dy = _images(2, 8, 4, 3, channels_last=channels_last)
    return (x, dy, torch.tensor([0, 2, 3]), 4, [3, 3, 2, 2, 1, 1, 1, 1], groups)


def _rectified() -> tuple[tuple[Any, ...], ...]:
    return (
        (torch.randn(3, 23), 0.0, None, None),
        (_images(2, 5, 3, 4, channels_last=True), 0.0, 0.5, None),
        (torch.randn(9, 11)[2:, 3:], 0.0, None, 0.1),
        (torch.randn(5, 7, 3).transpose(0, 2).double(), -1.0, 1.0, None),
        (torch.randn(0, 3), 0.0, None, None),
    )


#: Arguments for each operator; a new operator gets a row here.
SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "gather_channels": (
        (_images(2, 5, 3, 4), torch.tensor([1, 3])),
        (_images(2, 5, 3, 4, channels_last=True), torch.tensor([0, 4])),
        (_images(2, 5, 3, 4, channels_last=True), torch.tensor([3])),
        (_images(2, 5, 1, 1, channels_last=True), torch.tensor([3, 4])),
        (_images(2, 1, 3, 4, channels_last=True), torch.tensor([0])),
        (_images(2, 5, 3, 4), torch.arange(0)),
        (torch.randn(6, 5), torch.tensor([2, 3])),
        (torch.randn(2, 5, 3, 4, 2), torch.tensor([2, 3])),
        (_images(2, 5, 3, 4), torch.tensor([1, 3]), torch.bfloat16),
        (_images(2, 5, 3, 4, channels_last=True).half(), torch.tensor([3]), torch.float64),
    ),
    "conv2d_channel_grad": (_convolution(), _convolution(channels_last=True), _convolution(groups=4)),
    "conv2d_channel_grad_squares": (_convolution(), _convolution(channels_last=True), _convolution(groups=4)),
    "conv2d_channel_grad_with_bias": (_convolution(), _convolution(channels_last=True)),
    "conv2d_depthwise_input_grad": (
        (_images(2, 5, 7, 8), _images(5, 1, 3, 3), [7, 8], [1, 1], [1, 1], [1, 1]),
        (_images(2, 5, 4, 4, channels_last=True), _images(5, 1, 3, 2), [9, 10], [2, 2], [0, 0], [1, 2]),
        (_images(0, 5, 7, 8), _images(5, 1, 3, 3), [7, 8], [1, 1], [1, 1], [1, 1]),
    ),
    "linear_channel_grad": (
        (torch.randn(6, 3), torch.randn(6, 5)),
        (torch.randn(2, 3, 30), torch.randn(2, 3, 5)),
        (torch.randn(6, 0), torch.randn(6, 5)),
    ),
    "linear_channel_grad_squares": (
        (torch.randn(6, 3), torch.randn(6, 5)),
        (torch.randn(2, 3, 30), torch.randn(2, 3, 5)),
        (torch.randn(6, 0), torch.randn(6, 5)),
    ),
    "fold_norm": (
        (_images(6, 5, 3, 3), *(torch.rand(6) for _ in range(5)), 1e-5, torch.bfloat16),
        (_images(6, 5, 3, 3, channels_last=True), None, None, None, None, torch.rand(6), 1e-5, torch.float32),
    ),
    "quantize_blocks": (
        (torch.randn(3, 45),),
        (_images(2, 5, 3, 4, channels_last=True).double(),),
        (torch.randn(0),),
    ),
    "dequantize_blocks": (
        (torch.randint(-127, 128, (70,), dtype=torch.int8), torch.rand(2), torch.float32),
        (torch.randint(-127, 128, (64,), dtype=torch.int8), torch.rand(1), torch.bfloat16),
        (torch.empty(0, dtype=torch.int8), torch.empty(0), torch.float64),
    ),
    "rectify": _rectified(),
    "rectify_": _rectified(),
    "scale_by_bits": (
        (torch.randn(3, 23), torch.randint(256, (9,), dtype=torch.uint8), 2.0, None),
        (_images(2, 5, 3, 4, channels_last=True), torch.randint(256, (15,), dtype=torch.uint8), 1.0, 0.1),
        (torch.randn(9, 11)[2:, 3:], torch.randint(256, (7,), dtype=torch.uint8), 2.0, 0.0),
        (torch.randn(0, 3), torch.empty(0, dtype=torch.uint8), 1.0, None),
    ),
    "scatter_channels_": (
        (_images(6, 5, 3, 3), torch.tensor([1, 3]), torch.randn(2, 6, 3, 3), 1),
        (_images(6, 5, 3, 3, channels_last=True), torch.tensor([4, 0]), torch.randn(2, 6, 3, 3), 1),
        (_images(6, 2, 3, 3), torch.tensor([1, 3, 4]), torch.randn(3, 2, 3, 3), 3),
        (torch.randn(6, 5), torch.tensor([4]), torch.randn(1, 6), 1),
        (torch.randn(6, 5), torch.arange(0), torch.randn(0, 6), 1),
    ),
    "shift_channels_": (
        (_images(2, 5, 3, 4), torch.randn(5)),
        (_images(2, 5, 3, 4, channels_last=True).bfloat16(), torch.randn(5)),
        (torch.randn(6, 5), torch.randn(5)),
    ),
    "max_pool2d_offsets": (
        (_images(2, 5, 7, 8), [3, 3], [2, 2], [1, 1], [1, 1], False),
        (_images(2, 5, 7, 8, channels_last=True), [3, 2], [2, 2], [1, 0], [1, 2], True),
        (_images(2, 5, 7, 8)[:, 1:4, 2:], [2, 2], [2, 2], [0, 0], [1, 1], True),
        (_images(0, 5, 7, 8), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ),
    "max_pool2d_offsets_backward": (
        (_images(2, 5, 4, 4), _offsets(2, 5, 4, 4), [9, 9], [3, 3], [2, 2], [0, 0], [1, 1]),
        (
            _images(2, 5, 3, 4),
            _offsets(2, 5, 3, 4, channels_last=True),
            [7, 8],
            [2, 2],
            [2, 2],
            [0, 0],
            [1, 1],
        ),
        (_images(0, 5, 3, 4), _offsets(0, 5, 3, 4), [7, 8], [2, 2], [2, 2], [0, 0], [1, 1]),
    ),
    "pack_bits": (
        (torch.randn(3, 23) > 0,),
        (_images(2, 5, 3, 4, channels_last=True) > 0,),
        ((torch.randn(9, 11) > 0)[2:, 3:],),
        (torch.empty(0, 3, dtype=torch.bool),),
    ),
}


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    if outputs is None:  # an operator that only writes in place
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(OPERATORS)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    for arguments in SAMPLES[name]:
        torch.library.opcheck(OPERATORS[name].overload, arguments)


def _where_it_runs(kernel: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies on the device that a kernel takes, laid out alike."""
    device = "cuda" if kernel in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    return tuple(on(device, a) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_has_the_strides_of_every_kernel(name: str) -> None:
    operator = OPERATORS[name]
    for arguments in SAMPLES[name]:
        with FakeTensorMode() as mode:
            fake = operator.overload(
                *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        for kernel_name, kernel in operator.kernels.items():
            outputs = kernel(*_where_it_runs(kernel_name, arguments))
            for output, expected in zip(_tuple(outputs), _tuple(fake), strict=True):
                assert output.shape == expected.shape and output.dtype == expected.dtype, kernel_name
                assert output.stride() == expected.stride(), kernel_name


@pytest.mark.parametrize("name", SAMPLES)
def test_forced_backend_runs(name: str) -> None:
    operator = OPERATORS[name]
    for arguments in SAMPLES[name]:
        expected_arguments = copy.deepcopy(arguments)
        expected = operator.kernels["reference"](*expected_arguments)
        for kernel in operator.kernels:
            if kernel == "cuda":
                continue
            written = _where_it_runs(kernel, arguments)
            with backend(kernel):
                torch.testing.assert_close(operator(*written), expected, check_device=False)
            for argument, expected_argument in zip(written, expected_arguments, strict=True):
                if isinstance(argument, torch.Tensor):  # also what is written in place
                    torch.testing.assert_close(argument, expected_argument, check_device=False)
            assert last_kernel(name) == kernel


def _events(name: str, arguments: tuple[Any, ...]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        OPERATORS[name](*copy.deepcopy(arguments))
    return {event.key for event in profiler.key_averages()}


def test_reference_stands_in_where_only_a_gpu_has_a_kernel() -> None:
    arguments = SAMPLES["fold_norm"][0]
    for name in ("cpp", "triton", "aten"):
        if unavailable(name):
            continue
        with backend(name):
            torch.testing.assert_close(
                OPERATORS["fold_norm"](*arguments)[0],
                OPERATORS["fold_norm"].kernels["reference"](*arguments)[0],
            )
        assert last_kernel("fold_norm") == "reference"


@pytest.mark.parametrize("name", [name for name in SAMPLES if not OPERATORS[name].stands_in])
def test_compiled_operator_ran_and_not_the_reference(name: str) -> None:
    """On a CPU build of torch: the dispatcher has our kernel, and none of the reference's ATen calls happen."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"trady::{name}", "CPU")
    arguments = SAMPLES[name][0]
    with backend("reference"):
        reference = _events(name, arguments)
    with backend("cpp"):
        compiled = _events(name, arguments)
    assert f"trady::{name}" in compiled
    traces = {
        "aten::index_select",
        "aten::index_copy_",
        "aten::einsum",
        "aten::max_pool2d_with_indices",
        "aten::max_pool2d_with_indices_backward",
        "aten::amax",
        "aten::repeat_interleave",
        "aten::sum",
        "aten::bitwise_and",
    }
    assert reference & traces and not compiled & traces


@pytest.mark.parametrize("name", SAMPLES)
def test_memory_of_compiled_operators_is_poisoned(name: str) -> None:
    """What the fixture ``poisoned_memory`` relies on: allocations through the stable ABI are filled too."""
    with backend("cpp"):
        assert "aten::fill_" in _events(name, SAMPLES[name][0])
        torch.use_deterministic_algorithms(False)
        assert "aten::fill_" not in _events(name, SAMPLES[name][0])


def test_backends_are_reported() -> None:
    reasons = available()
    assert tuple(reasons) == BACKENDS
    assert reasons["reference"] is None and reasons["aten"] is None and reasons["cpp"] is None
    if torch.version.cuda is None:
        assert reasons["cuda"] == "torch.version.cuda is None: install a CUDA build of torch"


def test_backend_that_cannot_run_is_refused() -> None:
    for name in BACKENDS:
        reason = unavailable(name)
        if reason is not None:
            with pytest.raises(RuntimeError) as error, backend(name):
                pass
            assert str(error.value) == f"backend {name!r} cannot run here: {reason}"
    with (
        pytest.raises(ValueError, match="backend: got 'opencl', expected 'auto' or one of reference"),
        backend("opencl"),
    ):
        pass


def test_backend_without_a_kernel_is_refused() -> None:
    with (
        backend("aten"),
        pytest.raises(NotImplementedError, match="gather_channels: backend 'aten' has no kernel"),
    ):
        OPERATORS["gather_channels"](*SAMPLES["gather_channels"][0])


def test_backend_of_another_device_is_refused() -> None:
    arguments = [a.to("meta") for a in SAMPLES["gather_channels"][0]]
    with (
        backend("cpp"),
        pytest.raises(ValueError, match="backend 'cpp' runs on cpu tensors, got one on meta"),
    ):
        OPERATORS["gather_channels"](*arguments)


def test_backend_blocks_nest_and_end_on_errors() -> None:
    operator, arguments = OPERATORS["linear_channel_grad"], SAMPLES["linear_channel_grad"][0]

    def ran() -> str | None:
        operator(*arguments)
        return last_kernel("linear_channel_grad")

    with pytest.raises(ZeroDivisionError), backend("reference"):
        with backend("aten"):
            assert ran() == "aten"
            with backend("auto"):
                assert ran() == "cpp"
        assert ran() == "reference"
        raise ZeroDivisionError
    assert ran() == "cpp"


def test_public_name() -> None:
    assert trady_kernels.backend is backend


@pytest.mark.parametrize("name", ("rectify", "rectify_", "scale_by_bits", "pack_bits"))
def test_a_gpus_compiled_graph_has_plain_operations_to_fuse(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    choose = OPERATORS[name].choose
    assert (choose(on_gpu), choose(on_cpu)) == ("cuda", "cpp")
    monkeypatch.setattr(sys.modules[by_device_or_fused.__module__], "is_tracing", lambda: True)
    assert (choose(on_gpu), choose(on_cpu)) == ("reference", "cpp")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_plain_operations_of_bits_compile_to_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's graph has, compiled for the CPU: the same output, gradient and bits."""
    for name in ("rectify", "scale_by_bits", "pack_bits"):
        monkeypatch.setattr(OPERATORS[name], "choose", lambda *_: "reference")

    def activated(x: torch.Tensor) -> torch.Tensor:
        return relu6(4 * x)  # exact: inductor rounds only at the end of what it fuses

    x = _images(2, 5, 7, 3, channels_last=True).to(dtype).requires_grad_()
    expected = activated(x)
    grad_output = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad_output)
    torch.compiler.reset()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = torch.compile(activated)(x)
        (grad,) = torch.autograd.grad(output, x, grad_output)
    assert not any("trady::" in event.key for event in profiler.key_averages())
    assert torch.equal(output, expected) and torch.equal(grad, expected_grad)
