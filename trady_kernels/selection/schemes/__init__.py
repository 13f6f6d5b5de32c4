"""The selection schemes: one file each, one registry."""

from __future__ import annotations

from trady_kernels.selection.schemes.bias_only import BiasOnly
from trady_kernels.selection.schemes.d_det_rgn import DDetRgn
from trady_kernels.selection.schemes.d_full_random import DFullRandom
from trady_kernels.selection.schemes.full import Full
from trady_kernels.selection.schemes.head_only import HeadOnly
from trady_kernels.selection.schemes.last_layers import LastLayers
from trady_kernels.selection.schemes.late import Late
from trady_kernels.selection.schemes.medyate import Medyate
from trady_kernels.selection.schemes.s_det_rgn import SDetRgn
from trady_kernels.selection.schemes.s_full_random import SFullRandom
from trady_kernels.selection.schemes.s_topk_random import STopKRandom
from trady_kernels.selection.schemes.scheme import Scheme
from trady_kernels.selection.schemes.sparse_update import SparseUpdate
from trady_kernels.selection.schemes.trady import Trady

#: By name; a scheme of the user's own joins them by ``SCHEMES[MyScheme.name] = MyScheme``.
SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (
        Trady,
        STopKRandom,
        DFullRandom,
        SFullRandom,
        DDetRgn,
        SDetRgn,
        Medyate,
        SparseUpdate,
        LastLayers,
        Late,
        HeadOnly,
        BiasOnly,
        Full,
    )
}


def find_scheme(name: str | Scheme) -> Scheme:
    """The scheme of that name; a scheme itself is that scheme.

    Raises:
        ValueError: there is none, or it needs more than its name.
    """
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"scheme: got {name!r}, expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]()


__all__ = ["SCHEMES", "Scheme", "SparseUpdate", "find_scheme"]
