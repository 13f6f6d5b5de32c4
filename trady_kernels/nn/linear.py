"""``SparseLinear``: ``nn.Linear`` that trains selected input features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trady_kernels.functional import sparse_linear
from trady_kernels.functional.stored import Stored
from trady_kernels.nn.channels import Channels, SparseChannels
from trady_kernels.ops import scatter_channels_

torch.fx.wrap("sparse_linear")  # one node of a traced graph, as a dense layer is


class SparseLinear(SparseChannels, nn.Linear):
    r"""``nn.Linear`` that trains the weights of selected input features and keeps only those for backward.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear`` takes them.
        channels: the input features to train: None for all, an int for that many at random, or a 1-D index
            tensor or sequence.
        stored: "exact" keeps the selected values, "8bit" one byte for each and a scale for each 64; see
            :data:`trady_kernels.functional.stored.Stored`.

    Attributes:
        weight: ``(O, I)``, the whole weight, frozen, always up to date.
        channel_weight: ``(k, O)``, the trainable rows, one a selected input feature; the same object for the
            life of the module, and not in ``state_dict()``.
        channels: ``(k,)`` int64, sorted, the input feature of each row.

    Raises:
        TypeError, ValueError, IndexError: bad ``channels`` or ``stored``, or what ``nn.Linear`` raises.

    Source: TraDy, arXiv 2510.19675, section 3; PaCA, arXiv 2503.01905.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels: Channels = None,
        stored: Stored = "exact",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._register_rows(channels, stored)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, channels: Channels = None, stored: Stored = "exact"
    ) -> SparseLinear:
        """A sparse layer with copies of a dense one's values, in its mode and on its device.

        Args:
            module: an ``nn.Linear``, left as it is.
            channels, stored: as for the constructor.

        Raises:
            TypeError: ``module`` is not an ``nn.Linear``, or has a forward of its own.
            TypeError, ValueError, IndexError: bad ``channels`` or ``stored``.
        """
        cls._check_dense(module, nn.Linear, SparseLinear)
        sparse = cls(**_arguments(module), channels=0, stored=stored)
        return sparse._copy_from(module, channels)

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with copies of this layer's values, in its mode and on its device."""
        return self._copy_to(nn.Linear(**_arguments(self)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (..., I) -> (..., O)
        return self.compute(input, *self._operands(), self.channels)

    def compute(
        self, input: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None, channels: torch.Tensor
    ) -> torch.Tensor:
        return sparse_linear(input, weight, self.bias, rows, channels, self.stored)

    @property
    def channel_count(self) -> int:
        return self.in_features

    def read_rows(self, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        return weight.t().index_select(0, channels).contiguous()

    def write_rows(self, weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor) -> None:
        scatter_channels_(weight, channels, rows)


def _arguments(module: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "device": "meta",
        "dtype": module.weight.dtype,
    }
