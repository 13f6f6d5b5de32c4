"""Fixtures and markers of the whole suite."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors. It decides when they are decorated.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when CUDA starts: what cuBLAS wants where results have to be the same every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import cuda_on_host

from trady_kernels.ops import choice
from trady_kernels.ops.backend import unavailable

# The shipped choice of kernels, here and in other processes, whatever this user has tuned.
os.environ["TRADY_CHOICE"] = ""
choice.load()

# Thousands of small operators: a second thread costs more than it brings, and many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (the largest integer for integers), so that an element nobody wrote fails its test.

    Holds for tensors that C++ kernels allocate too; tests/test_operators.py has the proof.
    """
    # On a GPU some of ATen's own operators have no such form; ours always are.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    """No TF32, which torch itself allows for convolutions on a GPU."""
    cudnn = torch.backends.cudnn
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    # Set one by one they raise once torch.testing's own modules are imported; set by the new switches, in torch.export.
    with cudnn.flags(**flags, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever number of threads a test sets, as those of parallel code do, the next one has one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


def _instruction_sets() -> list[str]:
    if unavailable("cpp"):
        return []
    from trady_kernels import _C

    return _C.available_isas()


@pytest.fixture(params=_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this CPU."""
    from trady_kernels import _C

    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=(1, 2, 3, 7))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test on several numbers of threads, which must not change a bit of any result."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def triton_device() -> str:
    """Device type of the tensors that Triton's kernels take here: a GPU's, or without one the interpreter's."""
    reason = unavailable("triton")
    if reason is not None:
        pytest.skip(reason)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def cuda_device() -> Iterator[str]:
    """Device type of the tensors that the CUDA kernels take here: a GPU's, or the CPU's where they are compiled for it."""
    if torch.cuda.is_available():
        reason = unavailable("cuda")
        if reason is not None:
            pytest.skip(reason)
        yield "cuda"
        return
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("fibers change stacks, which AddressSanitizer does not follow")
    library = cuda_on_host.library()
    if isinstance(library, str):
        pytest.skip(library)
    with cuda_on_host.Kernels():
        yield "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="torch.cuda.is_available() is False: this test needs a GPU")
            )
