"""``scaled_dot_product_attention``, whose backward computes the probabilities again."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from trady_kernels.functional.autocast import cast_input
from trady_kernels.functional.bits import scale_gradient
from trady_kernels.functional.dropout import rounded_scale
from trady_kernels.ops import pack_bits
from trady_kernels.ops.backend import FLOATING, HALVES, is_tracing


def _additive(attn_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if attn_mask.dtype is not torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(attn_mask.logical_not(), -math.inf)


def _attend(
    query: torch.Tensor,  # (..., L, E)
    key: torch.Tensor,  # (..., S, E)
    value: torch.Tensor,  # (..., S, Ev)
    attn_mask: torch.Tensor | None,  # (..., L, S)
    bits: torch.Tensor | None,  # (ceil(... * L * S / 8),)
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:  # (..., L, Ev)
    """The operations of torch's own reference, in their order, so that the output is bit-equal to it."""
    dtype = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        if dtype in HALVES:
            query, key, value = query.float(), key.float(), value.float()
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        root = math.sqrt(abs(scale))
        scores = (query * math.copysign(root, scale)) @ (key.transpose(-2, -1) * root)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores + _additive(attn_mask, scores.dtype)
        probabilities = torch.ops.aten._safe_softmax(scores, -1)
        del scores
        if bits is not None:
            kept = rounded_scale(dropout_p, probabilities.dtype)
            probabilities = scale_gradient(probabilities, bits, kept, 0.0, probabilities.stride())
        return (probabilities @ value).to(dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        bits = None
        if dropout_p > 0:
            shape = (*query.shape[:-1], key.shape[-2])
            kept = torch.empty(shape, dtype=torch.bool, device=query.device).bernoulli_(1 - dropout_p)
            bits = pack_bits(kept)
            del kept
        return _attend(query, key, value, attn_mask, bits, dropout_p, is_causal, scale), bits

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor | None]
    ) -> None:
        query, key, value, attn_mask, *ctx.rest = inputs
        bits = output[1]
        if bits is not None:
            ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, attn_mask, bits)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 7
        *inputs, attn_mask, bits = ctx.saved_tensors
        again = torch.is_grad_enabled()  # then gradients of these gradients are wanted
        if not again:
            inputs = [
                tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
            ]
        query, key, value = inputs
        with torch.enable_grad():
            output = _attend(query, key, value, attn_mask, bits, *ctx.rest)
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=again))
        gradients = (next(found) if needed else None for needed in ctx.needs_input_grad[:3])
        return (*gradients, None, None, None, None)


def _keeps_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> bool:
    """Whether torch would take its reference on this call, and ours can stand in for it."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    return (
        not is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors[:3])
        and all(tensor.device.type == "cpu" and tensor.layout is torch.strided for tensor in tensors)
        and all(tensor.dtype in FLOATING for tensor in tensors[:3])
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and not (attn_mask is not None and (attn_mask.requires_grad or is_causal))
        and 0 <= dropout_p < 1
        and query.numel() > 0
        and key.numel() > 0
        and (scale is None or scale != 0)
        and torch._fused_sdp_choice(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
        == SDPBackend.MATH.value
    )


def scaled_dot_product_attention(
    query: torch.Tensor,  # (..., L, E)
    key: torch.Tensor,  # (..., S, E)
    value: torch.Tensor,  # (..., S, Ev)
    attn_mask: torch.Tensor | None = None,  # (..., L, S)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # (..., L, Ev)
    """``F.scaled_dot_product_attention`` that never keeps the probabilities for backward.

    Torch's fused kernels keep the query, key, value and output. On the CPU they know no dropout: with it torch
    keeps the probabilities, the noise and the product of both, ``3 L S`` elements a head. This function then
    keeps one bit an element of the noise and computes the probabilities again. It draws the random numbers
    that torch draws: the same seed drops the same elements.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as
            ``F.scaled_dot_product_attention`` takes them. What a fused kernel of torch takes it gets, and so
            does a mask that requires a gradient, another device than the CPU, and grouped queries.

    Returns:
        ``(..., L, Ev)``. Kept besides the query, key, value and mask: ``ceil(n / 8)`` bytes for n
        probabilities, with dropout alone.

    Source: Dao et al., arXiv 2205.14135, section 3.1 (recomputation in the backward pass).
    """
    if enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )
    query, key, value = (cast_input(tensor) for tensor in (query, key, value))
    if not _keeps_probabilities(query, key, value, attn_mask, dropout_p, is_causal, scale):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        attn_mask = cast_input(attn_mask)
    # Not through functional.apply, whose saved tensors the 8-bit form leaves exact.
    output, _ = _Attention.apply(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return output
