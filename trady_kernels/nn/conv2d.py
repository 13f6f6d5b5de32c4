"""``SparseConv2d``: ``nn.Conv2d`` that trains selected input channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trady_kernels.functional import sparse_conv2d
from trady_kernels.nn.channels import Channels, SparseChannels

torch.fx.wrap("sparse_conv2d")  # one node of a traced graph, as a dense layer is


class SparseConv2d(SparseChannels, nn.Conv2d):
    r"""``nn.Conv2d`` that trains the weights of selected input channels and keeps only those for backward.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as ``nn.Conv2d`` takes them.
        channels: the input channels to train: None for all, an int for that many at random, or a 1-D index
            tensor or sequence.

    Attributes:
        weight: ``(C', C/groups, kh, kw)``, the whole weight, frozen, always up to date.
        channel_weight: ``(k, C'/groups, kh, kw)``, the trainable rows, one a selected input channel; the
            same object for the life of the module, and not in ``state_dict()``.
        channels: ``(k,)`` int64, sorted, the input channel of each row.

    Raises:
        TypeError, ValueError, IndexError: bad ``channels``, or what ``nn.Conv2d`` raises.

    Source: TraDy, arXiv 2510.19675, section 3; Sparse Update, arXiv 2206.15472.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels: Channels = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._register_rows(channels)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, channels: Channels = None) -> SparseConv2d:
        """A sparse layer with copies of a dense one's values, in its mode and on its device.

        Args:
            module: an ``nn.Conv2d``, left as it is.
            channels: as for the constructor.

        Raises:
            TypeError: ``module`` is not an ``nn.Conv2d``.
            TypeError, ValueError, IndexError: bad ``channels``.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"module: got {type(module).__name__}, expected an nn.Conv2d")
        sparse = cls(**_arguments(module), channels=0)
        return sparse._copy_from(module, channels)

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with copies of this layer's values, in its mode and on its device."""
        return self._copy_to(nn.Conv2d(**_arguments(self)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C', H', W')
        weight, rows = self._operands()
        return sparse_conv2d(
            input,
            weight,
            self.bias,
            rows,
            self.channels,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
        )

    @property
    def channel_count(self) -> int:
        return self.in_channels

    def _by_channel(self, weight: torch.Tensor) -> torch.Tensor:
        """View ``(groups, C/groups, C'/groups, kh, kw)``: what belongs to each input channel."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def _position(self, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_group = self.in_channels // self.groups
        return channels.div(per_group, rounding_mode="floor"), channels.remainder(per_group)

    def read_rows(self, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1).index_select(0, channels).contiguous()
        return self._by_channel(weight)[self._position(channels)].contiguous()

    def write_rows(self, weight: torch.Tensor, channels: torch.Tensor, rows: torch.Tensor) -> None:
        if self.groups == 1:
            weight.transpose(0, 1).index_copy_(0, channels, rows)
        else:
            self._by_channel(weight).index_put_(self._position(channels), rows)


def _arguments(module: nn.Conv2d) -> dict[str, Any]:
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "bias": module.bias is not None,
        "padding_mode": module.padding_mode,
        "device": "meta",
        "dtype": module.weight.dtype,
    }
