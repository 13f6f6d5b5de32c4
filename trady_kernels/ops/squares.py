"""How much of a gradient exists at a time where only the norms of its rows are wanted."""

from __future__ import annotations

#: Rows, as csrc/cpu/squares.h has them too: few, and enough for the tiles of a matrix product.
SQUARED_ROWS = 32
