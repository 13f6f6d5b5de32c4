"""``linear_channel_grad``: a linear layer's weight gradient at the selected input features."""

from __future__ import annotations

import math

import torch

from trady_kernels.ops.backend import Operator
from trady_kernels.ops.choice import limited, own_or_aten
from trady_kernels.ops.linear_channel_grad.aten import linear_channel_grad as aten
from trady_kernels.ops.linear_channel_grad.aten import linear_channel_grad_squares as aten_squares
from trady_kernels.ops.linear_channel_grad.reference import linear_channel_grad as reference
from trady_kernels.ops.linear_channel_grad.reference import linear_channel_grad_squares as reference_squares


def _fake(input_selected: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    shape = (input_selected.shape[-1], grad_output.shape[-1])
    return grad_output.new_empty(shape, dtype=torch.promote_types(grad_output.dtype, torch.float32))


def _fake_squares(input_selected: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    grad = _fake(input_selected, grad_output)
    return grad.new_empty(grad.shape[0])


def _validate(input_selected: torch.Tensor, grad_output: torch.Tensor) -> None:
    shape, out = input_selected.shape, grad_output.shape
    if len(shape) < 2 or shape[:-1] != out[:-1]:
        raise ValueError(
            f"grad_output: got shape {tuple(out)}, expected "
            f"{(*shape[:-1], 'out_features')} to match input_selected, at least 2-D"
        )
    if input_selected.dtype != grad_output.dtype:
        raise ValueError(
            f"grad_output: got {grad_output.dtype}, expected {input_selected.dtype}, the dtype of input_selected"
        )


def _choose(input_selected: torch.Tensor, grad_output: torch.Tensor) -> str:
    on_gpu = input_selected.is_cuda
    if not on_gpu and not limited("linear_channel_grad"):
        return "cpp"
    return own_or_aten(
        "cuda" if on_gpu else "cpu",
        "linear_channel_grad",
        "linear",
        torch.contiguous_format,
        input_selected.dtype,
        input_selected.shape[-1],
        math.prod(grad_output.shape[:-1]),
    )


_operator = Operator(
    "linear_channel_grad(Tensor input_selected, Tensor grad_output) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={"aten": aten},
    choose=_choose,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


_squares = Operator(
    "linear_channel_grad_squares(Tensor input_selected, Tensor grad_output) -> Tensor",
    reference=reference_squares,
    fake=_fake_squares,
    kernels={"aten": aten_squares},
    choose=_choose,
    validate=_validate,
    cpp_checks=True,
    triton=f"{__name__}.triton_kernel",
)


def linear_channel_grad(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k, O)
    r"""Weight gradient of a linear layer at the selected input features, one row a feature.

    .. math:: dW[c, o] = \sum_n x[n, c] \; dY[n, o]

    Args:
        input_selected: ``(..., k)``, the selected features of the layer's input.
        grad_output: ``(..., O)``, same leading shape and dtype.

    Returns:
        ``(k, O)``, contiguous, accumulated and returned in float32 (float64 for float64 input). Note
        that ``nn.Linear.weight`` is ``(O, in_features)``: this is its transpose's selected rows. Where the C++
        kernel has the CPU's dot product of bfloat16 (AVX512_BF16), bfloat16 denormals (below 1.2e-38) count as zero.

    Raises:
        ValueError: leading shapes or dtypes differ.
    """
    return _operator.call(input_selected, grad_output)


def linear_channel_grad_squares(
    input_selected: torch.Tensor,  # (..., k)
    grad_output: torch.Tensor,  # (..., O)
) -> torch.Tensor:  # (k,)
    r"""Squared norm of each selected feature's weight gradient, which never exists as a whole.

    .. math:: \|dW[c]\|_2^2 = \sum_o dW[c, o]^2

    What RGN sums the roots of (TraDy, arXiv 2510.19675, equation 8).

    Args:
        input_selected, grad_output: as :func:`linear_channel_grad` takes them.

    Returns:
        ``(k,)`` in float32 (float64 for float64 input).

    Raises:
        ValueError: leading shapes or dtypes differ.
    """
    return _squares.call(input_selected, grad_output)
