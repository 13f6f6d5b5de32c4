"""Autocast for the sparse Functions: cast where autograd sees it, never keep a second weight."""

from __future__ import annotations

import torch


def cast_input(input: torch.Tensor) -> torch.Tensor:
    """``input`` in the dtype that autocast gives a convolution or matrix product here.

    ``torch.amp.custom_fwd`` does not fit ``setup_context``, so the cast happens before the Function.
    """
    if not torch._C._is_any_autocast_enabled() or input.is_meta:  # autocast knows no meta device
        return input
    device_type = input.device.type
    if (
        not torch.is_autocast_enabled(device_type)
        or not input.is_floating_point()
        or input.dtype == torch.float64
    ):
        return input
    return input.to(torch.get_autocast_dtype(device_type))
