"""Values that an elementwise operation can get wrong, and a comparison that notices."""

from __future__ import annotations

import torch

INF, NAN = float("inf"), float("nan")


def identical(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal with NaN equal to NaN, and 0 not to -0."""
    same = (actual == expected) & (actual.signbit() == expected.signbit())
    return actual.dtype == expected.dtype and bool((same | (actual.isnan() & expected.isnan())).all())


def awkward(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, among them all that an activation can get wrong."""
    values = torch.randn(count, dtype=torch.float64).mul(4).to(dtype)
    corners = [
        -INF,
        INF,
        NAN,
        0.0,
        -0.0,
        6.0,
        -3.0,
        5.9999,
        6.0001,
        2.3,
        6.1,
        -0.1,
        1e-45,
        -1e-45,
        1e-7,
        -6e-8,
    ]
    places = torch.randperm(count)[: min(count // 2, 4 * len(corners))]
    values[places] = torch.tensor(corners, dtype=torch.float64).to(dtype).repeat(4)[: len(places)]
    return values
