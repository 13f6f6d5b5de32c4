"""Schemes combined with ingredients: how they are named, what they train, what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.memory import measure_memory
from trady_kernels.models import MobileNetV2
from trady_kernels.selection import SCHEMES
from trady_kernels.training.checkpointing import blocks_of, checkpoint_blocks
from trady_kernels.training.ingredients import INGREDIENTS, PRESETS, Spec, scheme_names, tuned_as
from trady_kernels.training.settings import Settings


def test_a_spec_is_a_scheme_and_ingredients() -> None:
    for scheme in SCHEMES:
        spec = Spec.parse(scheme)
        assert spec.scheme == scheme and spec.budgeted == SCHEMES[scheme].budgeted
        assert [part.name for part in spec.ingredients] == (["bias"] if scheme == "bias-only" else [])
    spec = Spec.parse("medyate+stats+8bit+bias")
    assert (spec.scheme, [part.name for part in spec.ingredients]) == ("medyate", ["stats", "8bit", "bias"])
    assert spec.sparsify == {"lean": "8bit", "stored": "8bit", "biases": True}
    assert spec.notes == [INGREDIENTS[name].note for name in ("stats", "8bit", "bias")]
    assert Spec.parse("full+stats").ingredients == (INGREDIENTS["stats"],)
    assert Spec.parse("trady+bias@5.5%").budget == "5.5%" and Spec.parse("trady@100").budget == "100"
    assert Spec.parse("trady").budget is None
    assert (spec.momentum, Spec.parse("full+momentum").momentum) == (0.0, 0.9)
    assert Spec.parse("bias-only+8bit").sparsify == {"lean": "8bit", "stored": "8bit", "biases": True}


def test_a_preset_is_a_combination_with_a_name() -> None:
    for name, combined in PRESETS.items():
        assert Spec.parse(name) == Spec.parse(combined) and name in scheme_names()
        assert Spec.parse(f"{name}+stats@3%") == Spec.parse(f"{combined}+stats@3%")
    with pytest.raises(ValueError, match=r"got 'frugal\+bias', which has an ingredient twice"):
        Spec.parse("frugal+bias")


@pytest.mark.parametrize(
    ("text", "tuned"),
    [
        ("trady+accumulate", "trady"),
        ("full+accumulate+momentum", "full+momentum"),
        ("medyate+accumulate", "medyate+accumulate"),
        ("medyate+bias+accumulate@5%", "medyate+bias+accumulate@5%"),
    ],
)
def test_accumulation_changes_what_a_scheme_observes(text: str, tuned: str) -> None:
    assert tuned_as(text) == tuned


def test_with_momentum_the_rate_is_that_much_lower() -> None:
    settings = Settings()
    for scheme in ("trady", "full"):
        with_momentum = settings.learning_rate_of(f"{scheme}+momentum")
        assert with_momentum == pytest.approx(settings.learning_rate_of(scheme) / 10)
    assert Settings(learning_rate=0.3).learning_rate_of("frugal") == 0.3


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("trudy+bias", "got 'trudy', expected one of trady, "),
        ("", "got '', expected one of trady, "),
        ("trady+bais", "got 'trady+bais', in which 'bais' is no ingredient, expected one of bias, 8bit, stats, "),
        ("trady+", "'' is no ingredient"),
        ("trady+bias+bias", "got 'trady+bias+bias', which has an ingredient twice"),
        ("full@5%", "got 'full@5%', expected no budget after the scheme full, which has none"),
        ("bias-only+bias", "which has an ingredient twice"),
        ("full+bias", "got 'full+bias', expected only ingredients that go with full: stats, checkpoint, accumulate, momentum"),
        ("full+stats+8bit", "got 'full+stats+8bit', expected only ingredients that go with full"),
        ("trady+checkpoint", "expected only ingredients that go with trady: bias, 8bit, stats, accumulate, momentum"),
    ),
)  # fmt: skip
def test_bad_specs_get_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^scheme: ") as caught:
        Spec.parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_checkpointed_blocks_have_the_same_gradients_and_keep_less() -> None:
    torch.manual_seed(0)
    dense = MobileNetV2(num_classes=4, width=0.35).double().eval()
    checkpointed = copy.deepcopy(dense)
    checkpoint_blocks(checkpointed)
    assert len(blocks_of(dense)) == 17
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3])
    for model in (dense, checkpointed):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    for (name, theirs), (_, ours) in zip(
        dense.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        # The same kernels on the same numbers, in float64; atol for gradients that are zero but for rounding.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14, msg=name)
    assert checkpointed.state_dict().keys() == dense.state_dict().keys()
    kept = [measure_memory(model, batch, F.cross_entropy).saved_bytes for model in (checkpointed, dense)]
    assert kept[0] < kept[1] / 4
    with pytest.raises(ValueError, match="without a sequence of blocks"):
        checkpoint_blocks(nn.Linear(2, 2))
