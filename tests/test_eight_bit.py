"""Saved tensors in 8 bits: what is packed, what stays exact, and what it costs in the gradient."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import as_trained
from saved import saved_bytes
from tolerances import DTYPE_ROUNDOFF
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import trady_kernels as tk
from trady_kernels.functional.eight_bit import MIN_ELEMENTS
from trady_kernels.nn.eight_bit import keep_in_eight_bits, keep_in_full, keeps_in_eight_bits
from trady_kernels.ops import dequantize_blocks, quantize_blocks

B, T, D, HEADS = 4, 24, 64, 4
FULL = B * T * D  # 6144 elements


def packed_bytes(elements: int) -> int:
    return elements + 4 * -(-elements // 64)


class Call(nn.Module):
    """A network that is one function, with a parameter so that its output needs a gradient."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.function(self, *args, **kwargs)


class Attention(nn.Module):
    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mask = mask

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (B, T, D)
        shape = (*input.shape[:2], 3, HEADS, D // HEADS)
        q, k, v = self.qkv(input).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        length = input.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() if self.mask else None
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(output.transpose(1, 2).reshape(input.shape))


class Block(nn.Module):
    """A transformer block, norm first (ViT) or last (BERT), its MLP checkpointed or not."""

    def __init__(self, norm_first: bool = True, reentrant: bool | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(mask=not norm_first)
        self.up, self.act, self.down = nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)
        self.norm_first, self.reentrant = norm_first, reentrant

    def mlp(self, input: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(input)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mlp: Callable[[torch.Tensor], torch.Tensor] = self.mlp
        if self.reentrant is not None:
            mlp = lambda x: checkpoint(self.mlp, x, use_reentrant=self.reentrant)  # noqa: E731
        if self.norm_first:
            x = input + self.attention(self.norm1(input))
            return x + mlp(self.norm2(x))
        x = self.norm1(input + self.attention(input))
        return self.norm2(x + mlp(x))


class Transformer(nn.Module):
    """Two blocks, a norm, and a head on the first token."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.blocks = nn.Sequential(Block(**options), Block(**options))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 7)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(input)))[:, 0])


def kept_bytes(model: nn.Module, *args: torch.Tensor) -> int:
    """Saved bytes without those of the parameters, the buffers and the batch."""
    known = nn.Module()
    known.model = model
    for i, tensor in enumerate(args):
        known.register_buffer(f"batch{i}", tensor)
    return saved_bytes(known, lambda: model(*args))


def tokens(**options: Any) -> torch.Tensor:
    return torch.randn(B, T, D, **options)


def grad_output(output: torch.Tensor) -> torch.Tensor:
    """Random, and always the same."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=generator).to(output.dtype)


def gradients(model: nn.Module, *args: Any) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(*args)
    output.backward(grad_output(output))
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def active_hooks() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert active_hooks() is None


# ---- what is kept -----------------------------------------------------------------------------------------


def test_bytes_of_a_transformer() -> None:
    model = Transformer()
    x = tokens()
    full = kept_bytes(model, x)
    keep_in_eight_bits(model, exact=[model.head])
    # A block: the norms' inputs and outputs, q, k and v, attention's output and its projection's input (one
    # memory), GELU's input and output; the last norm's input. The first linear's is the batch, a reference.
    tensors = 2 * [FULL] * 8 + 2 * [4 * FULL] * 2 + [FULL]
    statistics = 5 * 2 * B * T * 4 + 2 * B * HEADS * T * 4
    head = B * D * 4
    assert kept_bytes(model, x) == sum(map(packed_bytes, tensors)) + statistics + head
    assert full > 3 * sum(map(packed_bytes, tensors))


@dataclass(frozen=True)
class KeptCase:
    """A function of a network's parameter and a tensor, and the bytes it keeps."""

    name: str
    function: Callable[..., torch.Tensor]
    saved: int

    def __str__(self) -> str:
        return self.name


def _twice(net: Call, x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0 + net.weight
    return F.gelu(y) + F.silu(y.view(-1, D)).view(x.shape) + F.hardswish(y.transpose(0, 1)).transpose(0, 1)


def _written_between(net: Call, x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0 + net.weight
    z = F.gelu(y)
    y.mul_(2)
    return z + F.silu(y)


def _dropout(net: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x + net.weight, 0.5)


KEPT_CASES = (
    KeptCase("an activation", lambda net, x: F.gelu(x + net.weight), packed_bytes(FULL)),
    KeptCase("one memory, three views", _twice, packed_bytes(FULL)),
    KeptCase("written in between", _written_between, 2 * packed_bytes(FULL)),
    KeptCase("the batch", lambda net, x: x * net.weight, 0),
    KeptCase("a view of the batch", lambda net, x: x[1:].transpose(0, 1) * net.weight, 0),
    KeptCase("a bool mask", _dropout, FULL // 8),
    KeptCase("a small part", lambda net, x: F.gelu((x + net.weight)[:, 0]), B * D * 4),
    KeptCase("small", lambda net, x: F.gelu(x[0] + net.weight), T * D * 4),
    KeptCase("expanded", lambda net, x: F.gelu(net.weight.exp().expand(B, T, D)), D * 4),
    KeptCase(
        "expanded, large",
        lambda net, x: F.gelu(net.weight.exp().repeat(D, 1).expand(5, D, D)),
        D * 4 + D * D * 4,
    ),
    # square keeps what it squares
    KeptCase("a square root", lambda net, x: (x + net.weight).square().sqrt(), packed_bytes(FULL) + FULL * 4),
    KeptCase("log_softmax", lambda net, x: (x + net.weight).log_softmax(-1), FULL * 4),
    KeptCase(
        "indices", lambda net, x: (x + net.weight).gather(2, x.argsort(-1)), packed_bytes(FULL) + FULL * 8
    ),
)


@pytest.mark.parametrize("case", KEPT_CASES, ids=str)
def test_bytes_kept(case: KeptCase) -> None:
    model = Call(case.function)
    x = tokens()
    keep_in_eight_bits(model)
    assert kept_bytes(model, x) == case.saved


def test_weights_are_references() -> None:
    model = Transformer().requires_grad_(False)
    model.embed.bias.requires_grad_(True)
    keep_in_eight_bits(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.detach()), lambda _: None):  # type: ignore[arg-type,return-value]
        model(tokens())
    seen = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() in weights and tensor.dim() == 2]
    assert len(seen) == 2 * 4 + 1  # qkv, proj, up and down of each block, and the head


def test_statistics_stay_exact() -> None:
    """More rows than MIN_ELEMENTS: their mean, their deviation and their log-sum are not packed."""
    rows = 2 * MIN_ELEMENTS
    model = Call(lambda net, x: F.layer_norm(x + net.weight, (D,)))
    keep_in_eight_bits(model)
    x = torch.randn(rows, D)
    assert kept_bytes(model, x) == packed_bytes(rows * D) + 2 * 4 * rows

    def by_hand(net: Call, x: torch.Tensor) -> torch.Tensor:
        x = x + net.weight
        x = x - x.mean(1, keepdim=True)
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()

    model = Call(by_hand)
    keep_in_eight_bits(model)
    assert kept_bytes(model, x) == packed_bytes(rows * D) + 4 * rows

    def attend(net: Call, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x + net.weight, x, x)

    model = Call(attend)
    keep_in_eight_bits(model)
    x = torch.randn(4, 8, 160, D)
    assert kept_bytes(model, x) == 2 * packed_bytes(x.numel()) + 4 * 4 * 8 * 160


def test_a_tensor_kept_whole_is_not_packed_besides() -> None:
    layer = tk.SparseLinear(D, D, channels=D)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = layer, nn.Parameter(torch.randn(D))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            x = input + self.weight
            return self.layer(x) + F.gelu(x)

    model, x = Net(), tokens()
    keep_in_eight_bits(model)
    index = D * 8
    assert kept_bytes(model, x) in (FULL * 4, FULL * 4 + index)
    exact = gradients(model, x)
    keep_in_full(model)
    assert equal(gradients(model, x), exact)


# ---- what comes back --------------------------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """Somebody else's Function: what it saved is what its backward returns."""

    returned: torch.Tensor

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(other)
        return input.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (Saves.returned,) = ctx.saved_tensors
        return grad_output.expand(D), None


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.permute(2, 0, 1),
    "channels_last": lambda x: x.view(2 * B, T, 8, 8).contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x[:, 1:, :60],
    "permuted slice": lambda x: x[1:].permute(2, 1, 0),
    "steps": lambda x: x[:, ::2],
    "offset": lambda x: x[1:],
    "one row of one": lambda x: x[:, None],
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shape_strides_and_values_come_back(layout: str, dtype: torch.dtype) -> None:
    saved = LAYOUTS[layout](torch.randn(2 * B, T, D).to(dtype))
    assert saved.numel() >= MIN_ELEMENTS
    model = Call(lambda net, x: Saves.apply(net.weight, saved))
    keep_in_eight_bits(model)
    model(tokens()).backward()
    restored = Saves.returned
    assert restored.shape == saved.shape and restored.dtype == dtype
    assert restored.stride() == torch.empty_like(saved).stride()
    bound = saved.abs().max().double() / 254 * (1 + 2**-16) + DTYPE_ROUNDOFF[dtype] * saved.abs().double()
    error = (restored.double() - saved.double()).abs()
    assert (error <= bound).all() and error.max() > 0
    assert restored.untyped_storage().data_ptr() != saved.untyped_storage().data_ptr()


def test_a_mask_of_minus_infinity_comes_back_exactly() -> None:
    """``scaled_dot_product_attention`` makes one of a bool mask, and keeps it."""
    model = Call(lambda net, x: Saves.apply(net.weight, torch.where(x > 0, -torch.inf, 0)))
    keep_in_eight_bits(model)
    x = tokens()
    model(x).backward()
    assert torch.equal(Saves.returned, torch.where(x > 0, -torch.inf, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_come_back_exactly(layout: str) -> None:
    mask = LAYOUTS[layout](torch.randn(2 * B, T, D) > 0)
    model = Call(lambda net, x: Saves.apply(net.weight, mask))
    keep_in_eight_bits(model)
    model(tokens()).backward()
    assert torch.equal(Saves.returned, mask)
    assert Saves.returned.stride() == torch.empty_like(mask).stride()
    assert Saves.returned.untyped_storage().data_ptr() != mask.untyped_storage().data_ptr()


def test_nan_is_not_overlooked() -> None:
    model = Call(lambda net, x: F.gelu(x + net.weight))
    keep_in_eight_bits(model)
    x = tokens()
    x[1, 2, 3] = torch.nan
    output = model(x)
    output[~output.isnan()].sum().backward()
    assert not model.weight.grad.isfinite().all()


def test_a_tensor_in_the_place_of_a_freed_one_is_another() -> None:
    """Each activation is freed before the next one is made, and nothing but its address is known of it."""

    def many(net: Call, x: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        for i in range(12):
            y = (x + net.weight) * (i - 5.5)
            total = total + F.gelu(y).sum()
            del y
        return total

    model, x = Call(many), tokens()
    expected = gradients(model, x)
    keep_in_eight_bits(model)
    assert relative_error(gradients(model, x)[0], expected[0]) < 0.01


# ---- what stays exact -------------------------------------------------------------------------------------


def test_sparse_layers_and_the_head_are_exact() -> None:
    """What follows the last packed operation is bit-equal, and so is what our Functions have saved before it."""
    model = as_trained(
        nn.Sequential(
            tk.SparseConv2d(8, 16, 3, padding=1, channels=3),
            nn.Flatten(2),
            nn.GELU(),
            tk.SparseLinear(144, 40, channels=50),
            nn.Linear(40, 40),
        )
    )
    x = torch.randn(16, 8, 12, 12)
    expected = gradients(model, x)
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    keep_in_eight_bits(model, exact=[model[4]])
    actual = dict(zip(names, gradients(model, x), strict=True))
    for name, gradient in zip(names, expected, strict=True):
        exact = name.startswith(("3", "4"))
        assert torch.equal(actual[name], gradient) == exact, name
        assert relative_error(actual[name], gradient) < 0.01
    # The first layer's gradient is that of the error that GELU's codes make, and of no error of its own.
    selected = x[:, model[0].channels]
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.detach()), lambda _: None):  # type: ignore[arg-type,return-value]
        model(x)
    assert any(torch.equal(tensor, selected) for tensor in kept if tensor.shape == selected.shape)


def test_a_loss_inside_the_network_is_exact() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(D, D), nn.Linear(D, 2 * D)

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits = self.head(F.gelu(self.body(input)))
            return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    model, x, target = WithLoss(), tokens(), torch.randint(0, 2 * D, (B, T))
    expected = gradients(model, x, target)
    keep_in_eight_bits(model, exact=[model.head])
    body_weight, _, *head = gradients(model, x, target)
    assert equal(head, expected[2:])
    assert 0 < relative_error(body_weight, expected[0]) < 0.01


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoints_inside(reentrant: bool) -> None:
    """What a checkpoint runs again is exact: its input is not packed, and nothing in it."""
    model = nn.Sequential(nn.Linear(D, D), Block(reentrant=reentrant))
    x = tokens()
    expected = gradients(model, x)
    keep_in_eight_bits(model)
    actual = gradients(model, x)
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    by_name = {name: torch.equal(a, b) for name, a, b in zip(names, actual, expected, strict=True)}
    assert all(same for name, same in by_name.items() if name.startswith(("1.up", "1.down")))
    assert not by_name["0.weight"]
    assert max(map(relative_error, actual, expected)) < 0.02


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpoint_around_the_network(reentrant: bool) -> None:
    model, x = Transformer(), tokens(requires_grad=True)
    keep_in_eight_bits(model, exact=[model.head])
    expected = gradients(model, x)
    model.zero_grad()
    output = checkpoint(model, x, use_reentrant=reentrant)
    output.backward(grad_output(output))
    assert equal([parameter.grad for parameter in model.parameters()], expected)


# ---- how it is used ---------------------------------------------------------------------------------------


def test_graphs_live_side_by_side() -> None:
    """Two forwards before a backward, and two backwards through one graph."""
    model, x, y = Transformer(), tokens(), tokens()
    keep_in_eight_bits(model, exact=[model.head])
    first, second = gradients(model, x), gradients(model, y)
    model.zero_grad()
    outputs = [model(x), model(y)]
    for output in outputs:
        output.backward(grad_output(output), retain_graph=True)
    for parameter, a, b in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(parameter.grad, a + b)
    model.zero_grad()
    outputs[0].backward(grad_output(outputs[0]))
    assert equal([parameter.grad for parameter in model.parameters()], first)


def codes_alive() -> int:
    gc.collect()
    return sum(type(item) is torch.Tensor and item.dtype == torch.int8 for item in gc.get_objects())


def test_nothing_outlives_the_graph() -> None:
    """Neither codes, nor an output that its own graph keeps as it is."""
    model = Call(lambda net, x: F.gelu(x + net.weight)[0, 0].softmax(-1))
    keep_in_eight_bits(model)
    before = codes_alive()  # of other tests' samples
    output = model(tokens())
    assert codes_alive() == before + 1
    del output
    assert codes_alive() == before


def test_codes_that_outer_hooks_put_elsewhere_are_freed() -> None:
    model, x = Call(_twice), tokens()
    keep_in_eight_bits(model)
    before = codes_alive()
    with saved_tensors_hooks(lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy):
        output = model(x)
    assert codes_alive() == before
    output.sum().backward()
    actual, model.weight.grad = model.weight.grad, None
    model(x).sum().backward()
    assert torch.equal(model.weight.grad, actual)


def test_copies_pickles_and_undoing() -> None:
    model, x = Transformer(), tokens()
    exact = gradients(model, x)
    keys = list(model.state_dict())
    keep_in_eight_bits(model, exact=[model.head])
    packed = gradients(model, x)
    assert not equal(packed, exact) and keeps_in_eight_bits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(gradients(twin, x), packed)
        keep_in_full(twin)
        assert equal(gradients(twin, x), exact) and not keeps_in_eight_bits(twin)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())
    assert equal(gradients(model, x), packed) and list(model.state_dict()) == keys
    keep_in_eight_bits(model, exact=[model.head])  # a second time: no second pair of hooks
    assert equal(gradients(model, x), packed)
    keep_in_full(model)
    assert equal(gradients(model, x), exact)


def test_a_hook_registered_after_loading_takes_no_place() -> None:
    model = pickle.loads(pickle.dumps(_converted()))
    ids = {*model._forward_pre_hooks, *model._forward_hooks}
    handle = model.register_forward_pre_hook(lambda module, args: None)
    assert handle.id not in ids and len(model._forward_pre_hooks) == 2


def _converted() -> nn.Module:
    model = Transformer()
    keep_in_eight_bits(model, exact=[model.head])
    return model


def test_errors_inside_the_forward_end_it() -> None:
    def fail(net: Call, x: torch.Tensor) -> torch.Tensor:
        assert active_hooks() is not None
        F.gelu(x + net.weight)
        raise ZeroDivisionError

    model = Call(fail)
    keep_in_eight_bits(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(tokens())
        assert active_hooks() is None

    def refuse(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError

    model = Call(lambda net, x: F.gelu(x + net.weight))
    keep_in_eight_bits(model)
    model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(tokens())


def test_an_inner_network_that_never_began_ends_nothing() -> None:
    """Its hook raises before ours runs, and torch calls ours at the end all the same."""

    def refuse(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError

    inner = Transformer()

    def function(net: Call, x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ZeroDivisionError):
            net.inner(x)
        return F.gelu(x + net.weight)

    model, x = Call(function), tokens()
    model.inner = inner
    keep_in_eight_bits(model)
    keep_in_eight_bits(inner)
    inner.register_forward_pre_hook(refuse, prepend=True)
    assert kept_bytes(model, x) == packed_bytes(FULL)


def test_an_interrupted_forward_is_ended_by_the_next() -> None:
    """torch calls no hooks after a KeyboardInterrupt, and a notebook goes on."""

    def function(net: Call, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(x + net.weight)
        if net.interrupted:
            raise KeyboardInterrupt
        return y

    inner = Call(function)
    inner.interrupted = True
    model = nn.Sequential(inner)
    keep_in_eight_bits(inner)
    keep_in_eight_bits(model)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    other = tokens().requires_grad_()
    # Of no network, and exact before the next forward.
    assert torch.equal(F.gelu(other).grad_fn._saved_self, other)
    inner.interrupted = False
    x = tokens()
    assert kept_bytes(model, x) == packed_bytes(FULL)  # also under the hooks that count
    model(x)
    assert active_hooks() is None
    assert kept_bytes(model, x) == packed_bytes(FULL)


def test_networks_inside_networks() -> None:
    inner = Transformer()
    inner.head = nn.Linear(D, D)
    outer = nn.Sequential(nn.Linear(D, D), inner, nn.GELU())
    x = tokens()
    keep_in_eight_bits(outer)
    expected, size = gradients(outer, x), kept_bytes(outer, x)
    keep_in_eight_bits(inner)
    assert keeps_in_eight_bits(inner) and equal(gradients(outer, x), expected)
    assert kept_bytes(outer, x) == size

    def again(net: Call, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        return F.gelu(net(x, depth - 1) if depth else x + net.weight)

    model = Call(again)
    keep_in_eight_bits(model)
    assert kept_bytes(model, x) == 3 * packed_bytes(FULL)


def test_without_gradients_nothing_is_hooked() -> None:
    seen = []
    model = Call(lambda net, x: seen.append(active_hooks()) or F.gelu(x + net.weight))
    keep_in_eight_bits(model)
    with torch.no_grad():
        model(tokens())
    with torch.inference_mode():
        model(tokens())
    assert seen == [None, None]
    model.eval()
    assert kept_bytes(model, tokens()) == packed_bytes(FULL)


def test_torch_func_is_exact() -> None:
    model, x = Call(lambda net, x: F.gelu(x + net.weight).sum()), tokens()
    (expected,) = torch.autograd.grad(model(x), model.weight)
    keep_in_eight_bits(model)
    gradient = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (x,)))
    torch.testing.assert_close(gradient(dict(model.named_parameters()))["weight"], expected)


def test_writes_before_backward() -> None:
    """A weight that was stepped raises as in dense autograd; what is packed holds the values of forward."""

    def function(net: Call, x: torch.Tensor) -> torch.Tensor:
        net.middle = x + net.weight.sum()
        return F.gelu(net.middle)

    model = Call(function)
    x = tokens()
    keep_in_eight_bits(model)
    expected = gradients(model, x)[0]
    output = model(x)
    with torch.no_grad():
        model.middle.fill_(9)  # dense autograd would refuse
    model.weight.grad = None
    output.backward(grad_output(output))
    assert torch.equal(model.weight.grad, expected)

    network = Transformer()
    keep_in_eight_bits(network)
    output = network(tokens())
    with torch.no_grad():
        network.blocks[1].up.weight.add_(1)
    with pytest.raises(
        RuntimeError, match=r"^a tensor \(64, 256\) needed for backward was modified in place"
    ):
        output.sum().backward()


def test_hooks_further_out_see_what_is_kept() -> None:
    model, x = Transformer(), tokens()
    keep_in_eight_bits(model, exact=[model.head])
    expected = gradients(model, x)
    with save_on_cpu():
        output = model(x)
    model.zero_grad()
    output.backward(grad_output(output))
    assert equal([parameter.grad for parameter in model.parameters()], expected)
    report = tk.measure_memory(model, x)
    assert report.saved_bytes == kept_bytes(model, x)
    assert report.by_module["blocks.0.act"] == packed_bytes(4 * FULL)
    assert report.batch_bytes == FULL * 4


def test_under_autocast() -> None:
    model, x = Transformer(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        full = kept_bytes(model, x)
        expected = gradients(model, x)
        keep_in_eight_bits(model, exact=[model.head])
        assert kept_bytes(model, x) < 0.62 * full
        actual = gradients(model, x)
    assert max(map(relative_error, actual, expected)) < 0.03


@pytest.mark.slow
def test_compiled_regions_are_left_to_the_compiler() -> None:
    model, x = Transformer(), tokens()
    exact = gradients(model, x)
    keep_in_eight_bits(model, exact=[model.head])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, x), exact, strict=True):
        torch.testing.assert_close(a, b)
    keep_in_eight_bits(model, exact=[model.norm])
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(model, x), exact, strict=True):
        torch.testing.assert_close(a, b)


# ---- what it costs ----------------------------------------------------------------------------------------


def _gelu_curvature() -> float:
    return 2 / math.sqrt(2 * math.pi)  # |f''| = |2 - x^2| phi(x), largest at 0


#: max |f''|: GELU at 0; SiLU at 0, f'' = s(1 - s)(2 + x(1 - 2s)), s the sigmoid; Hardswish between its kinks,
#: where f'' = 1/3, and at a kink f' jumps by 1/2.
CURVATURE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    "gelu": (F.gelu, _gelu_curvature(), 0.0),
    "silu": (F.silu, 0.5, 0.0),
    "hardswish": (F.hardswish, 1 / 3, 0.5),
}


@pytest.mark.parametrize("name", CURVATURE)
def test_pointwise_bound(name: str) -> None:
    r"""The gradient is ``f'(x + e) g``, so its error is at most ``max |f''| |e| |g|`` with ``|e| <= scale / 2``."""
    function, curvature, jump = CURVATURE[name]
    model = Call(lambda net, x: function(x * net.weight))
    model.weight.data.fill_(1)
    x = (tokens() * 3).requires_grad_()
    keep_in_eight_bits(model)
    output = model(x)
    grad_output = torch.randn_like(output)
    (actual,) = torch.autograd.grad(output, x, grad_output)
    exact_input = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(exact_input), exact_input, grad_output)

    _, scales = quantize_blocks(x.detach())
    half = (scales / 2).repeat_interleave(64).view(x.shape) * (1 + 2**-16)
    bound = curvature * half
    if jump:  # where rounding may carry x over a kink
        bound = bound + jump * ((x.detach().abs() - 3).abs() <= half)
    error = (actual - expected).abs()
    assert (error <= bound * grad_output.abs() + 1e-6).all()
    assert error.max() > 0.1 * (bound * grad_output.abs()).max()


@dataclass(frozen=True)
class CostCase:
    """A module whose weight gradients are compared, and how far they may be off (relative, L2)."""

    name: str
    build: Callable[[], nn.Module]
    error: float

    def __str__(self) -> str:
        return self.name


def _sparse(model: nn.Module, example_input: torch.Tensor) -> nn.Module:
    as_trained(model)
    tk.sparsify(model, example_input)
    tk.select_fraction(model, 0.25)
    return model


COST_CASES = (
    CostCase("GELU", lambda: nn.Sequential(nn.Linear(D, D), nn.GELU()), 0.004),
    CostCase("SiLU", lambda: nn.Sequential(nn.Linear(D, D), nn.SiLU()), 0.004),
    CostCase("Hardswish", lambda: nn.Sequential(nn.Linear(D, D), nn.Hardswish()), 0.004),
    CostCase("LayerNorm", lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), 0.01),
    CostCase("attention", Attention, 0.01),
    CostCase("ViT", lambda: _sparse(Transformer(norm_first=True), tokens()), 0.02),
    CostCase("BERT", lambda: _sparse(Transformer(norm_first=False), tokens()), 0.02),
)


@pytest.mark.parametrize("case", COST_CASES, ids=str)
def test_gradient_error(case: CostCase) -> None:
    model, x = case.build(), tokens()
    keep_in_full(model)
    expected = gradients(model, x)
    keep_in_eight_bits(model, exact=[module for name, module in model.named_modules() if name == "head"])
    actual = gradients(model, x)
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True) if b.dim() > 1]
    assert 0 < max(errors) < case.error
    cosine = F.cosine_similarity(
        torch.cat([a.flatten() for a in actual]), torch.cat([b.flatten() for b in expected]), dim=0
    )
    assert cosine > 1 - case.error**2


def test_restored_values_are_the_operators() -> None:
    """What an operation is given back is what ``dequantize_blocks`` makes of ``quantize_blocks``."""
    saved = tokens()
    model = Call(lambda net, x: Saves.apply(net.weight, saved))
    keep_in_eight_bits(model)
    model(tokens()).backward()
    assert torch.equal(Saves.returned.flatten(), dequantize_blocks(*quantize_blocks(saved), torch.float32))
