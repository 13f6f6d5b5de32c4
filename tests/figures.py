"""What figures have been drawn with: that a panel is not empty does not show in its ink, of which frame and words have enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that matplotlib saves from here on, in a list that grows."""
    figures: list[Any] = []
    figure_class = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib is not installed: pip install matplotlib"
    ).Figure
    save = figure_class.savefig

    def note(figure: Any, *arguments: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **settings)

    monkeypatch.setattr(figure_class, "savefig", note)
    return figures


def assert_drawn(figure: Any, least: int = 1) -> None:
    """Every panel has at least so many lines, bars, areas or images with a finite point in sight; a scale of colours has one.

    Frames, words, grids and lines from one side of a panel to the other, as ``axhline`` draws them, do not count.
    """
    assert figure.axes, "no panels"
    for axes in figure.axes:
        wanted = 1 if hasattr(axes, "_colorbar") else least
        found = list(data_of(axes))
        assert len(found) >= wanted, f"{axes.get_title() or axes.get_label()!r} has {len(found)} of {wanted}"


def data_of(axes: Any) -> Iterator[Any]:
    """What is drawn of data in a panel."""
    for image in axes.images:
        if np.isfinite(np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)).any():
            yield image
    (left, right), (low, high) = map(sorted, (axes.get_xlim(), axes.get_ylim()))
    for artist in (*axes.lines, *axes.collections, *axes.patches):
        # Of the transform of a line across the panel only one of the two coordinates is of data.
        if not (_offsets(artist) or all(artist.get_transform().contains_branch_seperately(axes.transData))):
            continue
        x, y = _points(artist).T
        if ((left <= x) & (x <= right) & (low <= y) & (y <= high)).any():
            yield artist


def _offsets(artist: Any) -> bool:
    """Whether it is of markers, which stand at places of their own."""
    return type(artist).__name__ == "PathCollection"


def _points(artist: Any) -> np.ndarray:
    if hasattr(artist, "get_xydata"):
        return np.asarray(artist.get_xydata(), float).reshape(-1, 2)
    if _offsets(artist):
        return np.ma.filled(np.ma.asarray(artist.get_offsets(), float), np.nan).reshape(-1, 2)
    if hasattr(artist, "get_paths"):
        return np.concatenate([np.empty((0, 2)), *(path.vertices for path in artist.get_paths())])
    return artist.get_patch_transform().transform(artist.get_path().vertices)
