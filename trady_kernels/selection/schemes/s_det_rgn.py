"""``s-det-rgn``: the channels with the most gradient for what they cost, chosen once."""

from __future__ import annotations

from trady_kernels.selection.schemes.d_det_rgn import DDetRgn


class SDetRgn(DDetRgn):
    """As ``d-det-rgn``, an oracle too, chosen once, before the first step.

    Source: TraDy (S-Det RGN), arXiv 2510.19675, section 4.3.
    """

    name = "s-det-rgn"
    every_epoch = False
