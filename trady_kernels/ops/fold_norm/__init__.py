"""``fold_norm``: weight and bias of the convolution that has a frozen batch norm in it."""

from __future__ import annotations

from typing import Any

import torch

from trady_kernels.ops.backend import Operator, is_tracing
from trady_kernels.ops.fold_norm.reference import fold_norm as reference
from trady_kernels.ops.fold_norm.reference import norm_scale
from trady_kernels.ops.layout import in_a_memory_format

__all__ = ["fold_norm", "norm_scale"]


_VALUES = ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")


def _validate(weight: torch.Tensor, *rest: Any) -> None:
    shape = weight.shape[:1]
    for name, tensor in zip(_VALUES, rest, strict=False):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}, a value an output of weight"
            )


def _choose(weight: torch.Tensor, *tensors: Any) -> str:
    """One launch for what ATen takes eight to; the compiler fuses them by itself, and transforms know only ATen's."""
    if not weight.is_cuda or is_tracing() or torch._C._are_functorch_transforms_active():
        return "reference"
    single = all(t is None or t.dtype is torch.float32 for t in (weight, *tensors[: len(_VALUES)]))
    return "cuda" if single and in_a_memory_format(weight) else "reference"


_operator = Operator(
    "fold_norm(Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, "
    "Tensor running_var, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=reference,
    kernels={},
    choose=_choose,
    validate=_validate,
    stands_in=True,
    cpp_checks=True,
)


def fold_norm(
    weight: torch.Tensor,  # (C', ...)
    bias: torch.Tensor | None,  # (C',)
    norm_weight: torch.Tensor | None,  # (C',)
    norm_bias: torch.Tensor | None,  # (C',)
    running_mean: torch.Tensor | None,  # (C',)
    running_var: torch.Tensor,  # (C',)
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (C', ...), (C',), (C',) or (0,)
    r"""Weight and bias of the convolution that does the work of the frozen batch norm behind it.

    .. math:: s_o = \gamma_o / \sqrt{\sigma^2_o + \epsilon}, \qquad W'_o = s_o W_o, \qquad
              b'_o = \beta_o + (b_o - \mu_o) s_o

    Args:
        weight: ``(C', ...)`` of a convolution.
        bias: ``(C',)`` of it, or None.
        norm_weight, norm_bias: ``(C',)`` or None, gamma and beta.
        running_mean: ``(C',)``; None where only the weight and the scale are wanted.
        running_var: ``(C',)``.
        eps: added to the variance.
        dtype: of the scaled weight.

    Returns:
        ``W'`` in ``dtype``, laid out as ``weight``, computed in the dtype of weight and scale together and rounded
        once; ``s`` in the statistics' dtype (float32 for half types); and ``b'``, empty without ``running_mean``.

    Raises:
        ValueError: a tensor has not one value an output.
    """
    return _operator.call(weight, bias, norm_weight, norm_bias, running_mean, running_var, eps, dtype)
