"""``FrozenBatchNorm2d``: batch norm that never leaves its running statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.functional.norm import frozen_batch_norm
from trady_kernels.nn.channels import computes_as


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with fixed statistics and affine, under ``train()`` too; keeps no activation.

    ``state_dict()`` is the dense module's. ``weight`` and ``bias`` have ``requires_grad=False``; set it to True
    and they are trained again: the bias keeps nothing, the weight its input.

    Args:
        num_features, eps, momentum, affine, device, dtype: as ``nn.BatchNorm2d`` takes them; ``momentum`` is
            kept for ``to_dense()`` only.

    Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 2.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H, W)
        self._check_input_dim(input)
        statistics = (self.running_mean, self.running_var)
        if self.affine and self.weight.requires_grad:
            return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.0, self.eps)
        return frozen_batch_norm(input, self.weight, self.bias, *statistics, self.eps)

    @classmethod
    def from_dense(cls, module: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """A frozen norm with copies of a dense one's values, in its mode and on its device.

        Args:
            module: an ``nn.BatchNorm2d`` with running statistics, left as it is.

        Raises:
            TypeError: ``module`` is not an ``nn.BatchNorm2d``, or has a forward of its own.
            ValueError: it tracks no running statistics, so there is nothing to freeze.
        """
        if not isinstance(module, nn.BatchNorm2d):
            raise TypeError(f"module: got {type(module).__name__}, expected an nn.BatchNorm2d")
        if not (computes_as(module, nn.BatchNorm2d) or computes_as(module, FrozenBatchNorm2d)):
            raise TypeError(
                f"module: got a {type(module).__name__} with a forward of its own, expected that of nn.BatchNorm2d"
            )
        if module.running_mean is None or module.running_var is None:
            raise ValueError("module: got track_running_stats=False, expected running statistics to freeze")
        place = (module.running_mean.device, module.running_mean.dtype)
        frozen = cls(module.num_features, module.eps, module.momentum, module.affine, *place)
        frozen.load_state_dict(module.state_dict())
        return frozen.train(module.training)

    def to_dense(self) -> nn.BatchNorm2d:
        """An ``nn.BatchNorm2d`` with copies of this layer's values, in its mode and on its device.

        Raises:
            TypeError: this layer does not compute what an ``nn.BatchNorm2d`` does.
        """
        if not computes_as(self, FrozenBatchNorm2d):
            raise TypeError(
                f"to_dense(): got a {type(self).__name__} with a forward of its own, expected that of "
                "FrozenBatchNorm2d: densify(model) gives a network its classes back"
            )
        place = (self.running_mean.device, self.running_mean.dtype)
        dense = nn.BatchNorm2d(self.num_features, self.eps, self.momentum, self.affine, True, *place)
        dense.load_state_dict(self.state_dict())
        return dense.train(self.training)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """A ``FrozenBatchNorm2d`` whose work the convolution before it does (``SparseConv2d.fold``): the identity.

    It still holds the parameters and statistics, which the convolution reads at every forward.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return input
