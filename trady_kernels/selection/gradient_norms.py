"""``GradientNorms``: how large the gradients of the selected channels are, step by step, without keeping one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed
from torch.utils.hooks import RemovableHandle

from trady_kernels.nn.channels import SparseChannels


class GradientNorms:
    """Norms of the rows of ``channel_weight``'s gradients, added up over backward passes.

    A row is added when its gradient is complete: under gradient accumulation once a pass, of the sum so far.
    A pass whose norms are not all finite does not count: a loss scaler skips the step of one that overflowed.

    Args:
        layers: sparse layers by name; none costs nothing.
    """

    def __init__(self, layers: Mapping[str, SparseChannels]) -> None:
        self._layers = layers
        self._sums: dict[str, torch.Tensor] = {}
        #: Where the sums are: a pass counts or not without the host's waiting for it.
        self._steps: dict[str, torch.Tensor] = {}
        self._latest: dict[str, torch.Tensor] = {}
        self._start_watching()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's layers come without the hooks, which would add to the sums of the original.
        vars(self).update(state)
        self._start_watching()
        self._watch()

    def restart(self) -> None:
        """Forget what was added up, and watch the rows that the layers have now."""
        self._sums.clear()
        self._steps.clear()
        self._latest.clear()
        self._watch()

    def _start_watching(self) -> None:
        self._handles: dict[str, RemovableHandle] = {}
        # The layers outlive this object; without it their hooks would add up for nobody.
        weakref.finalize(self, _remove, self._handles)

    def _watch(self) -> None:
        for name, layer in self._layers.items():
            rows = layer.channel_weight
            if name not in self._handles and rows.requires_grad:
                self._handles[name] = rows.register_post_accumulate_grad_hook(
                    _adding(name, self._sums, self._steps, self._latest)
                )

    def means(self) -> dict[str, torch.Tensor]:
        """``{layer: (k,)}`` on the CPU, the mean over passes that reached the layer and over ranks; alike on each.

        Without the layers, and the ranks, of which no pass counts.
        """
        found = {}
        for name in self._layers:
            if name in self._sums:
                steps = self._steps[name]
                mean, ranks = self._sums[name] / steps.clamp(min=1), (steps > 0).to(torch.float32)
                *mean, share = _mean_over_ranks(torch.cat([mean, ranks[None]])).cpu().split([len(mean), 1])
                if share > 0:
                    found[name] = mean[0] / share
        return found

    def latest(self) -> float:
        """Norm of the whole gradient of the selected channels in the latest pass, the root mean square over ranks; not
        finite where a gradient was not.

        On a GPU the host waits for it.
        """
        if not self._latest:
            return 0.0
        squares = torch.stack([norms.square().sum() for norms in self._latest.values()]).sum()
        return float(_mean_over_ranks(squares).sqrt())

    def state_dict(self) -> dict[str, Any]:
        """What was added up since the last :meth:`restart`."""
        steps = {name: int(count) for name, count in self._steps.items()}
        return {name: (total.cpu(), steps[name]) for name, total in self._sums.items() if steps[name]}

    def checked(self, state_dict: Mapping[str, Any], selection: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A ``state_dict`` that is certain to load while ``selection`` trains.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: it is no such thing.
        """
        found = {}
        for name, (total, steps) in state_dict.items():
            if name not in self._layers or total.shape != selection[name].shape or int(steps) < 1:
                raise ValueError(f"got {steps} sums of {tuple(total.shape)} norms for {name!r}")
            found[name] = (total.float(), int(steps))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on adding to what :meth:`state_dict` gave."""
        for name, (total, steps) in state_dict.items():
            self._sums[name] = torch.as_tensor(total).to(self._layers[name].channel_weight.device)
            self._steps[name] = torch.tensor(int(steps), device=self._sums[name].device)


def _mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value = value / distributed.get_world_size()
    return value


def _adding(
    name: str, sums: dict[str, torch.Tensor], steps: dict[str, torch.Tensor], latest: dict[str, torch.Tensor]
) -> Callable[[torch.Tensor], None]:
    def add(rows: torch.Tensor) -> None:
        if rows.grad is None:
            return
        with torch.no_grad():
            norms = torch.linalg.vector_norm(rows.grad.flatten(1).float(), dim=1)
            latest[name] = norms
            finite = norms.isfinite().all()
            counted = norms.where(finite, 0)
            sums[name] = sums[name] + counted if name in sums else counted
            steps[name] = steps[name] + finite if name in steps else finite.long()

    return add


def _remove(handles: dict[str, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
