"""``sparse_linear``: a linear layer that trains, and keeps for backward, only selected input features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trady_kernels.functional.apply import applied
from trady_kernels.functional.autocast import cast_input
from trady_kernels.functional.first_order import first_order_only, refuse_vmap
from trady_kernels.functional.rows import check_rows
from trady_kernels.functional.stored import Stored, check_stored, holds_no_more, pack, unpack
from trady_kernels.ops import gather_channels, linear_channel_grad
from trady_kernels.ops.backend import is_tracing


def _multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear``, bit-equal to what ``nn.Linear`` gives for a weight that requires grad."""
    if input.dim() < 3 or input.is_contiguous():
        return F.linear(input, weight, bias)
    # torch folds the leading dimensions of a strided input only if the weight requires grad, and this one
    # does not; unfolded products round differently
    input = cast_input(input)
    output = torch.mm(input.reshape(-1, input.shape[-1]), weight.to(input.dtype).t())
    output = output.view(*input.shape[:-1], weight.shape[0])
    return output if bias is None else output.add_(bias.to(input.dtype))


def _gather_features(input: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:  # (..., I) -> (..., k)
    if input.dim() > 1 and input.is_contiguous():
        flat = gather_channels(input.flatten(0, -2), channels)
        return flat.view(*input.shape[:-1], channels.shape[0])
    return input.index_select(-1, channels)  # flattening a strided input would copy all of it


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor,  # (..., I)
        weight: torch.Tensor,  # (O, I)
        bias: torch.Tensor | None,  # (O,)
        channel_weight: torch.Tensor | None,  # (k, O)
        channels: torch.Tensor,  # (k,)
        stored: Stored,
    ) -> tuple[torch.Tensor | None, ...]:
        output = _multiply(input, weight, bias)
        if channel_weight is not None and stored == "8bit":
            return output, *pack(_gather_features(input, channels))
        if channel_weight is None or (channels.shape[0] == input.shape[-1] and holds_no_more(input)):
            return output, None
        return output, _gather_features(input, channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, weight, bias, channel_weight, channels, _ = inputs
        _, selected, *scales = output
        if selected is not None:
            ctx.mark_non_differentiable(selected, *scales)
        elif channel_weight is not None:
            selected = input  # every feature is selected: keep the input itself, as nn.Linear does
        ctx.set_materialize_grads(False)
        # A change of `channels` before backward is noticed by autograd's version check.
        ctx.save_for_backward(
            selected,
            scales[0] if scales else None,
            weight if ctx.needs_input_grad[0] else None,
            channels if channel_weight is not None else None,
        )
        ctx.dtypes = (
            None if bias is None else bias.dtype,
            None if channel_weight is None else channel_weight.dtype,
        )

    @staticmethod
    @first_order_only("sparse_linear")
    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if grad_output is None:
            return (None,) * 6
        selected, scales, weight, channels = ctx.saved_tensors
        bias_dtype, rows_dtype = ctx.dtypes
        grad_input = grad_bias = grad_rows = None
        rows_of_output = grad_output.flatten(0, -2) if grad_output.dim() > 1 else grad_output[None]  # (N, O)
        if ctx.needs_input_grad[3]:
            selected = unpack(selected, scales, grad_output.dtype)
            rows_of_input = selected.flatten(0, -2) if selected.dim() > 1 else selected[None]
            grad_rows = linear_channel_grad(rows_of_input, rows_of_output).to(rows_dtype)
            if is_tracing():
                # A graph keeps nothing that its backward does not use, and then nobody notices that `channels` changed.
                grad_rows = torch.where(channels[:, None] < 0, 0, grad_rows)
        if ctx.needs_input_grad[0]:
            grad_input = torch.matmul(grad_output, weight.to(grad_output.dtype))
        if ctx.needs_input_grad[2]:
            grad_bias = rows_of_output.sum(0).to(bias_dtype)
        return grad_input, None, grad_bias, grad_rows, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        refuse_vmap("sparse_linear")


_sparse_linear = applied(_SparseLinear)


def sparse_linear(
    input: torch.Tensor,  # (..., I)
    weight: torch.Tensor,  # (O, I)
    bias: torch.Tensor | None,  # (O,)
    channel_weight: torch.Tensor | None,  # (k, O)
    channels: torch.Tensor,  # (k,)
    stored: Stored = "exact",
) -> torch.Tensor:  # (..., O)
    r"""``F.linear`` whose weight gradient goes to the rows of the selected input features alone.

    .. math:: dW[c, o] = \sum_n x[n, c] \; dY[n, o]

    Kept for backward: the selected features of the input where ``channel_weight`` requires grad, and a
    reference to ``weight`` where the input does (TraDy, arXiv 2510.19675, section 3).

    Args:
        input: ``(..., I)``.
        weight: ``(O, I)``, the whole weight. It must already hold the values of ``channel_weight`` at
            ``channels``; it gets no gradient itself.
        bias: ``(O,)`` or None.
        channel_weight: ``(k, O)``, what the gradient of the selected features goes to, one row an input
            feature; None where nothing but the input and the bias gets a gradient. Its values are not
            read.
        channels: ``(k,)`` int64, sorted and unique, the input feature of each row.
        stored: how the selected features are kept, see ``Stored``. In 8 bits each is off by at most 1/254 of the
            largest among the 64 in a row with it, and so is what the gradient of ``channel_weight`` is made of.

    Returns:
        ``(..., O)``, bit-equal to ``nn.Linear``'s.

    Raises:
        TypeError: ``input`` or ``channels`` is not a tensor.
        ValueError: the last dimension of ``input`` is not the weight's, ``channel_weight`` has another number of
            rows than there are ``channels``, or ``stored`` is none of ``Stored``.
        RuntimeError: when a gradient of the gradient is asked for.
        NotImplementedError: under ``torch.vmap`` while something requires grad.
    """
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"input: got {type(input).__name__}, expected a tensor (..., {weight.shape[1]})")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, expected (..., {weight.shape[1]}), since the layer has "
            f"{weight.shape[1]} input features"
        )
    check_stored(stored)
    if channel_weight is not None:
        check_rows(channel_weight, channels)
        if not channel_weight.requires_grad:
            channel_weight = None
    if not torch.is_grad_enabled() or not (
        channel_weight is not None or input.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _multiply(input, weight, bias)
    return _sparse_linear(cast_input(input), weight, bias, channel_weight, channels, stored)
