"""The commands that do not train: plan, memory, bench, doctor; and what all commands share."""

from __future__ import annotations

import contextlib
import html
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the commands need the extra 'cli'")

from trady_kernels import cli, resident
from trady_kernels.cli import COMMANDS, main

SMALL = ["--batch-size", "2", "--image-size", "32"]


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "example" in out and f"trady {command}" in out.split("example")[1]


BAD_USAGE = [
    (["nonsense"], "nonsense", "expected one of"),
    (["plann"], "plann", "did you mean plan"),
    (["plan", "--budget", "12 bananas"], "12 bananas", "256KiB"),
    (["plan", "--budget", "0"], "0", "positive"),
    (["plan", "--scheme", "nope"], "nope", "trady"),
    (["plan", "--scheme", "d-det-rgn"], "d-det-rgn", "gradients of a data set"),
    (["plan", "--total", "64MiB", "--scheme", "s-det-rgn"], "s-det-rgn", "expected one of trady"),
    (["memory", "--scheme", "s-det-rgn"], "s-det-rgn", "gradients of a data set"),
    (["plan", "--model", "efficientnet_lite9"], "efficientnet_lite9", "such as efficientnet_lite"),
    (["plan", "--image-size", "0"], "0", "at least 1"),
    (["plan", "--ranking", "no/such/file"], "no/such/file: No such file", "expected a file that can be read"),
    (["plan", "--seed", str(1 << 63)], f"--seed: got '{1 << 63}'", "expected an integer from 0 to 2^63 - 1"),
    (["rank", "--seed", "-1", "--output", "rank.json"], "--seed: got '-1'", "expected an integer from 0"),
    (["memory", "--image-size", "32", "--batch-size", "1"], "--batch-size: got 1", "expected at least 2"),
    (["plan", "--json", "no/such/folder/plan.json"], "no/such/folder", "written"),
    (["plan", "--total", "64"], "64", "such as 256MiB"),
    (["plan", "--total", "lots"], "lots", "such as 256MiB"),
    (["plan", "--total", "64MiB", "--budget", "5%"], "--budget", "one of the two"),
    (["plan", "--total", "64MiB", "--scheme", "full"], "full", "no budget"),
    (["plan", "--total", "64MiB", "--optimizer", "adan"], "adan", "adamw"),
    (["plan", "--total", "1MiB", *SMALL], "1,048,576 bytes", "expected at least"),
    (["memory", "--batch-size", "-1"], "-1", "at least 1"),
    (["memory", "--plot", "plot.gif"], "plot.gif", ".png, .svg, .pdf"),
    (["memory", "--plot", "no/such/folder/plot.png"], "no/such/folder", "written"),
    (["memory", "--autocast", "float16"], "float16", "bfloat16"),
    (["memory", "--lean", "4bit"], "4bit", "8bit"),
    (["memory", "--biases", "some"], "--biases: got 'some'", "expected all or a number of last layers"),
    (["plan", "--biases", "-2"], "--biases", "expected"),
    (["memory", "--memory-format", "nhwc"], "nhwc", "channels_last"),
    (["bench", "--selected", "1,x"], "1,x", "1,4,16"),
    (["bench", "--rounds", "0"], "0", "at least 1"),
    (["bench", "--operator", "nope"], "nope", "conv2d_channel_grad"),
    (["bench", "--tune"], "TRADY_CHOICE", "give it a file's name"),
    (["bench", "--tune", "--plot", "plot.png"], "--tune", "leave one of the two out"),
    (["bench", "--plot", "plot.gif"], "plot.gif", ".png, .svg, .pdf"),
    (["bench", "--family", "9x9"], "9x9", "depthwise 5x5"),
    (["bench", "--layer", "nope"], "nope", "such as"),
    (
        ["bench", "--operator", "linear_channel_grad", "--family", "3x3"],
        "no layer passes",
        "expected some such as",
    ),
]


@pytest.mark.parametrize(("arguments", "value", "expected"), BAD_USAGE, ids=lambda value: str(value)[:40])
def test_bad_usage_is_one_sentence(
    arguments: list[str], value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert value in captured.err and expected in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *SMALL, "--budget", "20000", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert len(content["layers"]) == 49
    assert 0 < content["cost"]["elements"] <= 20000
    spent = sum(
        entry["selected"]
        * sum(entry["layer"]["channel"][part] for part in ("weight_elements", "activation_elements"))
        for entry in content["layers"]
    )
    assert spent == content["cost"]["elements"]
    backward, full = content["backward"], content["full_backward"]
    assert backward["flops"] == 2 * (backward["weight_grad_macs"] + backward["input_grad_macs"])
    assert 0 < backward["flops"] < full["flops"] and f"{backward['flops']:,} FLOPs" in out
    assert f"ends at {backward['ends_at']}," in out
    assert all(entry["layer"]["name"] in out for entry in content["layers"])
    # the embedded network's ranking ships with the package
    ranks = [entry["rank"] for entry in content["layers"]]
    assert sorted(ranks) == list(range(1, 50))
    pool = [entry["rank"] for entry in content["layers"] if entry["in_pool"]]
    assert sorted(pool) == list(range(1, len(pool) + 1)) and len(pool) < 49
    assert all(entry["selected"] == 0 for entry in content["layers"] if not entry["in_pool"])


def test_plan_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *SMALL, "--model", "mobilenet_v2_w035", "--total", "4MiB", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert [step["batch_size"] for step in content["steps"]] == [1, 2]
    for step in content["steps"]:
        parts = ("model_bytes", "batch_bytes", "optimizer_bytes", "peak_bytes")
        assert sum(step[part] for part in parts) == step["total_bytes"] <= content["total_bytes"] == 4 * 2**20
        assert 0 < step["channels"] and step["budget"] in out
    assert "no batch above 2 was tried" in out and "optimiser state, images and the peak" in out


@pytest.fixture(scope="module")
def memory_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Figures, plot and printed text of one run."""
    folder = tmp_path_factory.mktemp("memory")
    figures, plot, printed = folder / "memory.json", folder / "memory.svg", io.StringIO()
    files = ["--json", str(figures), "--plot", str(plot)]
    with contextlib.redirect_stdout(printed):
        assert main(["memory", *SMALL, "--budget", "64KiB", "--modules", "3", *files]) == 0
    return json.loads(figures.read_text()), plot.read_text(), printed.getvalue()


def test_memory(memory_run: tuple[dict[str, Any], str, str]) -> None:
    content, _, out = memory_run
    dense, sparse, counted, measured = (content[key] for key in ("dense", "sparse", "counted", "measured"))
    assert measured["together"] == counted["bytes"] <= 64 * 1024
    assert measured["together"] == measured["inputs"] + measured["weight_gradients"]
    assert sparse["by_kind"]["conv input"] < dense["by_kind"]["conv input"] / 10
    assert "norm" not in sparse["by_kind"] and dense["by_kind"]["norm"] > 0
    assert sparse["saved_bytes"] < dense["saved_bytes"] / 10
    for step in ("dense", "sparse"):
        assert 0 < content[step]["resident"]["peak_bytes"] < 2 * content[step]["peak_bytes"] + 2**20
    assert "conv input" in out and "module (3 of" in out and "process, peak in the step" in out
    assert f"{sparse['saved_bytes'] / counted['bytes']:.3g} times what is counted" in out


def test_memory_plot(memory_run: tuple[dict[str, Any], str, str]) -> None:
    content, plot, _ = memory_run
    for kind in ("conv input", "activation", "norm"):
        assert f">{kind}<" in plot
    for step in ("dense", "sparse"):
        assert f">{content[step]['saved_bytes'] / 2**20:.3g}<" in plot
    assert "efficientnet_lite0, 2 images of 32x32, budget 64KiB" in plot and "kept for backward (MiB)" in plot


def test_memory_with_other_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc the command says so and goes on."""
    monkeypatch.setattr(resident, "unavailable", lambda: "resident memory: not here")

    def sparse(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "memory.json"
        usual = ["memory", *SMALL, "--model", "mobilenet_v2_w035", "--budget", "30%", "--modules", "0"]
        assert main([*usual, "--json", str(file), *arguments]) == 0
        content = json.loads(file.read_text())
        assert content["sparse"]["resident"] is None
        return content["sparse"]["by_kind"]

    usual, cast = sparse(), sparse("--autocast", "bfloat16", "--memory-format", "channels_last")
    assert cast["conv input"] == usual["conv input"] / 2 and cast["activation"] == usual["activation"]
    assert sparse("--lean", "off")["activation"] > 5 * usual["activation"]
    biases = [
        sparse("--scheme", "head-only", "--biases", count)["activation"] for count in ("3", "20", "all")
    ]
    assert biases == sorted(set(biases)) and sparse("--scheme", "bias-only")["activation"] == biases[-1]
    shown = capsys.readouterr().out
    assert "resident memory: not here" in shown
    for line in ("0 elements of one sample, and 3 biases, ", "0 elements of one sample, and 52 biases, "):
        assert line in shown


@pytest.fixture
def bench_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """``trady bench`` would restart the test run to set its allocator."""
    from trady_kernels.cli import bench

    monkeypatch.setattr(bench, "calm_malloc", lambda: None)


SMALL_BENCH = ["bench", "--rounds", "1", "--batch-size", "1", "--threads", "1"]


@pytest.mark.usefixtures("bench_here")
def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trady_kernels.cli import bench
    from trady_kernels.ops import available

    convs = [layer for layer in bench.CONVS if layer.label in ("1x1 160->960 @7", "depthwise 5x5 672 @14 /2")]
    monkeypatch.setattr(bench, "CONVS", convs)
    monkeypatch.setattr(bench, "LINEARS", [layer for layer in bench.LINEARS if layer.in_features == 192][:1])
    file, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    assert main([*SMALL_BENCH, "--selected", "1,2", "--json", str(file), "--plot", str(plot)]) == 0
    content = json.loads(file.read_text())
    rows = content["rows"]
    by_operator = {
        name: [row for row in rows if row["operator"] == name] for name in {row["operator"] for row in rows}
    }
    assert {name: len(of) for name, of in by_operator.items()} == {
        "conv2d_channel_grad": 2 * 2 * 2 * 2,  # layers, formats, dtypes, k
        "gather_channels": 2 * 2 * 2 * 2,
        "linear_channel_grad": 2 * 2,
        "rectify": 2 * 2 * 2,  # of a layer's whole output
        "scale_by_bits": 2 * 2 * 2,
    }
    assert all({"auto", "aten", "dense"} <= row["microseconds"].keys() for row in rows)
    assert all(time > 0 for row in rows for time in row["microseconds"].values())
    assert all(("call" in row["microseconds"]) == row["operator"].endswith("_grad") for row in rows)
    if available()["cpp"] is None:
        assert all(row["roofline"] > 0 for row in rows)
        assert content["roofline"]["flops_per_second"].keys() == {"float32", "bfloat16"}
    goals = {goal["goal"]: goal for goal in content["goals"]}
    assert goals["depthwise, float32: times ATen, worst"]["count"] == 2
    out = capsys.readouterr().out
    assert "aten/auto" in out and "depthwise, float32: times ATen, worst" in out
    drawn = (tmp_path / "bench-conv2d_channel_grad-channels_last-bfloat16.svg").read_text()
    assert all(f">{html.escape(layer.label)}<" in drawn for layer in convs) and ">roofline<" in drawn
    assert len(list(tmp_path.glob("bench-*.svg"))) == 2 * 2 * 2 + 2 and not plot.exists()


@pytest.mark.usefixtures("bench_here")
@pytest.mark.parametrize(
    ("filters", "labels"),
    (
        (["--network", "resnet18", "--family", "7x7"], {"7x7 3->64 @224 /2"}),
        (["--layer", "576 @14 /2"], {"depthwise 3x3 576 @14 /2"}),
        (["--family", "linear", "--network", "resnet50"], {"linear 2048->1000 x1"}),
    ),
    ids=("family", "layer", "linear"),
)
def test_bench_filters(filters: list[str], labels: set[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    where = ["--format", "channels_last", "--dtype", "float32", "--selected", "3", "--json", str(file)]
    assert main([*SMALL_BENCH, *where, *filters]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["label"] for row in rows} == labels
    assert {row["dtype"] for row in rows} == {"float32"}
    for row in rows:
        whole = row["operator"] in ("rectify", "scale_by_bits")
        assert row["selected"] == (row["in_channels"] if whole else 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_bench_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert (
        "--device: got 'cuda', but torch.cuda.is_available() is False; run trady doctor"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("bench_here")
def test_bench_tune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has limits for what was measured, none for a depthwise layer, where there is no choice, and the next start takes it."""
    from trady_kernels.benchmark.layers import ConvLayer
    from trady_kernels.cli import bench
    from trady_kernels.ops import available, choice

    tiny = [ConvLayer("", 8, 16, 9), ConvLayer("", 8, 16, 9, 3), ConvLayer("", 8, 8, 9, 3, 2, 8)]
    monkeypatch.setattr(bench, "CONVS", tiny)
    monkeypatch.setattr(bench, "LINEARS", [])
    file, table = tmp_path / "tune.json", tmp_path / "new" / "choice.json"
    with monkeypatch.context() as environment:
        environment.setenv("TRADY_CHOICE", str(table))
        arguments = [*SMALL_BENCH, "--tune", "--json", str(file)]
        if available()["cpp"] is not None:
            assert main(arguments) == 2
            return
        assert main(arguments) == 0
        out = capsys.readouterr().out
        choice.load()
        assert choice.in_force().path == table and choice.in_force().ignored is None
        assert main(["doctor"]) == 0
        assert f"limits measured here on {choice.in_force().made['date']}" in capsys.readouterr().out
    choice.load()
    limits, _ = choice.parse(json.loads(table.read_text()))
    assert {(limit.operator, limit.family, str(limit.memory_format)) for limit in limits} == {
        ("conv2d_channel_grad", family, memory_format)
        for family in ("1x1", "kxk")
        for memory_format in ("torch.contiguous_format", "torch.channels_last")
    }
    assert "ours up to" in out and str(table) in out
    content = json.loads(file.read_text())
    labels = {point["label"] for limit in content["limits"] for point in limit["points"]}
    assert labels == {layer.label for layer in tiny[:2]} and content["machine"]["threads"] == 1
    assert {point["threads"] for limit in content["limits"] for point in limit["points"]} == {1}


@pytest.mark.usefixtures("bench_here")
def test_bench_notices_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trady_kernels.ops.backend import OPERATORS

    operator = OPERATORS["linear_channel_grad"]
    right = operator.kernels["aten"]
    monkeypatch.setitem(operator.kernels, "aten", lambda *args: right(*args) * 1.1)
    monkeypatch.setattr(operator, "choose", lambda *args: "aten")
    assert main([*SMALL_BENCH, "--family", "linear", "--selected", "2"]) == 1
    assert "2 channels, contiguous, float32: differs from ATen" in capsys.readouterr().err


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trady_kernels.ops.backend import OPERATORS, available

    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {finding["name"] for finding in content["operators"]} == set(OPERATORS)
    here = {name: reason is None for name, reason in available().items()}
    assert here.items() <= {f["name"]: f["present"] for f in content["backends"]}.items()
    if here["cpp"]:
        assert "instruction set" in capsys.readouterr().out


def test_doctor_notices_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from trady_kernels.ops.backend import OPERATORS

    operator = OPERATORS["gather_channels"]
    kernel = operator.choose(*_gather_arguments())
    name = kernel if kernel in operator.kernels else "reference"
    right = operator.kernels[name]
    monkeypatch.setitem(operator.kernels, "aten", lambda *args: right(*args) + 1)
    monkeypatch.setattr(operator, "choose", lambda *args: "aten")
    assert main(["doctor"]) == 1


def _gather_arguments() -> tuple[object, ...]:
    import torch

    return torch.randn(2, 8, 9, 9), torch.tensor([1, 4, 5])


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(cli.importlib, "import_module", refuse)
    assert main(["plan"]) == 2
    assert "pip install 'trady-kernels[cli]'" in capsys.readouterr().err
