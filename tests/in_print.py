"""Whether a figure can be read in a column of print, at the size that it is drawn in."""

from __future__ import annotations

from typing import Any

#: Inches of a column, and the least letters in points.
COLUMN, LEAST = 3.5, 6.0


def assert_readable(figure: Any) -> None:
    """As wide as a column, no smaller letters than can be read, and none of them outside the figure."""
    from matplotlib.text import Text

    assert figure.get_size_inches()[0] == COLUMN
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            assert text.get_fontsize() >= LEAST, text.get_text()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.x1 <= width, "letters run out of the figure at its sides"
    assert drawn.y0 >= 0 and drawn.y1 <= height, "letters run out of the figure above or below"
