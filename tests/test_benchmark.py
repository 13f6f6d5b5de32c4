"""What the benchmarks are made of: layers, peers, the roofline's counts, medians, goals."""

from __future__ import annotations

import importlib.util
import math
import re
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from trady_kernels.benchmark.goals import geometric_mean, verdicts
from trady_kernels.benchmark.layers import CONVS, LAYERS, ConvLayer, Layer, LinearLayer, distinct, selections
from trady_kernels.benchmark.report import goals_table, rows_table, summary_table
from trady_kernels.benchmark.roofline import Roofline, Work, conv2d_work, gather_work, linear_work
from trady_kernels.benchmark.rows import BENCHMARKS, Row, Setting, _takes, measure
from trady_kernels.benchmark.timing import FEWEST_ROUNDS, MOST_ROUNDS, interleaved
from trady_kernels.models.loading import load_model
from trady_kernels.ops.backend import OPERATORS, unavailable
from trady_kernels.ops.choice import DTYPES
from trady_kernels.ops.layout import FORMATS

needs_cpp = pytest.mark.skipif(unavailable("cpp") is not None, reason=f"{unavailable('cpp')}")


# ---- layers -------------------------------------------------------------------------------------------------


def layers_of(network: nn.Module, size: int = 224) -> set[tuple[int, ...]]:
    """What runs in a network, by the size of its result: an input may come padded already."""
    found: set[tuple[int, ...]] = set()

    def see(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        found.add(
            (
                module.in_channels,
                module.out_channels,
                output.shape[2],
                module.kernel_size[0],
                module.stride[0],
                module.groups,
            )
        )

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return found


def written_down(network: str) -> set[tuple[int, ...]]:
    return {
        (layer.in_channels, layer.out_channels, layer.out_size, layer.kernel, layer.stride, layer.groups)
        for layer in CONVS
        if layer.network == network
    }


@pytest.mark.parametrize(
    ("name", "network"),
    (
        ("mobilenet_v2", "mobilenet_v2"),
        ("efficientnet_lite0", "efficientnet_lite0"),
        ("resnet18", "torchvision:resnet18"),
        ("resnet50", "torchvision:resnet50"),
    ),
)
def test_layers_are_the_networks(name: str, network: str) -> None:
    if "torchvision" in network and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install torchvision")
    assert written_down(name) == layers_of(load_model(network, 5, pretrained=False).model)


def test_selections() -> None:
    assert selections(96) == (1, 2, 4, 6, 8, 12, 24, 48, 96)
    assert selections(3) == (1, 2, 3)
    assert selections(2048) == (1, 2, 4, 8, 12, 128, 512, 1024, 2048)


def test_distinct_keeps_the_first_network() -> None:
    once = distinct(CONVS)
    assert len({layer.label for layer in once}) == len(once) == len({layer.label for layer in CONVS})
    assert next(layer for layer in once if layer.label == "7x7 3->64 @224 /2").network == "resnet18"


# ---- peers --------------------------------------------------------------------------------------------------

KINDS: tuple[ConvLayer | LinearLayer, ...] = (
    ConvLayer("", 16, 24, 9),
    ConvLayer("", 16, 24, 8, 1, 2),
    ConvLayer("", 16, 24, 9, 3),
    ConvLayer("", 24, 24, 9, 5, 2, 24),
    LinearLayer("", 7, 24, 40),
)


@pytest.mark.parametrize("layer", KINDS, ids=lambda layer: layer.label)
def test_rows(layer: ConvLayer | LinearLayer) -> None:
    """Operator and peer agree (it raises otherwise), in every format and dtype, and every row is there."""
    roofline = Roofline(1)
    linear = isinstance(layer, LinearLayer)
    for operator in BENCHMARKS:
        if (operator == "linear_channel_grad") != linear:
            continue
        for memory_format in FORMATS:
            for dtype in DTYPES:
                setting = Setting(memory_format, dtype, batch=2, rounds=1)
                rows = measure(operator, layer, setting, roofline)
                whole = BENCHMARKS[operator].whole
                expected = [layer.in_channels] if whole else list(selections(layer.in_channels))
                assert [row.selected for row in rows] == expected
                assert len({row.microseconds["dense"] for row in rows}) == 1
                assert rows[-1].microseconds["dense"] == rows[-1].microseconds["aten"]
                if unavailable("cpp") is None:
                    assert all(row.kernel == "cpp" or "cpp" in row.microseconds for row in rows)
                    assert all(row.floor is not None and row.floor >= (row.roofline or 0) > 0 for row in rows)


def test_a_peer_reads_the_format_off_one_channel() -> None:
    """ATen would lay a one-channel tensor out anew whose strides look contiguous."""
    layer, setting = ConvLayer("", 8, 16, 9, 3), Setting("channels_last")
    (call,) = BENCHMARKS["conv2d_channel_grad"].calls(layer, setting, [1])
    assert call.arguments[0].stride() == (81, 1, 9, 1)


# ---- roofline -----------------------------------------------------------------------------------------------


def test_work_is_counted() -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    dense = ConvLayer("", 64, 128, 56, 3, 2)
    moved = 4 * (8 * 4 * 56 * 56 + 8 * 128 * 28 * 28 + 4 * 128 * 9)
    assert conv2d_work(dense, torch.arange(4), 8, "contiguous", f32) == Work(
        moved, 2 * 8 * 28 * 28 * 4 * 128 * 9, moved
    )
    depthwise = ConvLayer("", 96, 96, 14, 5, 1, 96)
    moved = 2 * 2 * 8 * 3 * 14 * 14 + 4 * 3 * 25
    # Channels 0 and 31 are in the first of a pixel's three cache lines, 64 is in the last.
    work = conv2d_work(depthwise, torch.tensor([0, 31, 64]), 8, "channels_last", bf16)
    assert work == Work(moved, 2 * 8 * 14 * 14 * 3 * 25, moved + 8 * 14 * 14 * (2 * 64 - 3 * 2))
    assert work.in_lines() == Work(work.lines, work.flops, work.lines)
    # Planes of 49 floats begin anywhere in a line: of the first three, the neighbours share one.
    planes = ConvLayer("", 96, 96, 7, 3, 1, 96)
    few = [conv2d_work(planes, torch.tensor(c), 1, "contiguous", f32) for c in ([0, 1, 2], [0, 2])]
    assert [work.lines - work.bytes for work in few] == [10 * 64 - 3 * 196, (4 + 4) * 64 - 2 * 196]
    strided = ConvLayer("", 64, 128, 56, 1, 2)
    outputs = 4 * (8 * 128 * 28 * 28)
    rows_alone = conv2d_work(strided, torch.arange(32), 8, "contiguous", f32)
    assert rows_alone.bytes == 4 * 8 * 32 * 28 * 56 + outputs + 4 * 32 * 128
    pixels_alone = conv2d_work(strided, torch.arange(32), 8, "channels_last", f32)
    assert pixels_alone.bytes == 4 * 8 * 32 * 28 * 28 + outputs + 4 * 32 * 128
    four, moved = torch.arange(4), 2 * 8 * 4 * 56 * 56
    assert gather_work(dense, four, 8, "contiguous", bf16) == Work(2 * moved, 0, 2 * moved)
    # A line of the CPU, or a sector of the GPU, for every pixel.
    assert gather_work(dense, four, 8, "channels_last", bf16).lines == moved + 64 * 8 * 56 * 56
    assert gather_work(dense, four, 8, "channels_last", bf16, "cuda").lines == moved + 32 * 8 * 56 * 56
    linear = LinearLayer("", 197, 192, 768)
    moved = 4 * (8 * 197 * 771 + 3 * 768)
    assert linear_work(linear, 3, 8, f32) == Work(moved, 2 * 8 * 197 * 3 * 768, moved)


@needs_cpp
@pytest.mark.parametrize("operator", ("conv2d_channel_grad", "linear_channel_grad"))
def test_kernels_beside_the_chosen_one_on_a_gpu(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were made for the layer and the dtype."""
    monkeypatch.setattr(OPERATORS[operator], "kernels", dict.fromkeys(("cuda", "triton", "aten")))
    layers: dict[str, Layer] = (
        {"linear": next(layer for layer in LAYERS if isinstance(layer, LinearLayer))}
        if operator == "linear_channel_grad"
        else {layer.family: layer for layer in LAYERS if isinstance(layer, ConvLayer)}
    )
    for family, layer in layers.items():
        for dtype in ("float32", "bfloat16", "float64"):
            setting = Setting("contiguous", dtype, device="cuda")
            found = [kernel for kernel in ("cuda", "triton") if _takes(operator, kernel, layer, setting)]
            expected = {"float32": ["cuda", "triton"], "bfloat16": ["triton"], "float64": []}[dtype]
            if family.startswith("depthwise"):
                expected = ["cuda"]
            elif family in ("3x3", "7x7"):
                expected = [kernel for kernel in expected if kernel == "triton"]
            assert found == expected, (family, dtype)


def test_roofline_takes_the_slower_of_the_two() -> None:
    roofline = Roofline(1)
    memory, compute = Work(1 << 20, 1, 0), Work(1, 10**9, 0)
    assert roofline.microseconds(memory, "float32") == pytest.approx(
        1e6 * (1 << 20) / roofline.copy_rates[1 << 20]
    )
    assert roofline.microseconds(compute, "float32") == pytest.approx(1e15 / roofline.peaks["float32"])
    between = roofline.copy_bandwidth(3 << 19)
    assert min(roofline.copy_rates.values()) <= between <= max(roofline.copy_rates.values())


# ---- medians ------------------------------------------------------------------------------------------------


def test_interleaved() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass

    times = interleaved({"slow": slow, "fast": lambda: calls.append("fast")}, 7)
    assert len(calls) == 2 * 8 and times["slow"] >= 2000 > times["fast"] > 0
    rounds = [calls[i : i + 2] for i in range(0, 16, 2)]
    assert all(sorted(turn) == ["fast", "slow"] for turn in rounds)
    assert ["fast", "slow"] in rounds and ["slow", "fast"] in rounds


def test_interleaved_takes_the_rounds_that_fit() -> None:
    for seconds, expected in ((1e-9, FEWEST_ROUNDS), (10.0, MOST_ROUNDS)):
        calls: list[int] = []
        interleaved({"one": lambda calls=calls: calls.append(1)}, seconds=seconds)
        assert len(calls) == 1 + expected


# ---- goals --------------------------------------------------------------------------------------------------


def row(selected: int, auto: float, aten: float, **changes: object) -> Row:
    times = {"auto": auto, "aten": aten, "dense": 1000.0}
    usual = Row(
        "conv2d_channel_grad",
        "",
        "1x1",
        "1x1 64->64 @7",
        64,
        selected,
        "contiguous",
        "float32",
        "cpp",
        10.0,
        10.0,
        times,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def reached(rows: list[Row]) -> dict[str, bool]:
    return {verdict.goal: verdict.reached for verdict in verdicts(rows)}


def test_a_gpus_rows_have_goals_of_their_own() -> None:
    """Every format and dtype; groups up to C/4, dense layers up to 16 channels, and bandwidths of large tensors alone."""
    few = {"device": "cuda", "dtype": "bfloat16", "kernel": "triton"}
    depthwise = {**few, "family": "depthwise 3x3", "kernel": "cuda"}
    groups = "depthwise and grouped, k <= C/4: times the best of cuDNN and the native kernel, geometric mean"
    dense = "dense convolutions, k <= 16: times cuDNN, geometric mean"
    worst = "dense convolutions, k <= 16: times cuDNN, worst"
    copied = "gather and masks over 64 MB: share of the copy bandwidth, worst"
    assert reached([row(16, 10, 30, **depthwise), row(17, 10, 1, **depthwise)]) == {groups: True}
    assert reached([row(1, 10, 14, **few), row(16, 10, 18, **few), row(17, 10, 1, **few)]) == {
        dense: True,
        worst: True,
    }
    assert (
        reached([row(1, 10, 14, **few)])[dense] is False and reached([row(1, 10, 9.4, **few)])[worst] is False
    )
    large = {**few, "operator": "rectify", "bytes": 64 << 20}
    assert reached([row(64, 12.5, 1, **large)]) == {copied: True}
    assert reached([row(64, 12.6, 1, **large)]) == {copied: False}
    assert reached([row(64, 20, 1, **{**large, "bytes": (64 << 20) - 1})]) == {}


def test_goals_are_held_against_the_rows() -> None:
    geomean = "dense convolutions, k <= 12, float32: times ATen, geometric mean"
    worst = "dense convolutions, k <= 12, float32: times ATen, worst"
    assert reached([row(1, 10, 20), row(2, 10, 50)])[geomean]  # 3.16 times
    few = verdicts([row(1, 10, 11), row(2, 10, 20)])
    assert not any(verdict.reached for verdict in few if verdict.goal in (geomean, worst))
    (found,) = [verdict for verdict in few if verdict.goal == worst]
    assert found.figure == pytest.approx(1.1) and found.worst == "1.10 at 1x1 64->64 @7, k = 1"
    assert reached([row(1, 10, 12)])[worst]
    larger = "C/16 to C: times ATen, worst"
    assert larger not in reached([row(3, 10, 1)])
    assert reached([row(4, 10, 9.6)])[larger] and not reached([row(64, 10, 9.4)])[larger]
    growth = "time(k) / time(C) - 1.3 k/C, C >= 64, k >= 16, worst"
    assert reached([row(16, 34, 40), row(64, 100, 100)])[growth]
    assert not reached([row(16, 35, 40), row(64, 100, 100)])[growth]
    assert growth not in reached([row(16, 34, 40)])
    share = "dense within twice the roofline, share of shapes"
    assert reached([row(1, 20, 40)] * 9 + [row(1, 21, 40)])[share]
    assert not reached([row(1, 20, 40)] * 8 + [row(1, 21, 40)] * 2)[share]


def test_a_depthwise_goal_counts_one_call() -> None:
    share = "depthwise within twice the roofline and one call, share of shapes"
    times = {"auto": 50.0, "aten": 500.0, "dense": 1000.0}
    depthwise = row(1, 0, 0, family="depthwise 3x3", microseconds=times)
    assert not reached([depthwise])[share]
    assert reached([replace(depthwise, microseconds={**times, "call": 15.0})])[share]


def test_limit_is_the_figure_at_the_roofline_of_whole_lines_and_one_call() -> None:
    worst = "dense convolutions, k <= 12, float32: times ATen, worst"

    def limit_of(goal: str, rows: list[Row]) -> float | None:
        (found,) = [verdict for verdict in verdicts(rows) if verdict.goal == goal]
        return found.limit

    times = {"auto": 30.0, "aten": 24.0, "dense": 1000.0, "call": 5.0}
    rows = [row(1, 0, 0, microseconds=times), row(2, 30, 60)]
    assert limit_of(worst, rows) == pytest.approx(24 / (10 + 5))
    assert limit_of(worst, [*rows, row(4, 30, 60, lines=None)]) is None
    assert limit_of("C/16 to C: times ATen, worst", [row(4, 30, 60, dtype="bfloat16")]) is None
    growth = "time(k) / time(C) - 1.3 k/C, C >= 64, k >= 16, worst"
    assert limit_of(growth, [row(16, 34, 40, lines=20.0), row(64, 100, 100, lines=80.0)]) == pytest.approx(
        max(20 / 80 - 1.3 * 16 / 64, 80 / 80 - 1.3)
    )
    assert limit_of("dense within twice the roofline, share of shapes", rows) == 1


def test_tables() -> None:
    rows = [row(1, 10, 20), row(64, 100, 90, roofline=None)]
    assert "1x1 64->64 @7" in rows_table(rows) and "2.00" in rows_table(rows)
    header = re.split(r"\s{2,}", rows_table(rows).splitlines()[0])
    assert header[2:7] == ["auto us", "cpp us", "aten us", "dense us", "roofline us"], (
        "columns do not run together"
    )
    assert "1x1                  1     1       2.00" in summary_table(rows)
    assert "MISSED" in goals_table(rows) and "benchmarks/training_step.py" in goals_table(rows)
    assert math.isnan(geometric_mean([])) and geometric_mean([2, 8]) == pytest.approx(4)
