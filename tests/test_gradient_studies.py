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
from image_folders import write_images
from provenance import PROVENANCE
from torch import nn

from trady_kernels.cli import main
from trady_kernels.study import gradients as gradients_module
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
    _compare,
    _matrix,
    channel_agreement,
    channel_p,
    channels_section,
    epoch_agreements,
    layer_agreement,
    ranks_section,
    share_apart,
    stable_from,
    tasks_apart,
    topology,
)
from trady_kernels.study.results import RECIPES as RECIPES_OF_RESULTS
from trady_kernels.study.results import Request, Size
from trady_kernels.study.studies import STUDIES, document
from trady_kernels.study.tail_index import TailIndex
from trady_kernels.study.tails import (
    _verdict,
    density,
    exceeding,
    gaussian_density,
    gaussian_exceeding,
    histograms_section,
    share_beyond,
    tails_section,
)
from trady_kernels.training.results import EpochFigures, SchemeResult
from trady_kernels.training.settings import Settings

ON_GRADIENTS = [name for name, study in STUDIES.items() if study.cells == "gradients.json"]


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
    assert channel_p(AGREEING, OTHER) == pytest.approx(stats.ttest_rel(*flat).pvalue)


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


def seeds_of(channels: list[float], layers: int, noise: float, seed: int, runs: int = 3) -> list[Gradients]:
    generator = torch.Generator().manual_seed(seed)
    return [
        run_of(
            [[1, 2, 3]] * layers,
            [norm * float(1 + noise * torch.randn((), generator=generator)) for norm in channels],
        )
        for _ in range(runs)
    ]


def test_tasks_are_told_apart_by_their_channels_not_by_their_size() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    channels = [1.0 + 0.37 * (place * 7 % 40) for place in range(40)]
    same = tasks_apart(seeds_of(channels, 2, 0.05, 1), seeds_of(channels, 2, 0.05, 2))
    other = tasks_apart(seeds_of(channels, 2, 0.05, 1), seeds_of(channels[::-1], 2, 0.05, 2))
    assert same is not None and other is not None and len(same.mixed) == 9, "of ten divisions of six runs"
    assert other.differ and other.share > 0.7 and not same.differ and same.share < 0.2
    larger = [
        dataclasses.replace(
            run, channel_norms={n: [9 * v for v in norms] for n, norms in run.channel_norms.items()}
        )
        for run in seeds_of(channels, 2, 0.05, 2)
    ]
    scaled = tasks_apart(seeds_of(channels, 2, 0.05, 1), larger)
    assert scaled is not None and scaled.share == pytest.approx(same.share), "the size does not count"
    first, second = ([topology(run) for run in seeds_of(channels, 2, 0.05, seed)] for seed in (1, 2))
    p = stats.ttest_ind(torch.stack(first), torch.stack(second), equal_var=False).pvalue
    assert share_apart(first, second) == pytest.approx((p < 0.05).mean())
    assert tasks_apart(seeds_of(channels, 1, 0.1, 1, 1), seeds_of(channels, 1, 0.1, 2)) is None


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


def test_sections(looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    tails = "\n".join(tails_section(looks))
    assert "| mnist  |" in tails and "1.10 to 1.50" in tails and "80.0 ± 0.0" in tails
    # Each of four runs has two values with sums of 16: mnist's 1.5, 1.6, digits' 1.25, 1.35.
    assert "holds in part, in 6 of 8 runs and epochs, which are from 1.25 to 1.60" in tails
    assert "in 4 of 8" in _verdict([1.5, 1.6, 2.0, 1.3, 1.25, 2.4, None, None]), "infinite ones are outside"
    assert "does not hold, in 0 of 1 runs and epochs with" in _verdict([None])
    ranks = "\n".join(ranks_section(looks))
    assert "does not hold, worst is 0.50, of digits, seed 0 and mnist, seed 0" in ranks and "1 to 4" in ranks
    assert (
        "A few epochs suffice for a ranking (TraDy)*, efficientnet_lite0: does not hold, in 2 of 4" in ranks
    )
    channels = "\n".join(channels_section(looks))
    assert "-1.00 ± 0.00 (-1.00 to -1.00)" in channels and "0 of 2 |" in channels
    # Seeds are equal to the last bit, so that any two groups of one task each differ, and no others.
    assert "Channels differ between tasks (TraDy)*, efficientnet_lite0: holds; 1 of 1" in channels
    histograms = "\n".join(histograms_section(looks))
    assert "5.0e-02" in histograms and "holds, in 6 of 6 layers" in histograms


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
def test_reports_and_plots(name: str, looks: Looks) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install scipy")
    image = pytest.importorskip(
        "matplotlib.image", reason="matplotlib is not installed: pip install matplotlib"
    )
    folder = looks.path.parent
    written, *plots = STUDIES[name].report(folder)
    assert written.read_text() == document(folder) and f"](study-{name}.png)" in document(folder)
    assert "    trady study all" in document(folder)
    drawn = image.imread(plots[0])
    assert 0.005 < (drawn[..., :3] < 0.9).any(-1).mean() < 0.7, "ink, on paper"
    before = plots[1].read_bytes()
    STUDIES[name].report(folder)
    assert plots[1].read_bytes() == before and before.count(b"<path") > 10


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
    docs = Path(__file__).parent.parent / "docs"
    if (docs / "study.md").exists() or (docs / "gradients.json").exists():
        assert (docs / "study.md").read_text("utf-8") == document(docs)


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
