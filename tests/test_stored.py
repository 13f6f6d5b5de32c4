"""Selected channels stored in 8 bits: what the gradients are made of, and what is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady_kernels as tk
from trady_kernels.functional import sparse_conv2d, sparse_linear
from trady_kernels.functional.stored import pack, unpack
from trady_kernels.memory import measure_memory
from trady_kernels.models import MobileNetV2
from trady_kernels.nn import SparseConv2d, SparseLinear
from trady_kernels.ops import conv2d_channel_grad, gather_channels, linear_channel_grad
from trady_kernels.ops.quantize_blocks import blocks_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)


def pair(layer: Callable[..., Any], channels: Any) -> tuple[Any, Any]:
    """The same layer twice: with exact channels and with channels in 8 bits."""
    exact = layer(channels=channels)
    return exact, type(exact).from_dense(exact, channels=channels, stored="8bit")


def through(
    layer: nn.Module, input: torch.Tensor, grad_output: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Output, and the gradients of input, rows and bias."""
    x = input.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    output.backward(output.detach().cos() if grad_output is None else grad_output)
    return [output.detach(), x.grad, layer.channel_weight.grad, layer.bias.grad]  # type: ignore[list-item, union-attr]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("groups", (1, 2, 6))
@pytest.mark.parametrize("channels", ([0, 3, 4], [5], None))
def test_conv2d(groups: int, channels: Any, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """All but the rows' gradient is bit-equal; that is the operator's for the values that the codes stand for."""
    exact, packed = pair(
        lambda channels: SparseConv2d(
            6, 12, 3, stride=2, padding=1, groups=groups, dtype=dtype, channels=channels
        ),
        channels,
    )
    x = torch.randn(3, 6, 9, 7, dtype=dtype).to(memory_format=memory_format)
    theirs, ours = through(exact, x), through(packed, x)
    for index in (0, 1, 3):
        assert torch.equal(ours[index], theirs[index])
    selected, grad_output = gather_channels(x, packed.channels), ours[0].cos()

    def rows_of(values: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        geometry = (3, 3), (2, 2), (1, 1), (1, 1), groups
        return conv2d_channel_grad(values, grad_output, packed.channels, 6, *geometry)

    expected = rows_of(unpack(*pack(selected), dtype), grad_output)
    # With the bias in the same pass the sums may be in another order.
    largest = expected.abs().max().item()
    torch.testing.assert_close(ours[2], expected.to(dtype), rtol=0, atol=2.0**-18 * largest)
    assert not torch.equal(ours[2], theirs[2]), "nothing was stored in 8 bits"
    # Each value is off by half a scale at most; the rest is rounding to the dtype.
    bound = rows_of(torch.full_like(selected, selected.abs().max().item() / 254), grad_output.abs())
    assert ((ours[2] - theirs[2]).abs() <= bound + 2 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((7, 10), (2, 5, 10), (10,)), ids=str)
@pytest.mark.parametrize("channels", ([0, 3, 9], None))
def test_linear(shape: tuple[int, ...], channels: Any, dtype: torch.dtype) -> None:
    exact, packed = pair(lambda channels: SparseLinear(10, 4, dtype=dtype, channels=channels), channels)
    x = torch.randn(shape, dtype=dtype)
    theirs, ours = through(exact, x), through(packed, x)
    for index in (0, 1, 3):
        assert torch.equal(ours[index], theirs[index])
    stands_for = unpack(*pack(x[..., packed.channels]), dtype)
    rows_of = [t.reshape(-1, t.shape[-1]) for t in (stands_for, ours[0].cos())]
    assert torch.equal(ours[2], linear_channel_grad(*rows_of).to(dtype))
    if dtype != torch.bfloat16:  # three numbers of 8 bits may come back as they were
        assert not torch.equal(ours[2], theirs[2]), "nothing was stored in 8 bits"


def test_values_come_back_to_half_a_scale() -> None:
    x = torch.randn(3, 5, 8, 8).to(memory_format=torch.channels_last)
    kept, scales = pack(x)
    assert kept.dtype == torch.int8 and kept.shape == x.shape and kept.stride() == x.stride()
    back = unpack(kept, scales, torch.float32)
    assert back.stride() == x.stride()
    in_memory = [t.permute(0, 2, 3, 1).reshape(-1, 64) for t in (x, back)]
    bound = in_memory[0].abs().amax(1, keepdim=True) / 254
    assert ((in_memory[0] - in_memory[1]).abs() <= bound * (1 + 2**-10)).all()
    assert unpack(x, None, torch.float32) is x


@pytest.mark.parametrize("channels", ([1, 2, 5], None))
def test_kept_are_codes_and_scales(channels: Any) -> None:
    """Of 3 selected channels 3 bytes a pixel, of which every 64 have a scale; of all of them no reference either."""
    layer = SparseConv2d(8, 4, 3, padding=1, channels=channels, stored="8bit")
    elements = 2 * len(layer.channels) * 10 * 10
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 8, 10, 10).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    own = [t for t in kept if t is not layer.weight and t is not layer.channels]
    assert sum(t.untyped_storage().nbytes() for t in own) == elements + 4 * blocks_of(elements)


def test_under_autocast_the_cast_channels_are_packed() -> None:
    exact, packed = pair(lambda channels: SparseConv2d(8, 4, 1, channels=channels), [1, 2, 5])
    x = torch.randn(2, 8, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = through(exact, x), through(packed, x)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert 0 < (ours[2] - theirs[2]).norm() <= theirs[2].norm() / 50


def test_with_a_folded_norm_and_padding() -> None:
    results = []
    for stored in ("exact", "8bit"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3),
        )  # fmt: skip
        x = torch.randn(2, 3, 8, 8)
        tk.sparsify(model, x, stored=stored)  # type: ignore[arg-type]
        tk.select_fraction(model, 0.5)
        model(x).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in tk.trainable_parameters(model)]))  # type: ignore[union-attr]
    difference = (results[0] - results[1]).norm() / results[0].norm()
    assert 0 < difference < 0.01


@pytest.mark.parametrize("channels", ([0, 2], None))
@pytest.mark.parametrize("linear", (False, True))
def test_compiled(linear: bool, channels: Any) -> None:
    layer: Any
    if linear:
        layer = SparseLinear(8, 4, channels=channels, stored="8bit")
    else:
        layer = SparseConv2d(6, 4, 3, padding=1, channels=channels, stored="8bit")
    x = torch.randn(2, 6, 8, 8)
    eager = through(layer, x)
    layer.channel_weight.grad = layer.bias.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = x.clone().requires_grad_()
    output = compiled(y)
    output.backward(output.detach().cos())
    for ours, theirs in zip([output, y.grad, layer.channel_weight.grad, layer.bias.grad], eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_copies_keep_it() -> None:
    layer = SparseLinear(6, 3, channels=2, stored="8bit")
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.stored == "8bit"
    assert repr(layer).endswith("selected=2, stored='8bit')")
    assert layer.state_dict().keys() == nn.Linear(6, 3).state_dict().keys()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear and not hasattr(dense, "stored")
    assert SparseLinear.from_dense(layer).stored == "exact"


def test_a_network_in_and_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tk.sparsify(model, torch.randn(1, 3, 4, 4), stored="8bit")
    assert [module.stored for module in model if hasattr(module, "stored")] == ["8bit", "8bit"]
    tk.sparsify(model)
    assert model[0].stored == "8bit", "sparse already"
    tk.densify(model)
    assert not any("stored" in vars(module) for module in model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_budget_in_bytes_holds_more_and_is_kept() -> None:
    """The sampler counts codes and scales, and what is measured is no more than it counted."""
    batch = torch.randn(8, 3, 64, 64), torch.randint(5, (8,))
    elements, kept = {}, {}
    for stored in ("exact", "8bit"):
        model = MobileNetV2(num_classes=5, width=0.35)
        tk.sparsify(model, batch[0], stored=stored)  # type: ignore[arg-type]
        sampler = tk.ChannelSampler(model, batch[0], budget="512KiB", seed=0)
        elements[stored] = sampler.cost.elements
        measured = measure_memory(model, batch, F.cross_entropy)
        gradients = sum(n for name, n in measured.gradients.items() if name.endswith("channel_weight"))
        kept[stored] = measured.by_kind["conv input"] + gradients
        assert 0.97 * 2**19 <= sampler.cost.bytes <= 2**19
        assert 0.97 * sampler.cost.bytes <= kept[stored] <= sampler.cost.bytes
    assert elements["8bit"] > 2.5 * elements["exact"]


def test_another_word_is_refused() -> None:
    says = "stored: got '4bit', expected 'exact' or '8bit'"
    x, weight, channels = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0])
    rows = torch.randn(1, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for refused in (
        lambda: SparseLinear(3, 3, stored="4bit"),  # type: ignore[arg-type]
        lambda: SparseConv2d.from_dense(nn.Conv2d(3, 3, 1), stored="4bit"),  # type: ignore[arg-type]
        lambda: sparse_linear(x, weight, None, rows, channels, "4bit"),  # type: ignore[arg-type]
        lambda: sparse_conv2d(
            x[..., None, None],
            weight[..., None, None],
            None,
            rows[..., None, None],
            channels,
            stored="4bit",  # type: ignore[arg-type]
        ),
        lambda: tk.sparsify(model, stored="4bit"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=says):
            refused()
    assert type(model[0]) is nn.Linear
