"""What fits in a total: every answer was measured and fits, and nothing larger was refused without a measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import ResidualNet, as_trained
from torch import nn

import trady_kernels as tk
from trady_kernels.cost import Budget
from trady_kernels.training.total_memory import (
    EVERYTHING,
    NOTHING,
    OPTIMIZERS,
    StepMeter,
    TrainingStep,
    fit_total,
)

SIZE = 24


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, SIZE, SIZE, generator=generator), torch.arange(size) % 5


@pytest.fixture
def meter() -> StepMeter:
    model = as_trained(ResidualNet()).train()
    tk.sparsify(model, batch_of(1)[0])
    return StepMeter(model, batch_of, F.cross_entropy)


@pytest.mark.parametrize("batch_and_budget", [(1, "100%"), (2, "60%"), (3, "12KiB"), (5, "30%")])
def test_every_answer_was_measured_and_fits(meter: StepMeter, batch_and_budget: tuple[int, str]) -> None:
    """With the total of a step that we know, batches up to that step's fit, and it is nearly spent."""
    batch_size, budget = batch_and_budget
    total = meter.measure(batch_size, Budget.parse(budget)).total_bytes
    measured: list[tuple[int, Budget]] = []
    steps = fit_total(meter, total, 64, lambda *asked: measured.append(asked))
    assert all(step.total_bytes <= total for step in steps)
    assert {(step.batch_size, step.budget) for step in steps} <= set(measured)
    sizes = [step.batch_size for step in steps]
    assert sizes == sorted(set(sizes)) and sizes[-1] >= batch_size
    assert sizes[:-1] == [2**exponent for exponent in range(len(sizes) - 1)]
    assert meter.measure(sizes[-1] + 1, NOTHING).total_bytes > total
    for step in steps:
        if step.budget not in (EVERYTHING, NOTHING):
            assert step.selected_bytes <= step.budget.amount
    at_its_size = meter.measure(sizes[0], EVERYTHING)
    assert steps[0].total_bytes == at_its_size.total_bytes or steps[0].total_bytes > 0.9 * total


def test_a_large_total_takes_everything(meter: StepMeter) -> None:
    steps = fit_total(meter, 1 << 30, 6)
    assert [step.batch_size for step in steps] == [1, 2, 4, 6]
    assert all(step.budget_text == "100%" and step.share == 1 for step in steps)


def test_where_nothing_fits_the_smallest_total_is_named(meter: StepMeter) -> None:
    smallest = meter.measure(1, NOTHING).total_bytes
    with pytest.raises(
        ValueError, match=f"^total: got {smallest - 1:,} bytes, .* {smallest:,}, which"
    ) as caught:
        fit_total(meter, smallest - 1, 8)
    assert "\n" not in str(caught.value)
    (step,) = fit_total(meter, smallest, 1)
    assert (step.batch_size, step.channels, step.budget_text) == (1, 0, None)


class Straight(StepMeter):
    """Totals that are known: a line in the batch size and the budget, with bits from the first channel on."""

    weights, per_image, bits, state, full_per_image, full_weights = 10**7, 4 * 10**5, 10**5, 1.5, 10**6, 10**7

    def measure(self, batch_size: int, budget: Budget, draws: int = 1) -> TrainingStep:
        full = self.full_weights + batch_size * self.full_per_image
        spent = {EVERYTHING: full, NOTHING: 0}.get(budget, min(int(budget.amount), full))
        peak = batch_size * (self.per_image + self.bits * bool(spent)) + int(self.state * spent)
        return TrainingStep(
            batch_size, budget, spent, spent / full, spent // 1000, self.weights, 0, 0, 0, 0, peak
        )

    def best(self, batch_size: int, total: int) -> int:
        """The largest budget that fits."""
        left = total - self.weights - batch_size * (self.per_image + self.bits)
        return min(int(left / self.state), self.full_weights + batch_size * self.full_per_image)


@pytest.mark.parametrize("total", [10_430_000, 10_520_000, 11_000_000, 14_000_000, 30_000_000, 60_000_000])
def test_answers_are_near_the_best(meter: StepMeter, total: int) -> None:
    straight = Straight(meter.model, batch_of, F.cross_entropy)
    asked: list[tuple[int, Budget]] = []
    steps = fit_total(straight, total, 64, lambda *measurement: asked.append(measurement))
    assert len(asked) <= 10 * len(steps) and asked.count((1, NOTHING)) == 1
    largest = min((total - straight.weights) // straight.per_image, 64)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    assert [step.batch_size for step in steps] == sorted({s for s in sizes if s < largest} | {largest})
    for step in steps:
        best = straight.best(step.batch_size, total)
        assert step.total_bytes <= total
        if best >= straight.measure(step.batch_size, EVERYTHING).selected_bytes:
            assert step.budget == EVERYTHING
        elif best > 8192:
            assert (0.75 if best > 100_000 else 0.3) * best <= step.selected_bytes <= best


def test_channels_come_from_the_pool_alone(meter: StepMeter) -> None:
    whole, part = meter.measure(2, EVERYTHING), replace(meter, pool="only neck").measure(2, EVERYTHING)
    layer = meter.model.get_submodule("neck")
    assert part.channels == len(layer.channels) == layer.channel_count < whole.channels
    assert part.saved_bytes < whole.saved_bytes


def test_the_optimisers_step_is_in_the_peak() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.ReLU(), nn.Linear(64, 5))
    meter = StepMeter(tk.sparsify(model, batch_of(1)[0]), batch_of, F.cross_entropy)
    sgd, adam = (replace(meter, optimizer=name).measure(1, EVERYTHING) for name in ("sgd", "adam"))
    rows = 64 * 3 * SIZE * SIZE * 4
    assert sgd.gradient_bytes >= rows and adam.peak_bytes > sgd.peak_bytes + 0.9 * rows


def measured_with(meter: StepMeter, optimizer: str) -> TrainingStep:
    return replace(meter, optimizer=optimizer).measure(2, Budget.parse("50%"))


def test_optimiser_state_is_in_the_total(meter: StepMeter) -> None:
    steps = {name: measured_with(meter, name) for name in OPTIMIZERS}
    gradients = steps["sgd"].gradient_bytes
    parameters = tk.trainable_parameters(meter.model)
    assert gradients == sum(p.numel() * 4 for p in parameters if p.requires_grad)
    assert steps["sgd"].optimizer_bytes == 0
    assert steps["sgd-momentum"].optimizer_bytes == gradients
    assert 2 * gradients <= steps["adam"].optimizer_bytes == steps["adamw"].optimizer_bytes < 2.1 * gradients
    for step in steps.values():
        assert step.peak_bytes >= step.saved_bytes and step.batch_bytes == 2 * (3 * SIZE * SIZE * 4 + 8)
        assert (
            step.total_bytes - step.optimizer_bytes >= step.peak_bytes + step.batch_bytes + step.model_bytes
        )


def test_measuring_moves_no_weight(meter: StepMeter) -> None:
    before = {name: value.clone() for name, value in meter.model.state_dict().items()}
    measured_with(meter, "adam")
    assert all(torch.equal(value, before[name]) for name, value in meter.model.state_dict().items())
    assert all(parameter.grad is None for parameter in meter.model.parameters())


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [("optimizer", "sdg", "expected one of sgd, sgd-momentum"), ("scheme", "full", "which has no budget")],
)
def test_bad_arguments_get_one_sentence(meter: StepMeter, argument: str, value: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: got '{value}'") as caught:
        replace(meter, **{argument: value})
    assert expected in str(caught.value)
