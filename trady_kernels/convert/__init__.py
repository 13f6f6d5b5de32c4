"""Whole networks: which module becomes which, and back."""

from trady_kernels.convert.layers import (
    select_everywhere,
    select_fraction,
    sparse_layers,
    trainable_parameters,
)
from trady_kernels.convert.network import densify, sparsify
from trady_kernels.convert.report import ConversionReport, conversion_report

__all__ = [
    "ConversionReport",
    "conversion_report",
    "densify",
    "select_everywhere",
    "select_fraction",
    "sparse_layers",
    "sparsify",
    "trainable_parameters",
]
