"""The one table of tolerances."""

from __future__ import annotations

import torch

# Unit roundoff of what a kernel accumulates in, by dtype of its inputs.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float16: 2.0**-24,
}


def sum_tolerance(dtype: torch.dtype, length: int) -> float:
    """Bound on a sum of ``length`` products, relative to the sum of their magnitudes.

    Rounding errors of products with random signs add up like a random walk: a few roundoffs, and slowly
    more for long sums.
    """
    return ROUNDOFF[dtype] * (4 + length**0.5 / 8)


#: Largest error of an element, relative to the largest element of the same gradient: two kernels that round
#: to the dtype and sum in another order.
ROUNDING = {
    torch.float64: 2.0**-44,
    torch.float32: 2.0**-18,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-9,
}

# Unit roundoff of the dtype itself: what one rounding to it costs.
DTYPE_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in ROUNDING}
