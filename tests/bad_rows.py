"""Channels that do not go with two rows."""

from __future__ import annotations

import pytest
import torch

#: Takes the channels, the error's class and a pattern of its words.
bad_channels_of_two_rows = pytest.mark.parametrize(
    ("channels", "error", "words"),
    [
        pytest.param([0, 2], TypeError, r"^channels: got list, expected a tensor \(k,\) of int64", id="list"),
        pytest.param(
            torch.tensor([0, 1, 2]),
            ValueError,
            r"^channel_weight: got shape .* beside channels of shape \(3,\)",
            id="too many",
        ),
        pytest.param(
            torch.tensor([[0, 2]]),
            ValueError,
            r"^channel_weight: .* expected \(k, ...\) beside \(k,\)",
            id="2-D",
        ),
        pytest.param(
            torch.tensor(2), ValueError, r"^channel_weight: .* beside channels of shape \(\)", id="0-D"
        ),
    ],
)
