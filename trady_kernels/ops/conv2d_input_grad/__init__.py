"""``conv2d_input_grad``: a convolution's input gradient, without an input, and ``conv2d_depthwise_input_grad`` under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trady_kernels.ops.backend import FLOATING, HALVES, TRITON_INSTALLED, Operator
from trady_kernels.ops.conv2d_input_grad import aten
from trady_kernels.ops.conv2d_input_grad.reference import conv2d_depthwise_input_grad as reference
from trady_kernels.ops.conv2d_input_grad.reference import conv2d_input_grad as by_backward
from trady_kernels.ops.layout import memory_format_of

#: Size and stride of the square kernels, not dilated, that Triton's kernel has variants without loops for.
USUAL_KERNELS = ((3, 1), (3, 2), (5, 1), (5, 2))


def is_usual(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether the kernel is among ``USUAL_KERNELS``."""
    square = kernel_size[0] == kernel_size[1] and stride[0] == stride[1] and max(dilation) == 1
    return square and (kernel_size[0], stride[0]) in USUAL_KERNELS


def _validate(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    if grad_output.dim() != 4 or grad_output.dtype not in FLOATING:
        raise ValueError(
            f"grad_output: got shape {tuple(grad_output.shape)} of {grad_output.dtype}, expected (N, C, H', W') of "
            "a floating dtype"
        )
    if (
        weight.dim() != 4
        or weight.shape[:2] != (grad_output.shape[1], 1)
        or weight.dtype != grad_output.dtype
    ):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} of {weight.dtype}, expected ({grad_output.shape[1]}, 1, kh, kw) "
            f"of {grad_output.dtype}, a kernel for each channel of grad_output"
        )
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride, padding, dilation: got {tuple(stride)}, {tuple(padding)} and {tuple(dilation)}, expected at "
            "least 1, 0 and 1 each"
        )
    for axis in (0, 1):
        reach = input_size[axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[axis + 2] - 1) - 1
        if reach < 0 or grad_output.shape[axis + 2] != reach // stride[axis] + 1:
            raise ValueError(
                f"input_size: got {tuple(input_size)}, expected one that a convolution makes "
                f"{tuple(grad_output.shape[2:])} of, the size of grad_output"
            )


def _fake(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    return torch.empty(
        (*grad_output.shape[:2], *input_size),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=memory_format_of(grad_output),
    )


def _choose(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str:
    if not grad_output.is_cuda:
        return "aten" if grad_output.dtype in aten.ONEDNN else "reference"
    ours = TRITON_INSTALLED and is_usual(weight.shape[2:], stride, dilation) and grad_output.dtype in HALVES
    # Contiguous planes have no vectors of channels.
    ours = ours and weight.shape[0] % 8 == 0 and memory_format_of(grad_output) is torch.channels_last
    return "triton" if ours else "reference"


_operator = Operator(
    "conv2d_depthwise_input_grad(Tensor grad_output, Tensor weight, SymInt[2] input_size, int[2] stride, "
    "int[2] padding, int[2] dilation) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels={"aten": aten.conv2d_depthwise_input_grad},
    choose=_choose,
    validate=_validate,
    stands_in=True,
    triton=f"{__name__}.triton_kernel",
)


def conv2d_input_grad(
    grad_output: torch.Tensor,  # (N, C', H', W')
    weight: torch.Tensor,  # (C', C/groups, kh, kw)
    shape: Sequence[int],  # (N, C, H, W)
    memory_format: torch.memory_format,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:  # (N, C, H, W)
    """Gradient of a convolution with respect to its input.

    On a CPU a product takes 0.5 to 0.9 of ``convolution_backward``'s time on 1x1 layers, a transposed convolution 0.94
    to 1.07 on the others (geometric means by family, worst layer 1.17; benchmarks/conv2d_input_grad.py, its results
    beside it), both without the full-size tensor. Groups and dtypes outside of oneDNN, where transposed
    convolutions are slower, stay with ``convolution_backward``. On a GPU that is taken but for depthwise layers of half
    types in channels_last. All give the same but for a few roundings.

    Args:
        grad_output: ``(N, C', H', W')``.
        weight: ``(C', C/groups, kh, kw)``, of the same dtype.
        shape: of the input, ``(N, C, H, W)``.
        memory_format: of the result.
        stride, padding, dilation: pairs of ints, (height, width).
        groups: the layer's groups.

    Returns:
        ``(N, C, H, W)``.
    """
    grad_output = grad_output.contiguous(memory_format=memory_format)
    size = shape[2:]
    on_cpu = grad_output.device.type == "cpu"
    if groups == weight.shape[0] == shape[1] and groups > 1:
        grad = _operator.call(grad_output, weight, size, stride, padding, dilation)
    elif on_cpu and groups == 1 and tuple(weight.shape[2:]) == (1, 1) and not any(padding):
        grad = aten.points(grad_output, weight, size, stride, memory_format)
    elif on_cpu and groups == 1 and grad_output.dtype in aten.ONEDNN:
        grad = aten.transposed(grad_output, weight, size, stride, padding, dilation, groups)
    else:
        grad = by_backward(grad_output, weight, size, stride, padding, dilation, groups)
    return grad.contiguous(memory_format=memory_format)
