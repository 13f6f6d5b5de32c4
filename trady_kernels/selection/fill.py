"""What fits into a budget, in a given order."""

from __future__ import annotations

import torch


def that_fit(order: torch.Tensor, prices: torch.Tensor, limit: int) -> torch.Tensor:
    """Those of ``order`` that fit, each in its turn: one that would overflow is skipped, and the rest goes on.

    Args:
        order: ``(n,)`` int64, what is tried, first things first.
        prices: int64, of everything that ``order`` indexes.
        limit: of all prices together.

    Returns:
        int64, in the order of ``order``.
    """
    taken, left = [], limit
    if len(order):
        prices = prices[order]
        cheapest = int(prices.min())
        for index, price in zip(order.tolist(), prices.tolist(), strict=True):
            if price <= left:
                taken.append(index)
                left -= price
                if left < cheapest:
                    break
    return torch.tensor(taken, dtype=torch.int64)
