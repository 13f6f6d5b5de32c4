"""The studies of whole gradients: what is noted of a step, what the reports make of it, a run on a small network."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import assert_drawn, data_of, saved_figures
from image_folders import write_images
from provenance import PROVENANCE
from torch import nn

from trady_kernels.cli import main
from trady_kernels.study import gradients as gradients_module
from trady_kernels.study import studies
from trady_kernels.study.cells import CellFile, NothingFinished, run_cells
from trady_kernels.study.gradients import (
    BINS_PER_OCTAVE,
    OCTAVES,
    Gradients,
    Look,
    Looks,
    _Looking,
    plan_of,
)
from trady_kernels.study.ranks import (
    FAR_BELOW,
    _compare,
    _matrix,
    channel_agreement,
    channel_test,
    channels_section,
    epoch_agreements,
    far_below,
    later_agreements,
    layer_agreement,
    ranks_section,
    share_apart,
    stable_from,
    tasks_apart,
    tasks_test,
    topology,
)
from trady_kernels.study.results import RECIPES as RECIPES_OF_RESULTS
from trady_kernels.study.results import Request, Size
from trady_kernels.study.statistics import held
from trady_kernels.study.studies import STUDIES, document
from trady_kernels.study.tail_index import TailIndex
from trady_kernels.study.tails import (
    FALL,
    _falling,
    density,
    exceeding,
    falling_density,
    falling_exceeding,
    gaussian_density,
    gaussian_exceeding,
    histograms_section,
    in_published,
    layer_means,
    share_beyond,
    tails_section,
)
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.settings import Settings

ON_GRADIENTS = [name for name, study in STUDIES.items() if study.cells == "gradients.json"]
DOCS = Path(__file__).parent.parent / "docs"


def test_what_is_noted_of_every_step() -> None:
    """Against the gradients themselves: two epochs of three steps through a grouped convolution, a linear and a head."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    looking = _Looking(classes=3, seed=0)
    looking.on_scheme("full", SchemeResult("full", "", 0.1, 1, 1), steps_per_epoch=3)
    by_channel: dict[str, list[torch.Tensor]] = {"0": [], "3": []}
    whole: dict[str, list[torch.Tensor]] = {"0": [], "3": []}
    for step in range(6):
        model.zero_grad()
        model(torch.randn(5, 4, 4, 4)).square().sum().backward()
        looking.on_gradients(model)
        grouped, linear = model[0].weight.grad, model[3].weight.grad
        for name, gradient, channels in (
            ("0", grouped, [grouped[3 * (c // 2) : 3 * (c // 2) + 3, c % 2] for c in range(4)]),
            ("3", linear, list(linear.t())),
        ):
            by_channel[name].append(torch.stack([part.norm() for part in channels]))
            whole[name].append(gradient.flatten().clone())
        if step % 3 == 2:
            looking.on_epoch(EpochFigures(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    found = looking.found(0.5)
    assert found.steps == [1, 2, 3, 4, 6] and set(found.layer_norms) == {"0", "3"}, (
        "the head is no layer to choose"
    )
    for name in ("0", "3"):
        # Three digits are kept of each channel's norm, five of everything else.
        assert found.channel_norms[name] == pytest.approx(sum(by_channel[name]).tolist(), rel=5e-3)
        norms = torch.stack(whole[name]).norm(dim=1).cumsum(0)
        assert found.layer_norms[name] == pytest.approx(norms[[0, 1, 2, 3, 5]].tolist(), rel=1e-4)
        elements = torch.cat(whole[name])
        assert found.deviations[name] == pytest.approx(elements.square().mean().sqrt().item(), rel=1e-4)
        assert sum(found.histograms[name]) == int((elements != 0).sum())
        assert found.elements[name] == len(elements)
        place = -OCTAVES[0] * BINS_PER_OCTAVE  # of magnitudes from 1 to 2^0.5
        inside = (elements.abs() >= 1) & (elements.abs() < 2**0.5)
        assert found.histograms[name][place] == int(inside.sum())
    assert {block: len(alphas) for block, alphas in found.alphas.items()} == {"16": 2, "256": 2}
    # Of the linear layer's first epoch, in the order that it was given.
    index = TailIndex(16)
    order = looking._orders["3.weight"]
    for gradient in whole["3"][:3]:
        index.add(gradient[order])
    assert found.layer_alphas["3"][0] == pytest.approx(index.alpha, rel=1e-4)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def run_of(norms: list[list[float]], channels: list[float], alpha: float = 1.5) -> Gradients:
    """A run of layers a, b, ... with these norms after the steps 1, 2, 4, and these channel norms in each layer."""
    names = [chr(ord("a") + place) for place in range(len(norms))]
    bins = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
    counts = [0] * bins
    counts[-OCTAVES[0] * BINS_PER_OCTAVE] = 90  # from 1 to 1.4
    counts[(4 - OCTAVES[0]) * BINS_PER_OCTAVE] = 10  # from 16 to 22
    return Gradients(
        top1=0.8,
        alphas={"16": [alpha, alpha + 0.1], "256": [alpha, None]},
        layer_alphas={name: [alpha - 0.2 * place, None] for place, name in enumerate(names)},
        steps=[1, 2, 4],
        layer_norms=dict(zip(names, norms, strict=True)),
        channel_norms={name: [place + 0.5 + norm for norm in channels] for place, name in enumerate(names)},
        histograms=dict.fromkeys(names, counts),
        elements=dict.fromkeys(names, 200),
        deviations=dict.fromkeys(names, 2.0),
    )


AGREEING = run_of([[1, 2, 3], [2, 3, 4], [3, 4, 9]], [1.0, 2.0, 3.0, 4.0])
OTHER = run_of([[3, 4, 5], [2, 3, 4], [1, 2, 9]], [4.0, 3.0, 2.5, 1.0], alpha=1.25)


def test_agreement_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    last = [[norms[-1] for norms in run.layer_norms.values()] for run in (AGREEING, OTHER)]
    assert layer_agreement(AGREEING, OTHER) == pytest.approx(stats.spearmanr(*last).statistic)
    assert channel_agreement(AGREEING, OTHER) == pytest.approx(-1.0)
    flat = [[norm for norms in run.channel_norms.values() for norm in norms] for run in (AGREEING, OTHER)]
    paired = stats.ttest_rel(*flat)
    assert channel_test(AGREEING, OTHER) == pytest.approx((paired.statistic, paired.pvalue))
    assert all(map(math.isnan, channel_test(AGREEING, AGREEING)))


def test_every_pair_of_runs_is_in_the_matrix(looks: Looks) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    cells = list(looks)
    matrix = _matrix(_compare(looks, cells, layer_agreement), cells, 1.0)
    last = [[norms[-1] for norms in looks[cell].layer_norms.values()] for cell in cells]
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            assert value == pytest.approx(stats.spearmanr(last[row], last[column]).statistic)


def test_agreement_of_epochs_is_of_each_ones_own() -> None:
    """Two epochs of two steps: norms 2, 3, 4 and then 1, 2, 3 and 1, 1, 5."""
    run = run_of([[1, 2, 3], [2, 3, 4], [3, 4, 9]], [1.0])
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    expected = stats.spearmanr([2, 3, 4], [1, 1, 5]).statistic
    assert epoch_agreements(run, 2) == [pytest.approx(expected)] and epoch_agreements(run, 1) == []
    assert later_agreements(run, 2) == [pytest.approx(expected)] and later_agreements(run, 1) == []
    four = later_agreements(dataclasses.replace(run, steps=[1, 2, 3]), 3)
    assert four == [
        pytest.approx(stats.spearmanr([1, 2, 3], [2, 2, 6]).statistic),
        pytest.approx(stats.spearmanr([2, 3, 4], [1, 1, 5]).statistic),
    ]


def seeds_of(channels: list[float], layers: int, noise: float, seed: int, runs: int = 3) -> list[Gradients]:
    generator = torch.Generator().manual_seed(seed)
    return [
        run_of(
            [[1, 2, 3]] * layers,
            [norm * float(1 + noise * torch.randn((), generator=generator)) for norm in channels],
        )
        for _ in range(runs)
    ]


def looks_of(runs: dict[str, list[Gradients]], path: Path) -> Looks:
    cells: Looks = CellFile(path, (Look, Gradients), {task: RECIPES["mnist"] for task in runs})
    cells.begin(PROVENANCE)
    for task, of_task in runs.items():
        for seed, run in enumerate(of_task):
            cells.add(Look(task, seed), run)
    return cells


def test_tasks_are_told_apart_by_their_channels_not_by_their_size(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    channels = [1.0 + 0.37 * (place * 7 % 40) for place in range(40)]
    first, second = seeds_of(channels, 2, 0.05, 1), seeds_of(channels, 2, 0.05, 2)

    def found(name: str, **runs: list[Gradients]) -> tuple[list[float], Any, str]:
        looks = looks_of(runs, tmp_path / name)
        cells = list(looks)
        test = tasks_test(_compare(looks, cells, channel_agreement), cells)
        return tasks_apart(looks, cells), test, "\n".join(channels_section(looks))

    groups = [[topology(run) for run in runs] for runs in (first, second)]
    p = stats.ttest_ind(*(torch.stack(group) for group in groups), equal_var=False).pvalue
    assert share_apart(*groups) == pytest.approx((p < 0.05).mean())
    shares, test, text = found("same", a=first, b=second)
    assert shares == [pytest.approx((p < 0.05).mean())] and shares[0] < 0.2
    assert test.divisions == 10 and "not decided at the level of 5%, F is" in text
    shares, test, text = found("other", a=first, b=seeds_of(channels[::-1], 2, 0.05, 2))
    assert shares[0] > 0.7 and test.p == pytest.approx(0.1) and test.statistic > 50
    assert (
        "not decided at the level of 5%" in text
        and "of 10 divisions of 6 runs; p cannot be below 0.100" in text
    ), "two tasks of three seeds cannot reach 5%"
    three = {"a": first, "b": seeds_of(channels[::-1], 2, 0.05, 2)}
    three["c"] = seeds_of([channels[place * 3 % 40] for place in range(40)], 2, 0.05, 3)
    shares, test, text = found("three", **three)
    assert len(shares) == 3 and test.p == pytest.approx(1 / 280)
    assert "holds, F is" in text and "(p 0.004, of 280 divisions of 9 runs)." in text
    larger = [
        dataclasses.replace(
            run, channel_norms={n: [9 * v for v in norms] for n, norms in run.channel_norms.items()}
        )
        for run in second
    ]
    shares, test, _ = found("larger", a=first, b=larger)
    assert shares == [pytest.approx((p < 0.05).mean())], "the size does not count"
    assert test.statistic == pytest.approx(found("same again", a=first, b=second)[1].statistic)
    assert found("alone", a=first[:1], b=second)[0] == []


def test_when_a_ranking_is_stable() -> None:
    """The layers' order is the last one's from the second step on; where it changes at the end, from the end on."""
    assert stable_from(run_of([[3, 2, 3], [2, 3, 4], [1, 4, 9]], [1.0])) == 2
    assert stable_from(OTHER) == 4 and stable_from(AGREEING) == 1


def test_share_beyond() -> None:
    """Of 200 elements, half of which are zero, 10 are beyond 16 / 2 = 8 standard deviations, none beyond 11.3."""
    edges, above = exceeding(AGREEING, "a")
    shares = dict(zip(edges, above, strict=True))
    assert shares[0.5] == 0.5 and shares[8.0] == pytest.approx(0.05) and shares[16.0] == 0.0
    assert share_beyond(AGREEING, "a", 3.0) == share_beyond(AGREEING, "a", 8.0) == pytest.approx(0.05)
    assert share_beyond(AGREEING, "a", 8 * 2**0.25) == pytest.approx(0.025), (
        "half of a bin that is half an octave"
    )
    assert share_beyond(AGREEING, "a", 1e-20) == 0.5 and share_beyond(AGREEING, "a", 1e9) == 0.0
    middles, densities = density(AGREEING, "a")
    assert middles == pytest.approx([0.5 * 2**0.25, 8 * 2**0.25])
    widths = [0.5 * (2**0.5 - 1), 8 * (2**0.5 - 1)]
    assert sum(d * w for d, w in zip(densities, widths, strict=True)) == pytest.approx(0.5), "but for zeros"
    assert gaussian_exceeding(1.0) == pytest.approx(0.31731, rel=1e-4) and gaussian_exceeding(0.0) == 1.0
    step = 1e-3
    area = step * sum(gaussian_density(step * at) for at in range(1000, 8000))
    assert area == pytest.approx(gaussian_exceeding(1.0), rel=1e-2)


RECIPES = {task: Settings(epochs=2, train_samples=40, threads=1, data=task) for task in ("mnist", "digits")}


@pytest.fixture
def looks(tmp_path: Path) -> Looks:
    cells: Looks = CellFile(tmp_path / "gradients.json", (Look, Gradients), RECIPES)
    cells.begin(PROVENANCE)
    for seed in range(2):
        cells.add(Look("mnist", seed), AGREEING)
        cells.add(Look("digits", seed), OTHER)
    return CellFile(tmp_path / "gradients.json", (Look, Gradients))


def test_verdicts_on_some_cases() -> None:
    assert [held(count, 3) for count in (0, 1, 3)] == ["does not hold", "holds in part", "holds"]


def test_tails(looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    tails = "\n".join(tails_section(looks))
    assert re.search(r"\| mnist +\| efficientnet_lite0 \|", tails) and "80.0 ± 0.0" in tails
    # Layers a, b, c have 0.2 less each than all gradients, and in the second epoch no finite index, which counts as 2.
    assert layer_means([AGREEING, OTHER]) == pytest.approx({"a": 1.6875, "b": 1.5875, "c": 1.4875})
    assert re.search(r"\| mnist +\| c +\| +1.55 \| a +\| +1.75 \|", tails)
    # Each of four runs has two values with sums of 16: mnist's 1.5, 1.6, digits' 1.25, 1.35; one finite with sums of 256.
    claim = "is between 1.3 and 2 (TraDy)*, efficientnet_lite0, sums of"
    assert (
        f"{claim} 16: holds in part, in 6 of 8 epochs of all runs, with indices from 1.25 to 1.60." in tails
    )
    assert (
        f"{claim} 256: holds in part, in 2 of 8 epochs of all runs, with indices from 1.25 to 1.50." in tails
    )
    assert "in 4 of 8" in in_published([1.5, 1.6, 2.0, 1.3, 1.25, 2.4, None, None], 16)[1], (
        "infinite ones are outside"
    )
    assert in_published([None], 16) == ("does not hold", "in 0 of 1 epochs of all runs")
    assert in_published([2.1], 16)[0] == "does not hold" and in_published([2.1], 256)[0] == "holds", (
        "of long sums there are fewer, so that the estimate is worse"
    )
    assert "| Gaussians of lognormal scale | 0.945 ±" in tails


@pytest.mark.parametrize(
    ("longer", "words"),
    [
        (
            (0.24, 0.26, 0.25),
            "does not hold, sums of 256 give +0.25 (p < 0.001) against sums of 16, more in 3 of 3 runs.",
        ),
        ((0.02, -0.02, 0.0), "not refuted at the level of 5%, sums of 256 give +0.00 (p 1.000)"),
        ((0.24,), "not refuted at the level of 5%, sums of 256 give +0.24 against"),
    ],
)
def test_an_index_that_depends_on_the_sums_is_none_of_a_stable_law(
    tmp_path: Path, longer: tuple[float, ...], words: str
) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    runs = [
        dataclasses.replace(AGREEING, alphas={"16": [1.1, 1.2], "256": [1.1 + more, 1.2 + more]})
        for more in longer
    ]
    text = "\n".join(tails_section(looks_of({"mnist": runs}, tmp_path / "gradients.json")))
    assert f"sums of every length give one index (TraDy)*, efficientnet_lite0: {words}" in text


def test_networks_have_verdicts_of_their_own(tmp_path: Path) -> None:
    """As the committed runs do: one network is in TraDy's range, the other is not."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    recipes = {**RECIPES, "tweets": dataclasses.replace(RECIPES["mnist"], model="minilm")}
    cells: Looks = CellFile(tmp_path / "gradients.json", (Look, Gradients), recipes)
    cells.begin(PROVENANCE)
    cells.add(Look("mnist", 0), run_of([[1, 2, 3]] * 2, [1.0, 2.0], alpha=1.0))
    cells.add(Look("tweets", 0), AGREEING)
    tails, histograms = "\n".join(tails_section(cells)), "\n".join(histograms_section(cells))
    assert "efficientnet_lite0, sums of 16: does not hold, in 0 of 2" in tails
    assert "minilm, sums of 16: holds, in 2 of 2" in tails
    assert (
        "efficientnet_lite0: holds, in 2 of 2 layers" in histograms
        and "minilm: holds, in 3 of 3" in histograms
    )


def test_ranks(looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    ranks = "\n".join(ranks_section(looks))
    worst = "worst is 0.50, of mnist, seed 0 (80.0%) and digits, seed 0 (80.0%)."
    assert f"efficientnet_lite0: does not hold, {worst}" in ranks and "1 to 4 of 4" in ranks
    assert "without" not in ranks.partition("\n|")[2], "no training failed"
    # digits' order is stable from the last of four steps on, mnist's from the first; and of the last two steps alone:
    # 2, 3, 4 of mnist beside 1, 1, 5, and 4, 3, 2 of digits beside 1, 1, 7.
    assert (
        "A few epochs suffice for a ranking (TraDy)*, efficientnet_lite0: holds in part, after epoch 1 of 2 the ranking agrees "
        "with the whole run's by 0.95 or more in 2 of 4 runs; with that of the epochs after it alone its correlation is -0.87 to "
        "0.87." in ranks
    )


def test_a_few_epochs_are_all_but_the_last(tmp_path: Path) -> None:
    """Stable from the second of three epochs on, one step each: one epoch is not a few."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    run = dataclasses.replace(run_of([[3, 4, 5], [2, 5, 9], [1, 6, 9.5]], [1.0]), steps=[1, 2, 3])
    cells: Looks = CellFile(
        tmp_path / "gradients.json",
        (Look, Gradients),
        {"mnist": dataclasses.replace(RECIPES["mnist"], epochs=3)},
    )
    cells.begin(PROVENANCE)
    for seed in range(2):
        cells.add(Look("mnist", seed), run)
    assert (
        "efficientnet_lite0: holds, after epoch 2 of 3 the ranking agrees with the whole run's by 0.95 or more in 2 of 2 runs "
        "(after epoch 1 in 0); with that of the epochs after it alone its correlation is 0.50 to 0.50 (after epoch 1 -1.00 to "
        "-1.00)." in "\n".join(ranks_section(cells))
    )


def test_a_failed_training_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    failed = dataclasses.replace(OTHER, top1=0.8 - FAR_BELOW - 0.01)
    looks = looks_of(
        {"mnist": [AGREEING, AGREEING, failed], "digits": [AGREEING]}, tmp_path / "gradients.json"
    )
    assert far_below(looks, list(looks)) == [Look("mnist", 2)]
    text = "\n".join(ranks_section(looks))
    assert "efficientnet_lite0: does not hold, worst is 0.50" in text and "mnist, seed 2 (69.0%)." in text
    assert "efficientnet_lite0, without mnist, seed 2 (69.0%): holds, worst is 1.00" in text
    STUDIES["ranks"].report(tmp_path)
    panel = figures[0].axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "mnist 0",
        "mnist 1",
        "mnist 2*",
        "digits 0",
    ]
    assert "(* over 10 points below its task's best)" in panel.get_xlabel()


def test_channels(looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    channels = "\n".join(channels_section(looks))
    assert "-1.00 ± 0.00 (-1.00 to -1.00)" in channels and "0 of 2 |" in channels
    assert (
        "not decided at the level of 5%, F is inf (p 0.333, of 3 divisions of 4 runs; p cannot be below 0.333)."
        in channels
    )


def test_histograms(looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    histograms = "\n".join(histograms_section(looks))
    assert "5.0e-02" in histograms and "holds, in 6 of 6 layers" in histograms
    assert re.search(r"\| mnist +\| c +\| lowest index +\| +1.55 \|", histograms)
    assert "Spearman" not in histograms, "all layers have one histogram"


def test_heavy_tails_are_told_by_the_index_not_by_steps_of_different_size(tmp_path: Path) -> None:
    """Gaussian steps whose norms fall tenfold: many elements are far from zero, and the index is a Gaussian's."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    assert falling_exceeding(3.0) == pytest.approx(0.019, abs=5e-4) and gaussian_exceeding(3.0) < 0.003
    assert falling_exceeding(10.0) < 1e-6
    assert max(_falling()) / min(_falling()) == pytest.approx(FALL)
    widths = [1e-3 * 1.01**place for place in range(1200)]
    assert sum(falling_density(x) * 0.01 * x for x in widths) == pytest.approx(1.0, rel=0.01)
    gaussian = run_of([[1, 2, 3]] * 3, [1.0], alpha=2.4)  # 5% of each layer's elements are beyond 3
    looks = looks_of({"mnist": [gaussian]}, tmp_path / "gradients.json")
    assert "efficientnet_lite0: does not hold, in 0 of 3 layers" in "\n".join(histograms_section(looks))
    none = dataclasses.replace(gaussian, layer_alphas={name: [None] for name in "abc"})
    looks = looks_of({"mnist": [none]}, tmp_path / "none.json")
    assert "efficientnet_lite0: does not hold, in 0 of 3 layers" in "\n".join(histograms_section(looks))


def test_one_seed_has_no_pairs_of_seeds(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    cells: Looks = CellFile(tmp_path / "gradients.json", (Look, Gradients), RECIPES)
    cells.begin(PROVENANCE)
    cells.add(Look("mnist", 0), AGREEING)
    cells.add(Look("digits", 0), OTHER)
    cells.add(Look("digits", 1), Gradients(0.0, diverged=True))
    text = "\n".join((*ranks_section(cells), *channels_section(cells), *tails_section(cells)))
    assert "Channels differ" not in text and "worst is 0.50" in text and "nan" not in text
    lonely: Looks = CellFile(tmp_path / "lonely.json", (Look, Gradients), RECIPES)
    lonely.begin(PROVENANCE)
    lonely.add(Look("mnist", 0), Gradients(0.0, diverged=True))
    with pytest.raises(NothingFinished, match="has no finished run"):
        tails_section(lonely)


@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_reports_and_plots(name: str, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    folder = looks.path.parent
    written, *plots = STUDIES[name].report(folder)
    assert written.read_text() == document(folder) and f"](study-{name}.png)" in document(folder)
    assert "    trady study all" in document(folder)
    # Of two lengths of sums a line, its bars and their ends, and a band; three grey layers, two named ones, two Gaussians.
    least = {"tails": 9, "histograms": 7, "ranks": 1, "channels": 2}[name]
    assert len(figures) == len(plots) == 2
    for figure in figures:
        assert_drawn(figure, least)
    before = [path.read_bytes() for path in plots]
    STUDIES[name].report(folder)
    assert [path.read_bytes() for path in plots] == before


def test_what_counts_as_drawn() -> None:
    """A panel with title, words, grid and lines across it is empty; so is one with its data out of sight, or NaN."""
    figure_module = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib is not installed: pip install matplotlib"
    )

    def panel() -> Any:
        axes = figure_module.Figure().add_subplot()
        axes.set_title("empty")
        axes.grid()
        axes.axhline(1.0)
        return axes

    def draw(axes: Any, method: str, *arguments: Any, **settings: Any) -> Any:
        getattr(axes, method)(*arguments, **settings)
        return axes

    outside = draw(panel(), "plot", [1, 2], [3, 4])
    outside.set_xlim(5, 6)
    for empty in (
        panel(),
        outside,
        draw(panel(), "plot", [math.nan, math.nan], [1.0, 2.0]),
        draw(panel(), "imshow", [[math.nan]]),
        draw(panel(), "errorbar", [], []),
    ):
        with pytest.raises(AssertionError, match="'empty' has 0 of 1"):
            assert_drawn(empty.figure)
    for drawn in (
        draw(panel(), "plot", [1, 2], [3, 4]),
        draw(panel(), "imshow", [[math.nan, 1.0]]),
        draw(panel(), "bar", ["a"], [2.0]),
        draw(panel(), "scatter", [1.0], [2.0]),
        draw(panel(), "fill_between", [1, 2], [0, 0], [3, 4]),
    ):
        assert_drawn(drawn.figure)
        assert len(list(data_of(drawn))) == 1
    with pytest.raises(AssertionError, match="no panels"):
        assert_drawn(figure_module.Figure())


def test_panels_of_the_tail_index_have_one_scale(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    STUDIES["tails"].report(looks.path.parent)
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["mnist", "digits"], "in the order of the recipes"
    assert panels[0].get_ylim() == panels[1].get_ylim()
    labels = panels[0].get_legend_handles_labels()[1]
    assert all(
        any(words in label for label in labels) for words in ("middle layers, sums of 16", "TraDy's lowest")
    )


def test_scales_of_matrices(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correlations from the tenth below the lowest on; t-tests in the other half of the matrix, on a scale of their own."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    figures = saved_figures(monkeypatch)
    STUDIES["ranks"].report(looks.path.parent)
    (ranks,) = figures[0].axes[0].images
    assert ranks.get_clim() == (0.4, 1.0) and not ranks.get_array().mask.any()
    STUDIES["channels"].report(looks.path.parent)
    panel, *bars = figures[-1].axes
    below, above = (image.get_array().filled(math.nan) for image in panel.images)
    assert len(bars) == 2 and panel.images[0].cmap.name != panel.images[1].cmap.name
    cells = sorted(looks, key=lambda cell: (cell.task != "mnist", cell.seed))
    for row, a in enumerate(cells):
        for column, b in enumerate(cells):
            rank, statistic = channel_agreement(looks[a], looks[b]), abs(channel_test(looks[a], looks[b])[0])
            assert below[row, column] == pytest.approx(rank if column < row else math.nan, nan_ok=True)
            assert above[row, column] == pytest.approx(statistic if column > row else math.nan, nan_ok=True)


def test_an_interrupted_study_goes_on_to_the_same_file(
    tmp_path: Path,
) -> None:
    whole = plan_of(RECIPES, 2)
    asked: list[Look] = []

    def fake(cell: Look, recipe: Settings) -> Gradients:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(cell)
        assert recipe is RECIPES[cell.task]
        return dataclasses.replace(AGREEING, top1=0.1 * cell.seed)

    def whole_run(cell: Look, recipe: Settings) -> Gradients:
        return dataclasses.replace(AGREEING, top1=0.1 * cell.seed)

    def run(path: Path, train: Callable[[Look, Settings], Gradients] = fake) -> None:
        plan = dataclasses.replace(whole, train=train)
        cells: Looks = CellFile(path, plan.kinds, RECIPES)
        cells.begin(PROVENANCE)
        with ThreadPoolExecutor(1) as executor:
            run_cells(plan, cells, executor, 1, lambda cell, outcome, fresh: None)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.json")
    assert asked == [Look("mnist", 0), Look("digits", 0), Look("mnist", 1)]
    asked.clear()
    run(tmp_path / "parts.json")
    assert asked == [Look("digits", 1)]
    asked.clear()
    run(tmp_path / "whole.json", whole_run)
    contents = [json.loads((tmp_path / name).read_text()) for name in ("parts.json", "whole.json")]
    for content in contents:
        del content["provenance"]
        for row in content["cells"]:
            del row["outcome"]["provenance"]
    assert contents[0] == contents[1]


def test_cells_of_another_study_are_refused(looks: Looks) -> None:
    path = looks.path.rename(looks.path.with_name("results.json"))
    with pytest.raises(ValueError, match="is of another study"):
        STUDIES["results"].load(path.parent)


def test_command_on_a_small_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real trainings in processes of their own; the second study has nothing left to run."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    write_images(tmp_path / "pets", {"cats": 15, "dogs": 15})
    recipe = Settings(
        model="mobilenet_v2_w035",
        data=str(tmp_path / "pets"),
        image_size=32,
        epochs=2,
        batch_size=4,
        threads=1,
    )
    monkeypatch.setitem(RECIPES_OF_RESULTS, "pets", recipe)  # type: ignore[arg-type]
    monkeypatch.setitem(gradients_module._SIZES, "quick", Size(2))  # type: ignore[index]
    command = ["--quick", "--task", "pets", "--output", str(tmp_path / "out"), "--jobs", "1"]
    assert main(["study", "tails", *command]) == 0
    assert re.search(r"2 of 2: pets, seed 1: test \d+", capsys.readouterr().out)
    assert main(["study", "channels", *command]) == 0
    assert " of 2: " not in capsys.readouterr().out
    run = STUDIES["tails"].load(tmp_path / "out")[Look("pets", 0)]
    alphas = [alpha for alpha in run.alphas["16"] if alpha is not None]
    assert len(alphas) == 2 and all(0.5 < alpha < 2.1 for alpha in alphas)
    assert run.steps == [1, 2, 4, 6, 8, 12] and all(math.isfinite(n[-1]) for n in run.layer_norms.values())
    text = (tmp_path / "out" / "study.md").read_text()
    assert "`trady study ranks`" in text and "mobilenet_v2_w035" in text
    assert main(["study", "tails", "--scheme", "trady", "--output", str(tmp_path / "out")]) == 2
    assert (
        "expected none but for results, importance, resampling, sensitivity: tails has its own"
        in capsys.readouterr().err
    )


def test_the_committed_document_is_what_its_cells_say() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    text = (DOCS / "study.md").read_text("utf-8")
    assert text == document(DOCS)
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {f"study-{name}.png" for name in ON_GRADIENTS} <= set(pictures)
    assert [name for name in pictures if not (DOCS / name).is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if study.section is not None])
def test_committed_figures_are_what_their_cells_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip(
        "matplotlib", reason="matplotlib is not installed: pip install matplotlib"
    )
    if not (DOCS / STUDIES[name].cells).exists():
        pytest.skip(f"no committed {STUDIES[name].cells}")
    committed = (DOCS / f"study-{name}.svg").read_bytes()
    made_with = re.search(rb"Matplotlib v([\d.]+)", committed)
    assert made_with is not None
    if made_with[1].decode() != matplotlib.__version__:
        pytest.skip(f"made with matplotlib {made_with[1].decode()}, and this is {matplotlib.__version__}")
    monkeypatch.setattr(studies, "document", lambda folder: "")  # another test's, and long
    for cells in {study.cells for study in STUDIES.values() if (DOCS / study.cells).exists()}:
        (tmp_path / cells).write_bytes((DOCS / cells).read_bytes())
    STUDIES[name].report(tmp_path)
    assert (tmp_path / f"study-{name}.svg").read_bytes() == committed


def test_unknown_sizes_and_tasks() -> None:
    for arguments, says in (
        (("tiny",), "size: got 'tiny', expected one of quick, usual, full"),
        (("quick", ("cats",)), "task: got 'cats', expected one of fashion-mnist.*or a network and data"),
        (("quick", ("cats on ",)), "task: got 'cats on '"),
    ):
        wrong: Any = arguments
        with pytest.raises(ValueError, match=says):
            gradients_module.gradient_plan(Request(*wrong))


def test_any_network_on_any_data() -> None:
    task = "timm:resnet18 on digits"
    plan = gradients_module.gradient_plan(Request("usual", (task,)))
    assert plan.recipes[task].model == "timm:resnet18" and plan.recipes[task].data == "digits"
    assert plan.recipes[task].image_size == 64 and {cell.task for cell in plan.cells} == {task}
    sentences = gradients_module.gradient_plan(Request("usual", ("minilm on product-reviews",)))
    assert sentences.recipes["minilm on product-reviews"].max_length == 32
