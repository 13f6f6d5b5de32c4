"""``quantize_blocks`` and ``dequantize_blocks``: a tensor in 8 bits an element and one scale per 64."""

from __future__ import annotations

import torch

from trady_kernels.ops.backend import FLOATING, Operator, by_device
from trady_kernels.ops.layout import is_dense
from trady_kernels.ops.quantize_blocks.reference import BLOCK
from trady_kernels.ops.quantize_blocks.reference import dequantize_blocks as dequantize_reference
from trady_kernels.ops.quantize_blocks.reference import quantize_blocks as quantize_reference


def blocks_of(elements: int) -> int:
    """Number of scales that ``elements`` codes have."""
    return (elements + BLOCK - 1) // BLOCK


def _fake_quantize(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    elements = input.numel()
    codes = torch.empty(elements, dtype=torch.int8, device=input.device)
    return codes, torch.empty(blocks_of(elements), dtype=torch.float32, device=input.device)


def _fake_dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _validate_quantize(input: torch.Tensor) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"input: got {input.dtype}, expected float32, float64, bfloat16 or float16")
    if not is_dense(input):
        raise ValueError(
            f"input: got shape {tuple(input.shape)} with strides {input.stride()}, which leave gaps or overlap, "
            "expected a dense tensor: give input.clone()"
        )


def _validate_dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
    if codes.dim() != 1 or codes.dtype != torch.int8 or not codes.is_contiguous():
        raise ValueError(
            f"codes: got shape {tuple(codes.shape)} of {codes.dtype}, expected a contiguous 1-D int8 tensor"
        )
    expected = (blocks_of(codes.numel()),)
    if tuple(scales.shape) != expected or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(
            f"scales: got shape {tuple(scales.shape)} of {scales.dtype}, expected {expected} of torch.float32, "
            f"contiguous, one for each {BLOCK} codes"
        )
    if dtype not in FLOATING:
        raise ValueError(f"dtype: got {dtype}, expected float32, float64, bfloat16 or float16")


_quantize = Operator(
    "quantize_blocks(Tensor input) -> (Tensor, Tensor)",
    reference=quantize_reference,
    fake=_fake_quantize,
    kernels={},
    choose=by_device,
    validate=_validate_quantize,
    triton=f"{__name__}.triton_kernel",
)
_dequantize = Operator(
    "dequantize_blocks(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    fake=_fake_dequantize,
    kernels={},
    choose=by_device,
    validate=_validate_dequantize,
    triton=f"{__name__}.triton_kernel",
)


def quantize_blocks(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""A dense tensor in 8 bits an element, with one scale for each 64 elements in the order of memory.

    .. math:: s = \max_{i \in block} |x_i| / 127, \qquad q_i = round(x_i / s), \qquad
              |x_i - s q_i| \le s / 2 = \max_{i \in block} |x_i| / 254

    up to rounding of float32 (relative 2^-16 of the bound). A block whose largest magnitude is under 2^-119
    counts as zero. What is not finite: minus infinity, as attention masks have it, has the code -128 and
    comes back as it is; a block with a NaN, plus infinity or a magnitude over 127 times float32's largest
    gets the scale NaN and comes back as NaN throughout.

    Args:
        input: any shape, dense in any order of dimensions, float32, float64, bfloat16 or float16.

    Returns:
        ``codes`` ``(n,)`` int8, n the number of elements, in the order of memory, and ``scales``
        ``(ceil(n / 64),)`` float32.

    Raises:
        ValueError: another dtype, or strides that leave gaps or overlap.
    """
    return _quantize.call(input)


def dequantize_blocks(
    codes: torch.Tensor,  # (n,)
    scales: torch.Tensor,  # (ceil(n / 64),)
    dtype: torch.dtype,
) -> torch.Tensor:  # (n,)
    """What ``quantize_blocks`` made codes of, to half a scale.

    Args:
        codes: ``(n,)`` int8.
        scales: ``(ceil(n / 64),)`` float32.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        ``(n,)`` of ``dtype``: code times scale, rounded once; minus infinity for the code -128.

    Raises:
        ValueError: another dtype, or shapes that do not fit.
    """
    return _dequantize.call(codes, scales, dtype)
