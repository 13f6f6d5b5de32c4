"""Attention that computes its probabilities again: values and gradients are torch's, bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from saved import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

import trady_kernels as tk
from trady_kernels.functional.attention import scaled_dot_product_attention
from trady_kernels.nn.attention import keep_attention, recompute_attention

L, S, E, EV = 17, 13, 8, 5


@dataclass(frozen=True)
class Case:
    name: str
    lead: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.float32
    mask: str | None = None
    dropout_p: float = 0.3
    is_causal: bool = False
    scale: float | None = None
    autocast: bool = False
    transposed: bool = False


CASES = (
    Case("dropout"),
    Case("transposed heads", transposed=True),
    Case("float64, no head dimension", lead=(4,), dtype=torch.float64),
    Case("bool mask", mask="bool"),
    Case("float mask, scale", mask="float", scale=0.7),
    Case("a row of the mask is empty", mask="empty row"),
    Case("causal, negative scale", is_causal=True, scale=-0.5),
    Case("bfloat16", dtype=torch.bfloat16, mask="float"),
    Case("float16", dtype=torch.float16),
    Case("autocast", autocast=True, mask="float"),
    Case("reference without dropout", lead=(4,), dropout_p=0.0),
)


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, features in ((L, E), (S, E), (S, EV)):
        tensor = torch.randn(*case.lead, length, features, generator=generator, dtype=torch.float64)
        if case.transposed:
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        made.append(tensor.to(case.dtype).requires_grad_())
    return tuple(made)


def mask(case: Case) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if case.mask is None:
        return None
    if case.mask == "float":
        return torch.randn(L, S, generator=generator).to(case.dtype)
    allowed = torch.rand(case.lead[0], 1, L, S, generator=generator) > 0.4
    if case.mask == "empty row":
        allowed[0, 0, 3] = False
    return allowed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_torch(case: Case) -> None:
    found = []
    for attention in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        inputs = tensors(case)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            output = attention(*inputs, mask(case), case.dropout_p, case.is_causal, scale=case.scale)
        state = torch.get_rng_state()
        grad_output = torch.randn(output.shape).to(output.dtype)
        found.append((output, state, *torch.autograd.grad(output, inputs, grad_output)))
        node = output.grad_fn
    assert node is not None and node.name() == "_AttentionBackward"
    for expected, ours in zip(*found, strict=True):
        assert expected.dtype == ours.dtype
        assert torch.equal(expected, ours)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_keeps_query_key_value_and_bits(dropout_p: float) -> None:
    inputs = tensors(Case("", lead=(3,)))
    kept = 4 * 3 * (L * E + S * E + S * EV) + (math.ceil(3 * L * S / 8) if dropout_p else 0)
    found = saved_bytes(nn.Module(), lambda: scaled_dot_product_attention(*inputs, dropout_p=dropout_p))
    assert found == kept


def test_gradients_of_gradients() -> None:
    inputs = tuple(torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return scaled_dot_product_attention(*inputs, dropout_p=0.4)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_only_the_gradients_that_are_needed() -> None:
    query, key, value = tensors(Case(""))
    key.requires_grad_(False)
    torch.manual_seed(0)
    output = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    grad_output = torch.randn_like(output)
    for ours, theirs in zip(
        *(torch.autograd.grad(made, (query, value), grad_output) for made in (output, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_torch_does_better_is_left_to_torch() -> None:
    query, key, value = tensors(Case(""))
    value = value.repeat(1, 1, 1, 2)[..., :E]
    needs = torch.zeros(L, S, requires_grad=True)
    for output in (
        scaled_dot_product_attention(query, key, value),  # a fused kernel
        scaled_dot_product_attention(query, key, value, needs, 0.3),
        scaled_dot_product_attention(query.repeat(1, 2, 1, 1), key, value, dropout_p=0.3, enable_gqa=True),
    ):
        assert output.grad_fn is not None and output.grad_fn.name() != "_AttentionBackward"
    with torch.no_grad():
        assert scaled_dot_product_attention(query, key, value, dropout_p=0.3).grad_fn is None


class Attention(nn.Module):
    """Projections that can be sparse around attention, as libraries write it."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.p = p
        self.fails: BaseException | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, L, 8)
        query, key, value = self.project(input).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.p if self.training else 0.0
        )
        if self.fails is not None:
            raise self.fails
        return self.out(attended.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.head = nn.Linear(8, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(input + self.attention(input))


PROBABILITIES = 3 * 2 * 40 * 40  # of the input below


def x() -> torch.Tensor:
    return torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, run: object = None) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    (model if run is None else run)(x()).square().sum().backward()  # type: ignore[operator]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_sparsify_recomputes_and_densify_undoes_it() -> None:
    dense = Net().train()
    sparse = tk.sparsify(copy.deepcopy(dense), x())
    tk.select_fraction(sparse, 1.0)
    assert dense.attention._forward_pre_hooks == {} and len(sparse.attention._forward_pre_hooks) == 1
    kept = [tk.measure_memory(model, x()).by_module["attention"] for model in (dense, sparse)]
    assert kept[0] > 3 * 4 * PROBABILITIES
    assert kept[1] == 4 * x().shape.numel() * 3 + PROBABILITIES // 8
    torch.manual_seed(3)
    expected = dense(x())
    torch.manual_seed(3)
    torch.testing.assert_close(sparse(x()), expected)
    for model in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert tk.measure_memory(model, x()).by_module["attention"] == kept[1]
        tk.densify(model)
        assert not model.attention._forward_pre_hooks and not model.attention._forward_hooks
        assert tk.measure_memory(model, x()).by_module["attention"] == kept[0]
    left_alone = tk.sparsify(copy.deepcopy(dense), x(), lean=False)
    assert not left_alone.attention._forward_pre_hooks


def test_eight_bits_take_the_query_key_and_value_too() -> None:
    model = tk.sparsify(Net().train(), x().repeat(8, 8, 1), lean="8bit")
    tk.select_fraction(model, 0.3)
    exact = tk.sparsify(Net().train(), x().repeat(8, 8, 1))
    tk.select_fraction(exact, 0.3)
    wide = x().repeat(8, 8, 1)
    bits = 8 * PROBABILITIES * 8 * 8 // 8
    coarse, full = (tk.measure_memory(m, wide).by_module["attention"] - bits for m in (model, exact))
    assert coarse < 0.3 * full


@pytest.mark.parametrize("error", [ValueError("on purpose"), KeyboardInterrupt("in a notebook")], ids=repr)
def test_a_forward_that_fails_leaves_nothing_behind(error: BaseException) -> None:
    module = Attention().train()
    recompute_attention(module)
    module.fails = error
    with pytest.raises(type(error), match=str(error)):
        module(x())
    query = torch.randn(2, 3, 4, requires_grad=True)
    made = F.scaled_dot_product_attention(query, query, query, dropout_p=0.3)
    assert made.grad_fn is not None and made.grad_fn.name() != "_AttentionBackward"
    module.fails = None
    assert module(x()).grad_fn is not None
    assert torch.overrides._get_current_function_mode_stack() == []
    keep_attention(module)
    assert not module._forward_pre_hooks and not module._forward_hooks


def test_two_forwards_before_one_backward_and_checkpoints() -> None:
    plain, ours = Attention().train(), Attention().train()
    ours.load_state_dict(plain.state_dict())
    recompute_attention(ours)
    recompute_attention(ours)  # twice is once
    assert len(ours._forward_pre_hooks) == 1
    for wrap in (
        lambda model: lambda input: model(input) + model(2 * input),
        lambda model: lambda input: checkpoint(model, input, use_reentrant=False),
        lambda model: lambda input: checkpoint(model, input.requires_grad_(), use_reentrant=True),
    ):
        for found, expected in zip(gradients(ours, wrap(ours)), gradients(plain, wrap(plain)), strict=True):
            assert torch.equal(found, expected)


def test_compiles_whole() -> None:
    module = Attention(p=0.0).train()
    recompute_attention(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradients(module, compiled), gradients(module), strict=True):
        torch.testing.assert_close(found, expected)


def test_compiles_a_part() -> None:
    """The compiler traces what the module does with calls, too."""
    attend = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)

    class Part(Attention):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            query = self.project(input).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)[0]
            return self.out(attend(query, query, query).transpose(1, 2).flatten(2))

    module = Part(p=0.0)
    expected = gradients(module)
    recompute_attention(module)
    for found, wanted in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(found, wanted)
