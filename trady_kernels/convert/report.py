"""What ``sparsify`` says about a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

ATTRIBUTE = "_conversion_report"


@dataclass(frozen=True)
class ConversionReport:
    """What ``sparsify`` made of a network.

    Attributes:
        head: name of the layer or module that stays dense and trains; None if there is none.
        sparse: names of the layers whose input channels can be selected.
        frozen_norms: names of the batch norms with fixed statistics, those folded into a convolution included.
        folded: ``{name: name of the convolution}`` of the norms and paddings that a convolution does.
        lean: names of the activations, poolings and dropouts that keep bits, offsets or shapes.
        dense: ``{name: why}`` of the layers and norms that stay as they are; their parameters do not train.
        kept: ``{name: bytes}`` of what other modules keep for backward in the example run when everything
            before them trains; empty without an example. "" is the network's own forward.
        biases: ``{parameter name: elements}`` of the biases of sparse layers and frozen norms that train.
    """

    head: str | None
    sparse: tuple[str, ...]
    frozen_norms: tuple[str, ...]
    dense: Mapping[str, str]
    folded: Mapping[str, str] = field(default_factory=dict)
    lean: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    biases: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        norms = len(self.frozen_norms)
        folded = sum(name in self.folded for name in self.frozen_norms)
        lines = [
            f"{len(self.sparse)} sparse layers, {norms} frozen norms ({folded} folded into their convolution), "
            f"{len(self.lean)} lean modules, "
            + (f"head {self.head!r}" if self.head is not None else "no head")
        ]
        if self.biases:
            lines.append(f"{len(self.biases)} biases train, {sum(self.biases.values()):,} elements")
        if self.dense:
            lines.append("stay dense and frozen:")
            lines += _aligned(self.dense)
        if self.kept:
            lines.append("stay as they are and keep, in the example run:")
            largest_first = sorted(self.kept.items(), key=lambda item: -item[1])
            lines += _aligned(
                {name or "(the network itself)": f"{size:>15,} B" for name, size in largest_first}
            )
        return "\n".join(lines)


def _aligned(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


def find_report(model: nn.Module) -> ConversionReport | None:
    """The report that ``sparsify`` left in a network or a part of it."""
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def _reports(model: nn.Module) -> dict[nn.Module, ConversionReport]:
    """The reports of a network and of parts of it that ``sparsify`` converted by themselves, outer ones first."""
    return {m: m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__}


def biases_of_reports(model: nn.Module) -> list[nn.Parameter]:
    """The biases that ``sparsify`` let train, in a network or in parts of it that it converted by themselves."""
    return [part.get_parameter(name) for part, report in _reports(model).items() for name in report.biases]


def folded_of_reports(model: nn.Module, names: Mapping[nn.Module, str]) -> dict[str, str]:
    """What convolutions do already, in a network or in parts of it: ``folded`` by the network's names."""
    folded = {}
    for part, report in _reports(model).items():
        inside = dict(part.named_modules(remove_duplicate=False))
        for name, conv in report.folded.items():
            if name in inside and conv in inside:  # neither has been replaced by something else
                folded[names[inside[name]]] = names[inside[conv]]
    return folded


def head_of_part(model: nn.Module, names: Mapping[nn.Module, str], layer: nn.Module) -> str | None:
    """The head of the part that ``sparsify`` converted by itself and that holds ``layer``, by the network's names.

    Raises:
        LookupError: no report tells of ``layer``.
    """
    for part, report in _reports(model).items():
        inside = dict(part.named_modules(remove_duplicate=False))
        if layer in inside.values():
            return None if report.head is None else names[inside[report.head]]
    raise LookupError(names[layer])


def conversion_report(model: nn.Module) -> ConversionReport:
    """What ``sparsify`` made of a network: its head, its sparse layers, what stayed dense and why.

    Raises:
        ValueError: ``model`` has not been through ``sparsify``.
    """
    report = find_report(model)
    if report is None:
        raise ValueError(
            f"model: got a {type(model).__name__} without a conversion report, expected one that sparsify(model) "
            "has converted"
        )
    return report
