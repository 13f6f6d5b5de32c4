"""What a sparse update is on average over draws, beside the gradient of all channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


class NoOverlap(ValueError):
    """No two draws have a channel with a gradient in common, so that nothing is known of their mean."""


@dataclass(frozen=True)
class Expectation:
    """The mean and the scatter of an update that has the gradient of the drawn channels and zeros elsewhere.

    Attributes:
        bias: sine of the angle between the mean update and the gradient, whatever their lengths: 0 where the mean points
            along the gradient, 1 where it is orthogonal.
        variance: mean squared distance of an update from the mean one, over the mean one's squared length. Of uniform
            draws of a share p of channels, all of a price: (1 - p) / p.
        draws: how many.
    """

    bias: float
    variance: float
    draws: int


def length_of(bias: float, variance: float) -> float:
    """Length of the mean update over that of the gradient.

    What is drawn has the gradient's own values, so that the mean squared length of an update is the product of the mean update
    with the gradient; bias and variance then leave one length.
    """
    return math.sqrt(1 - bias**2) / (1 + variance)


def expected_update(
    norms: Mapping[str, torch.Tensor], selections: Iterable[Mapping[str, torch.Tensor]]
) -> Expectation:
    """Bias and variance of the update, from how often each channel was drawn.

    Channels' gradients are orthogonal to each other, so that squared norms and frequencies say everything; the square of a
    frequency is corrected for the number of draws.

    Args:
        norms: ``{layer name: (C,)}`` of the channels' gradients, which stay the same over the draws.
        selections: ``{layer name: (k,)}`` of at least two draws.

    Raises:
        NoOverlap: more draws are needed.
        ValueError: fewer than two draws.
    """
    counts = {name: torch.zeros(len(found), dtype=torch.float64) for name, found in norms.items()}
    draws = 0
    for selection in selections:
        draws += 1
        for name, channels in selection.items():
            counts[name][channels.cpu()] += 1
    if draws < 2:
        raise ValueError(f"selections: got {draws}, expected at least two draws")
    squares = torch.cat([norms[name].double().square() for name in counts])
    share = torch.cat(list(counts.values())) / draws
    share_squared = (draws * share.square() - share) / (draws - 1)
    # Of the update: mean squared length, squared length of its mean, product of its mean with the gradient.
    mean_square, square_of_mean = float((share * squares).sum()), float((share_squared * squares).sum())
    if not mean_square > 0 or not square_of_mean > 0:
        raise NoOverlap(
            f"selections: got {draws} draws that share no channel with a gradient, expected more draws"
        )
    cosine_squared = mean_square**2 / (square_of_mean * float(squares.sum()))
    return Expectation(
        math.sqrt(max(1 - cosine_squared, 0.0)), (mean_square - square_of_mean) / square_of_mean, draws
    )
