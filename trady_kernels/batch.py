"""How an example or a training batch is fed to a network, and a run that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

#: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
Example = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, mappings and objects with attributes, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value))


def storage_key(tensor: torch.Tensor) -> int:
    """A number that tensors have in common where they share memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # nothing has an address on the meta device


def call(model: nn.Module, example: Example) -> Any:
    """The network's output for an example.

    Raises:
        TypeError: ``example`` is not a tensor, a tuple or a mapping.
    """
    if isinstance(example, torch.Tensor):
        return model(example)
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    raise TypeError(
        f"example_input: got {type(example).__name__}, expected a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments"
    )


def input_of(batch: Example) -> Example:
    """What of a training batch the network is called with: all but the target of a pair."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def loss_of(model: nn.Module, batch: Example, loss_fn: Callable[..., torch.Tensor] | None) -> torch.Tensor:
    """Loss of one batch.

    Args:
        model: the network.
        batch: a tensor, a pair ``(input, target)`` whose input is a tensor, tuple or dict, or a dict of
            keyword arguments.
        loss_fn: called with the output, and with the target where the batch is a pair; without it the
            output's ``loss``, else the sum of the output's floating-point tensors.

    Raises:
        TypeError: a batch of another kind, or an output without a floating-point tensor.
        ValueError: a tuple that is not a pair.
    """
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise ValueError(f"batch: got a tuple of {len(batch)}, expected a pair (input, target)")
        output = call(model, batch[0])
        if loss_fn is not None:
            return loss_fn(output, batch[1])
    elif isinstance(batch, torch.Tensor | Mapping):
        output = call(model, batch)
        if loss_fn is not None:
            return loss_fn(output)
    else:
        raise TypeError(
            f"batch: got {type(batch).__name__}, expected a tensor, a pair (input, target) or a dict of keyword "
            "arguments"
        )
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    sums = [tensor.sum() for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not sums:
        raise TypeError(
            f"model: got an output of {type(output).__name__} without a floating-point tensor, expected one, or "
            "a loss_fn that makes a loss of it"
        )
    return torch.stack([part.float() for part in sums]).sum()


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Let modules that ``torch.compile`` has taken over run as they would without: Dynamo cannot trace our hooks."""
    taken_over = any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )
    # Not always: functions that are compiled by themselves have no module inside, and keep less as they are.
    return torch.compiler.set_stance("force_eager") if taken_over else nullcontext()


@contextmanager
def without_trace(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Leave modes, buffers, gradients and random numbers as they were, whatever runs inside.

    What waits for a parameter's gradient, to count it or to step at once, is not called. Compiled modules run
    uncompiled. A buffer that the run replaces by one of another shape, a cache that grew, stays as the run left it.

    Args:
        model: the network that runs inside.
        training: mode of every module inside; None leaves each as it is.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # Autograd has hold of these dicts: they are emptied and filled again, not replaced.
    waiting = [
        (hooks, dict(hooks))
        for parameter in model.parameters()
        if (hooks := getattr(parameter, "_post_accumulate_grad_hooks", None))
    ]
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with _uncompiled(model), torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for hooks, _ in waiting:
                hooks.clear()
            if training is not None:
                model.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, name, buffer, value in buffers:
                _put_back(module, name, buffer, value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for hooks, own in waiting:
                hooks.update(own)


def _put_back(module: nn.Module, name: str, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Make ``buffer`` the module's again, and its value what it was."""
    now = module._buffers[name] if name in module._buffers else None
    if now is not None and now is not buffer and (now.shape, now.dtype) == (buffer.shape, buffer.dtype):
        module._buffers[name] = buffer
    if buffer.is_inference() or buffer.is_meta:  # not to be written, and without a value
        return
    with torch.no_grad():
        if not torch.equal(buffer, value):
            buffer.copy_(value)
