"""``SparseConv2d``: ``nn.Conv2d`` that trains selected input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trady_kernels.functional import FrozenNorm, sparse_conv2d
from trady_kernels.functional.conv2d import Margins, margins_of
from trady_kernels.functional.stored import Stored
from trady_kernels.nn.channels import Channels, SparseChannels
from trady_kernels.ops import scatter_channels_

torch.fx.wrap("sparse_conv2d")  # one node of a traced graph, as a dense layer is


class SparseConv2d(SparseChannels, nn.Conv2d):
    r"""``nn.Conv2d`` that trains the weights of selected input channels and keeps only those for backward.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as ``nn.Conv2d`` takes them.
        channels: the input channels to train: None for all, an int for that many at random, or a 1-D index
            tensor or sequence.
        stored: "exact" keeps the selected values, "8bit" one byte for each and a scale for each 64; see
            :data:`trady_kernels.functional.stored.Stored`.

    Attributes:
        weight: ``(C', C/groups, kh, kw)``, the whole weight, frozen, always up to date.
        channel_weight: ``(k, C'/groups, kh, kw)``, the trainable rows, one a selected input channel; the
            same object for the life of the module, and not in ``state_dict()``.
        channels: ``(k,)`` int64, sorted, the input channel of each row.
        folded_norm: the batch norm that ``fold`` took in, or None; no submodule.
        folded_margins: (left, right, top, bottom), the zeros that ``fold`` took in, or None.

    Raises:
        TypeError, ValueError, IndexError: bad ``channels`` or ``stored``, or what ``nn.Conv2d`` raises.

    Source: TraDy, arXiv 2510.19675, section 3; Sparse Update, arXiv 2206.15472.
    """

    # In the instance's __dict__ once folded: a registered submodule would be in state_dict() twice.
    folded_norm: nn.BatchNorm2d | None = None
    folded_margins: Margins | None = None

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
        stored: Stored = "exact",
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
        self._register_rows(channels, stored)

    @classmethod
    def from_dense(
        cls, module: nn.Conv2d, channels: Channels = None, stored: Stored = "exact"
    ) -> SparseConv2d:
        """A sparse layer with copies of a dense one's values, in its mode and on its device.

        Args:
            module: an ``nn.Conv2d``, left as it is.
            channels, stored: as for the constructor.

        Raises:
            TypeError: ``module`` is not an ``nn.Conv2d``, or has a forward of its own.
            ValueError: ``module`` is a sparse layer that ``fold`` gave another one's work.
            TypeError, ValueError, IndexError: bad ``channels`` or ``stored``.
        """
        cls._check_dense(module, nn.Conv2d, SparseConv2d)
        if isinstance(module, SparseConv2d):
            module._check_unfolded("module")
        sparse = cls(**_arguments(module), channels=0, stored=stored)
        return sparse._copy_from(module, channels)

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with copies of this layer's values, in its mode and on its device.

        Raises:
            ValueError: this layer does the work of a folded norm or padding too, which the copy would not.
        """
        self._check_unfolded("to_dense()")
        return self._copy_to(nn.Conv2d(**_arguments(self)))

    @property
    def is_folded(self) -> bool:
        """Whether ``fold`` took anything in."""
        return self.folded_norm is not None or self.folded_margins is not None

    def _check_unfolded(self, what: str) -> None:
        if self.is_folded:
            raise ValueError(
                f"{what}: got a layer with a folded norm or padding, expected a convolution alone: densify(model) first, "
                "or unfold() the layer"
            )

    def _own_margins(self) -> Margins:
        return margins_of(self.padding, self.kernel_size, self.dilation)

    def can_fold_margins(self, margins: Sequence[int]) -> bool:
        """Whether zeros around the input are the same as more padding of the layer's own.

        Args:
            margins: (left, right, top, bottom); negative ones cut the input, which no convolution does.
        """
        if len(margins) != 4 or min(margins) < 0:
            return False
        return self.padding_mode == "zeros" or not any(self._own_margins())

    def fold(self, norm: nn.BatchNorm2d | None = None, margins: Sequence[int] | None = None) -> SparseConv2d:
        """Do from now on the work of the frozen norm behind this layer, and of the zero padding before it.

        The modules there have to become the identity (``FoldedBatchNorm2d``, ``FoldedZeroPad2d``). The norm's
        parameters and statistics are read at every forward and stay where they are: ``state_dict()`` and this
        layer's ``weight`` do not change. Gradients are those with respect to ``weight``.

        Args:
            norm: a batch norm with running statistics, used as in evaluation mode; None leaves what is folded.
                Its bias trains while it requires grad, and nothing is kept for it; so does its weight, at the
                price of the norm's input being kept.
            margins: (left, right, top, bottom), the zeros around the input; None leaves what is folded.

        Returns:
            This layer.

        Raises:
            TypeError: ``norm`` is not an ``nn.BatchNorm2d``.
            ValueError: ``norm`` has no running statistics or another number of features than this layer has
                output channels; ``margins`` are not four ints from 0, or the layer pads with something else
                than zeros (``can_fold_margins`` tells). Nothing has changed then.
        """
        if norm is not None:
            if not isinstance(norm, nn.BatchNorm2d):
                raise TypeError(f"norm: got {type(norm).__name__}, expected an nn.BatchNorm2d or None")
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError("norm: got track_running_stats=False, expected running statistics to fold")
            if norm.num_features != self.out_channels:
                raise ValueError(
                    f"norm: got {norm.num_features} features, expected {self.out_channels}, the layer's "
                    "output channels"
                )
        if margins is not None:
            margins = tuple(margins)
            if not self.can_fold_margins(margins):
                raise ValueError(
                    f"margins: got {margins} for a layer with padding={self.padding!r} and padding_mode="
                    f"{self.padding_mode!r}, expected (left, right, top, bottom) from 0, and padding_mode='zeros'"
                )
            self.__dict__["folded_margins"] = margins
        if norm is not None:
            self.__dict__["folded_norm"] = norm
        return self

    def unfold(self) -> SparseConv2d:
        """Forget what ``fold`` took in: the layer is a convolution alone again.

        Returns:
            This layer.
        """
        self.__dict__.pop("folded_norm", None)
        self.__dict__.pop("folded_margins", None)
        return self

    def hand_back(self, dense: type[nn.Module]) -> None:
        super().hand_back(dense)
        SparseConv2d.unfold(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C', H', W')
        return self.compute(input, *self._operands(), self.channels)

    def compute(
        self, input: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None, channels: torch.Tensor
    ) -> torch.Tensor:
        padding, padding_mode = self.padding, self.padding_mode
        if self.folded_margins is not None:
            own = self._own_margins()
            padding = tuple(a + b for a, b in zip(own, self.folded_margins, strict=True))
            padding_mode = "zeros"
        norm = self.folded_norm
        return sparse_conv2d(
            input,
            weight,
            self.bias,
            rows,
            channels,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            padding_mode,
            None
            if norm is None
            else FrozenNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),  # type: ignore[arg-type]
            self.stored,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.folded_margins is not None:
            text += f", folded_margins={self.folded_margins}"
        return text if self.folded_norm is None else f"{text}, folded_norm=(eps={self.folded_norm.eps})"

    @property
    def channel_count(self) -> int:
        return self.in_channels

    @property
    def trains_beside_rows(self) -> bool:
        norm = self.folded_norm
        return super().trains_beside_rows or (
            norm is not None and any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
        )

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
        scatter_channels_(weight, channels, rows, self.groups)


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
