"""Schemes combined with ingredients: how they are named, what they train, what they keep."""

from __future__ import annotations

import pytest

from trady_kernels.selection import SCHEMES
from trady_kernels.training.ingredients import INGREDIENTS, Spec


def test_a_spec_is_a_scheme_and_ingredients() -> None:
    for scheme in SCHEMES:
        spec = Spec.parse(scheme)
        assert spec.scheme == scheme and spec.budgeted == SCHEMES[scheme].budgeted
        assert [part.name for part in spec.ingredients] == (["bias"] if scheme == "bias-only" else [])
    spec = Spec.parse("medyate+stats+8bit+bias")
    assert (spec.scheme, [part.name for part in spec.ingredients]) == ("medyate", ["stats", "8bit", "bias"])
    assert spec.sparsify == {"lean": "8bit", "biases": True}
    assert spec.notes == [INGREDIENTS[name].note for name in ("stats", "8bit", "bias")]
    assert Spec.parse("full+stats").ingredients == (INGREDIENTS["stats"],)
    assert Spec.parse("bias-only+8bit").sparsify == {"lean": "8bit", "biases": True}


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("trudy+bias", "got 'trudy', expected one of trady, "),
        ("", "got '', expected one of trady, "),
        ("trady+bais", "got 'trady+bais', in which 'bais' is no ingredient, expected one of bias, 8bit, stats"),
        ("trady+", "'' is no ingredient"),
        ("trady+bias+bias", "got 'trady+bias+bias', which has an ingredient twice"),
        ("bias-only+bias", "which has an ingredient twice"),
        ("full+bias", "got 'full+bias', expected only ingredients that leave the network dense, as full does: stats"),
        ("full+stats+8bit", "got 'full+stats+8bit', expected only ingredients that leave the network dense"),
    ),
)  # fmt: skip
def test_bad_specs_get_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^scheme: ") as caught:
        Spec.parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)
