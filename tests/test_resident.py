"""What a step adds to the process agrees with what is counted: nothing hides on ctx or in caches."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from torch import nn

import trady_kernels as tk
from trady_kernels import resident
from trady_kernels.batch import Example
from trady_kernels.models.loading import load_model
from trady_kernels.resident import ResidentReport, in_fresh_process, measure_resident

pytestmark = pytest.mark.skipif(resident.unavailable() is not None, reason=str(resident.unavailable()))

MIB = 2**20
WITHIN = 0.1  # what the two may differ by is the promise; they differ by less than 0.01 where they are right


class HidesOnCtx(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.hidden = x.exp()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output * ctx.hidden


class Hides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HidesOnCtx.apply(x)


class Caches(nn.Module):
    """Keeps what it was called with, the first time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "cache"):
            self.cache = x.detach().exp()
        return x.view_as(x)


def residual_net(sparse: bool) -> tuple[nn.Module, Example]:
    model = as_trained(ResidualNet()).train()
    batch = (torch.randn(8, 3, 160, 160), torch.arange(8) % 5)
    if sparse:
        tk.sparsify(model, batch[0])
        tk.select_fraction(model, 0.1)
    return model, batch


def mobilenet_v2(sparse: bool) -> tuple[nn.Module, Example]:
    model = load_model("torchvision:mobilenet_v2", 10, pretrained=False).model.train()
    batch = (torch.randn(8, 3, 224, 224), torch.arange(8) % 10)
    if sparse:
        tk.sparsify(model, batch[0])
        tk.select_fraction(model, 0.05)
    return model, batch


def resident_and_counted(
    network: Callable[[bool], tuple[nn.Module, Example]], sparse: bool
) -> tuple[ResidentReport, int, int]:
    torch.set_num_threads(1)
    model, batch = network(sparse)
    counted = tk.measure_memory(model, batch, F.cross_entropy)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.ones(40 * MIB)  # an earlier high-water mark, of 160 MiB
    found = measure_resident(model, batch, F.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return found, counted.saved_bytes, counted.peak_bytes


def assert_agree(network: Callable[[bool], tuple[nn.Module, Example]], sparse: bool) -> int:
    found, saved, peak = in_fresh_process(resident_and_counted, network, sparse)
    assert found.graph_bytes == pytest.approx(saved, rel=WITHIN)
    # What an operator allocates and never touches is in the allocator's peak alone.
    assert found.graph_bytes < found.peak_bytes <= peak * (1 + WITHIN)
    return saved


def test_growth_agrees_with_what_is_counted() -> None:
    assert assert_agree(residual_net, sparse=False) > 40 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("network", [residual_net, mobilenet_v2])
def test_growth_agrees_with_what_is_counted_dense_and_sparse(
    network: Callable[[bool], tuple[nn.Module, Example]],
) -> None:
    if network is mobilenet_v2 and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision, whose MobileNetV2 this is, is not here")
    assert assert_agree(network, sparse=True) < assert_agree(network, sparse=False) / 2


def hidden() -> dict[str, tuple[int, int]]:
    torch.set_num_threads(1)
    found = {}
    for kind in (nn.Identity, Hides, Caches):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(), nn.Conv2d(8, 1, 1))
        batch = torch.randn(8, 3, 192, 192)
        counted = tk.measure_memory(model, batch).saved_bytes
        if kind is Caches:
            del model[1].cache
        found[kind.__name__] = (measure_resident(model, batch).graph_bytes, counted)
    return found


def test_growth_sees_what_hides_from_the_hooks() -> None:
    found = in_fresh_process(hidden)
    size = 8 * 8 * 192 * 192 * 4
    assert {counted for _, counted in found.values()} == {size}
    assert found["Identity"][0] == pytest.approx(size, rel=WITHIN)
    assert found["Hides"][0] == pytest.approx(2 * size, rel=WITHIN)
    assert found["Caches"][0] == pytest.approx(2 * size, rel=WITHIN)


def test_a_fresh_process_is_another_and_ends() -> None:
    pid = in_fresh_process(os.getpid)
    assert pid != os.getpid() and not Path(f"/proc/{pid}").exists()


def test_errors_of_a_fresh_process_arrive() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        in_fresh_process(int, "seven")
    with pytest.raises(RuntimeError, match="_exit: its process died without a result"):
        in_fresh_process(os._exit, 3)


def test_a_process_that_keeps_freed_memory_is_refused() -> None:
    with pytest.raises(RuntimeError, match="expected one inside in_fresh_process"):
        measure_resident(nn.Linear(3, 2), torch.randn(2, 3))


def test_where_resident_memory_is_unknown_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
    with pytest.raises(RuntimeError, match="status is not there, which only Linux has") as caught:
        measure_resident(nn.Linear(3, 2), torch.randn(2, 3))
    assert "\n" not in str(caught.value)
