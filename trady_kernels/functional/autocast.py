"""Autocast for the sparse Functions: cast where autograd sees it, never keep a second weight."""

from __future__ import annotations

import torch


def cast_input(input: torch.Tensor) -> torch.Tensor:
    """``input`` in the dtype that autocast gives a convolution or matrix product here.

    ``torch.amp.custom_fwd`` does not fit ``setup_context``, so the cast happens before the Function.
    """
    dtype = autocast_dtype(input)
    return input if dtype is input.dtype else input.to(dtype)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autocast gives an operand of a convolution or matrix product here."""
    if not torch._C._is_any_autocast_enabled() or tensor.is_meta:  # autocast knows no meta device
        return tensor.dtype
    device_type = tensor.device.type
    if (
        not torch.is_autocast_enabled(device_type)
        or not tensor.is_floating_point()
        or tensor.dtype == torch.float64
    ):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)
