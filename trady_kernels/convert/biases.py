"""Which biases train: those of the last layers, and of the frozen norms behind them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral

from torch import nn

from trady_kernels.convert.example_run import Calls


def check_biases(biases: object) -> None:
    """Raise where ``sparsify`` cannot take it.

    Raises:
        ValueError: neither a bool nor a number of layers.
    """
    if not isinstance(biases, Integral) or biases < 0:
        raise ValueError(
            f"biases: got {biases!r}, expected True for every sparse layer's, False, or the number of last layers, "
            "from 0"
        )


def biases_to_train(
    names: Mapping[nn.Module, str],
    sparse: Collection[str],
    norms: Collection[str],
    calls: Calls,
    folded: Mapping[str, str],
    biases: bool | int,
) -> dict[str, nn.Parameter]:
    """The biases of the last sparse layers in the order of calls, and those of the frozen norms behind them.

    A norm stands behind the convolution that it is folded into, or else behind the layer called last before it.
    None of their gradients takes an activation (Sparse Update, arXiv 2206.15472, trains the last layers' so).

    Args:
        names: the network's modules.
        sparse: names of the sparse layers.
        norms: names of the frozen batch norms.
        calls: of an example run.
        folded: ``{name: name of the convolution}`` of what convolutions do.
        biases: as ``sparsify`` takes it.

    Returns:
        ``{parameter name: parameter}``.
    """
    order = [name for name in dict.fromkeys(reversed(calls.layers)) if name in sparse]
    chosen = set(order if biases is True else order[: int(biases)])
    found: dict[str, nn.Parameter] = {}
    for module, name in names.items():
        layer = folded.get(name, calls.before_norm.get(name)) if name in norms else name
        bias = module._parameters.get("bias")  # a parametrised one is no parameter of the module's own
        if layer in chosen and (name in sparse or name in norms) and bias is not None:
            found[f"{name}.bias"] = bias
    return found
