"""ReLU and its kin as modules that keep one bit an element for backward.

Each is torch's class with another ``forward`` and no attributes of its own, so that setting ``__class__`` on a
torch module makes it lean, and setting it back undoes that.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import nn

from trady_kernels.functional.activation import hardsigmoid, hardtanh, leaky_relu, relu


class _Overwriting:
    #: True where nobody else reads the input or keeps it for backward, so that the output may take its place.
    overwrites_input = False
    inplace: bool

    def _in_place(self, input: torch.Tensor) -> bool:
        if self.inplace:
            return True
        # The compiler reuses memory by itself. Leaves that require grad, and the views that backward hooks hand on,
        # cannot be overwritten.
        return (
            self.overwrites_input
            and not torch.compiler.is_compiling()
            and not (input.requires_grad and (input.is_leaf or input._is_view()))
            and not _may_be_checkpointed()
        )


def _may_be_checkpointed() -> bool:
    """Whether an activation checkpoint may hold the input for its second forward.

    A reentrant checkpoint runs the first one without gradients, the other kind with hooks for saved tensors.
    """
    if not torch.is_grad_enabled():
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


class LeanReLU(_Overwriting, nn.ReLU):
    """``nn.ReLU`` that keeps one bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return relu(input, self._in_place(input))


class LeanHardtanh(_Overwriting, nn.Hardtanh):
    """``nn.Hardtanh`` that keeps one bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return hardtanh(input, self.min_val, self.max_val, self._in_place(input))


class LeanReLU6(_Overwriting, nn.ReLU6):
    """``nn.ReLU6`` that keeps one bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return hardtanh(input, self.min_val, self.max_val, self._in_place(input))


class LeanLeakyReLU(_Overwriting, nn.LeakyReLU):
    """``nn.LeakyReLU`` that keeps one bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return leaky_relu(input, self.negative_slope, self._in_place(input))


class LeanHardsigmoid(_Overwriting, nn.Hardsigmoid):
    """``nn.Hardsigmoid`` that keeps one bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (...) -> (...)
        return hardsigmoid(input, self._in_place(input))
