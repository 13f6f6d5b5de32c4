"""The choice between kernels: the shipped limits, a user's own, and what is never chosen."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import sum_tolerance
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trady_kernels.benchmark.layers import ConvLayer, LinearLayer
from trady_kernels.benchmark.rows import Setting
from trady_kernels.benchmark.tune import Point, fit, key_of, losses, pixels_of, points
from trady_kernels.ops import backend, choice, conv2d_channel_grad, last_kernel, linear_channel_grad
from trady_kernels.ops.backend import OPERATORS, unavailable
from trady_kernels.ops.choice import ANY, Limit, own_kernel, own_or_aten, shipped

POINT = ("conv2d_channel_grad", "1x1", torch.contiguous_format, torch.float32)
LINEAR = ("linear_channel_grad", "linear", torch.contiguous_format, torch.float32)
TUNED = [Limit(*POINT, 2, 100), Limit(*POINT, 3), Limit(*LINEAR, 5)]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that TRADY_CHOICE names; the shipped limits are in force again afterwards."""
    path = tmp_path / "choice.json"
    with monkeypatch.context() as environment:
        environment.setenv("TRADY_CHOICE", str(path))
        yield path
    choice.load()
    assert choice.in_force() == choice.Table(None, {}, None)


def written(path: Path, limits: list[Limit] = TUNED) -> dict[str, Any]:
    content = choice.render(limits, "2026-01-02")
    path.write_text(json.dumps(content))
    return content


def conv_call(dtype: torch.dtype, k: int, size: int, **changes: Any) -> str | None:
    """Kernel that a convolution of 8 channels takes."""
    shape = {
        "kernel_size": (1, 1),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
    } | changes
    x, dy = (
        torch.randn(2, k, size, size),
        torch.randn(2, 16, -(-size // shape["stride"][0]), -(-size // shape["stride"][1])),
    )
    conv2d_channel_grad(x.to(dtype), dy.to(dtype), torch.arange(k), 8, *shape.values())
    return last_kernel("conv2d_channel_grad")


# ---- a tuned table ------------------------------------------------------------------------------------------


def test_round_trip(table: Path) -> None:
    limits, made = choice.parse(json.loads(json.dumps(written(table))))
    assert limits == TUNED and made == {**choice.this_machine(), "date": "2026-01-02"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.load()
    assert choice.in_force() == choice.Table(table, made, None)
    # what the file has no limit for keeps the shipped one
    untouched = [limit for limit in shipped() if limit.key not in (POINT, LINEAR)]
    assert sorted(map(str, choice.limits_in_force())) == sorted(map(str, [*TUNED, *untouched]))


@pytest.mark.skipif(unavailable("cpp") is not None, reason=f"{unavailable('cpp')}")
def test_calls_follow_it(table: Path) -> None:
    x, dy = torch.randn(9, 120), torch.randn(9, 7)
    linear_channel_grad(x, dy)
    assert last_kernel("linear_channel_grad") == "cpp" and conv_call(torch.float32, 3, 5) == "cpp"
    written(table)
    choice.load()
    linear_channel_grad(x, dy)
    assert last_kernel("linear_channel_grad") == "aten"
    for k, size, kernel in ((2, 5, "cpp"), (3, 5, "aten"), (3, 9, "cpp"), (4, 9, "aten")):
        assert conv_call(torch.float32, k, size) == kernel, (k, size)
    assert conv_call(torch.bfloat16, 4, 9) == "cpp", "ATen would round the sums to bfloat16"
    with backend("cpp"):
        assert conv_call(torch.float32, 4, 9) == "cpp"


@pytest.mark.skipif(unavailable("cpp") is not None, reason=f"{unavailable('cpp')}")
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "symbolic"))
def test_compiled_calls_follow_it(table: Path, dynamic: bool) -> None:
    """No file is read in a traced graph, and a limit that a symbolic size crosses compiles anew."""
    written(table)
    choice.load()
    table.unlink()
    torch._dynamo.reset()
    ran: list[str] = []

    def backend_that_notes(graph: torch.fx.GraphModule, _: object) -> Any:
        kernel = "cpp" if any("trady" in str(node.target) for node in graph.graph.nodes) else "aten"

        def run(*arguments: Any) -> Any:
            ran.append(kernel)
            return graph(*arguments)

        return run

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend_that_notes)
    def gradient(x: torch.Tensor, dy: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        return conv2d_channel_grad(x, dy, channels, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1)

    for k, size, outputs in ((2, 5, 16), (3, 5, 16), (2, 6, 16), (3, 9, 16), (6, 9, 3), (6, 9, 5)):
        x, dy = torch.randn(2, k, size, size), torch.randn(2, outputs, size, size)
        expected = torch.einsum("nkhw,nohw->ko", x.double(), dy.double())[..., None, None]
        magnitude = torch.einsum("nkhw,nohw->ko", x.double().abs(), dy.double().abs())[..., None, None]
        error = (gradient(x, dy, torch.arange(k)).double() - expected).abs()
        assert bool((error <= sum_tolerance(torch.float32, 2 * size**2) * magnitude).all())
        kernel = "cpp" if min(k, outputs) <= (2 if 2 * size**2 <= 100 else 3) else "aten"
        assert ran[-1] == kernel, (k, size, outputs)
    assert set(ran) == {"cpp", "aten"}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "value"), (("cpu", "another"), ("instruction_set", "sse9"), ("torch", "1.0"))
)
def test_another_machines_is_ignored(table: Path, name: str, value: str) -> None:
    content = written(table)
    content["made"][name] = value
    table.write_text(json.dumps(content))
    with pytest.warns(
        RuntimeWarning, match=f"is ignored, the shipped limits hold .made with {name} '{value}', here"
    ) as caught:
        choice.load()
    assert len(caught) == 1
    assert choice.limits_in_force() == list(shipped())
    assert value in (choice.in_force().ignored or "")


def wrong(**changes: Any) -> Any:
    content = choice.render(TUNED, "2026-01-02")
    content["limits"][0] |= changes
    return content


MALFORMED = {
    "not JSON": ("{", "Expecting"),
    "a list": ("[]", "made: got None"),
    "no date": ({"made": {"cpu": "a", "instruction_set": "b", "torch": "c"}, "limits": []}, "texts for cpu"),
    "no limits": ({"made": wrong()["made"]}, "limits: got None, expected a list"),
    "a row that is none": (
        {"made": wrong()["made"], "limits": [3]},
        r"limits\[0\]: got 3, expected an object",
    ),
    "a share": (wrong(most_channels=0.5), r"limits\[0\]: got most_channels 0.5, expected null or an integer"),
    "a truth": (wrong(most_channels=True), "got most_channels True"),
    "below zero": (wrong(most_channels=-1), "got most_channels -1"),
    "no limit in it": ({"made": wrong()["made"], "limits": [{}]}, "got most_channels 'nothing'"),
    "no such operator": (wrong(operator="gather_channels"), "operator 'gather_channels'"),
    "no text": (wrong(memory_format=["contiguous"]), "for which there is no choice"),
    "half type": (wrong(dtype="bfloat16"), "for which there is no choice"),
    "pixels shrink": (wrong(most_pixels=None), "expected them to grow and to end in null"),
    # where oneDNN crashes or errs
    "depthwise": (wrong(family="grouped"), "for which there is no choice"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_one_is_ignored(table: Path, name: str) -> None:
    content, message = MALFORMED[name]
    table.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(RuntimeWarning, match=message) as caught:
        choice.load()
    assert len(caught) == 1 and "trady bench --tune" in str(caught[0].message)
    assert choice.limits_in_force() == list(shipped())


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRADY_CHOICE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert choice.table_path() == tmp_path / "trady_kernels" / "choice.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.table_path() == tmp_path / ".config" / "trady_kernels" / "choice.json"
    monkeypatch.setenv("TRADY_CHOICE", "")
    assert choice.table_path() is None


def test_a_missing_one_is_told_by_doctor_alone(table: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.load()
    assert choice.in_force().ignored == "there is no such file" and choice.limits_in_force() == list(
        shipped()
    )


@pytest.mark.skipif(unavailable("cpp") is not None, reason=f"{unavailable('cpp')}")
def test_it_is_read_at_import(table: Path) -> None:
    code = (
        "import torch; from trady_kernels.ops import linear_channel_grad, last_kernel;"
        "linear_channel_grad(torch.randn(9, 120), torch.randn(9, 7)); print(last_kernel('linear_channel_grad'))"
    )

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TRADY_CHOICE": str(table)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )

    written(table)
    tuned = run()
    assert tuned.stderr == "" and tuned.stdout == "aten\n"
    table.write_text("{")
    shipped = run()
    assert shipped.stdout == "cpp\n" and shipped.stderr.count("is ignored") == 1


# ---- never oneDNN where it errs -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("selected", (1, 4, 24, 1 << 20))
def test_never_aten_where_onednn_errs(dtype: torch.dtype, selected: int) -> None:
    for family, memory_format in (
        ("grouped", torch.contiguous_format),
        ("grouped", torch.channels_last),
    ):
        call = ("conv2d_channel_grad", family, memory_format, dtype)
        assert own_or_aten("cpu", *call, selected, 1 << 20) == "cpp"
        assert call not in choice.KEYS["cpu"]


def test_half_types_have_no_limit() -> None:
    assert not any(limit.dtype in (torch.bfloat16, torch.float16) for limit in shipped())


# ---- on a GPU -----------------------------------------------------------------------------------------------


def gpu_choice(
    k: int,
    outputs: int,
    dtype: torch.dtype,
    groups: int = 1,
    kernel: int = 3,
    *,
    size: int = 9,
    memory_format: torch.memory_format = torch.contiguous_format,
    operator: str = "conv2d_channel_grad",
) -> str:
    """What a convolution of 64 channels on a GPU takes, on a batch of two maps."""
    with FakeTensorMode():
        shapes = ((2, channels, size, size) for channels in (k, outputs))
        x, dy = (
            torch.empty(shape, dtype=dtype, device="cuda", memory_format=memory_format) for shape in shapes
        )
        geometry = (kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1)
        channels = torch.empty(k, dtype=torch.int64, device="cuda")
        return OPERATORS[operator].choose(x, dy, channels, 64, geometry, groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen depends on the GPU here")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gpu_shipped(dtype: torch.dtype) -> None:
    """Triton for few channels, cuDNN for many, CUDA C++ for groups."""
    assert [gpu_choice(k, 32, dtype) for k in (1, 3, 4)] == ["triton", "triton", "aten"]
    assert [gpu_choice(k, 32, dtype, kernel=1) for k in (16, 17)] == ["triton", "aten"]
    assert gpu_choice(40, 12, dtype, kernel=1) == "triton", "12 outputs are the few channels of a product"
    assert gpu_choice(64, 64, dtype, groups=64) == gpu_choice(3, 64, dtype, groups=8) == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen depends on the GPU here")
def test_gpu_shipped_in_float32() -> None:
    """1x1 layers of planes in CUDA C++, those of rows for few channels there and for more in Triton; taps in Triton."""
    f32, last = torch.float32, {"memory_format": torch.channels_last}
    assert [gpu_choice(k, 64, f32, kernel=1) for k in (1, 16, 32, 33)] == ["cuda"] * 3 + ["aten"]
    rows = [gpu_choice(k, 64, f32, kernel=1, **last) for k in (1, 7, 8, 16, 17)]
    assert rows == ["cuda", "cuda", "triton", "triton", "aten"]
    for size, most in ((9, 1), (100, 4), (200, 16)):
        assert [gpu_choice(k, 64, f32, size=size) for k in (most, most + 1)] == ["triton", "aten"]
    assert [gpu_choice(k, 64, f32, **last) for k in (1, 32, 33)] == ["triton", "triton", "aten"]
    assert [gpu_choice(1, 64, f32, kernel=kernel, **last) for kernel in (5, 7)] == ["triton", "aten"]
    assert gpu_choice(1, 64, f32, kernel=7) == gpu_choice(1, 64, torch.bfloat16, kernel=7, **last) == "triton"
    assert gpu_choice(64, 64, f32, groups=64) == gpu_choice(3, 64, f32, groups=8) == "cuda"
    with FakeTensorMode():
        linear = [
            OPERATORS["linear_channel_grad"].choose(*(torch.empty(50, n, device="cuda") for n in (k, 64)))
            for k in (1, 7, 8, 16, 17)
        ]
    assert linear == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen depends on the GPU here")
@pytest.mark.parametrize("operator", ("conv2d_channel_grad_with_bias", "conv2d_channel_grad_squares"))
def test_gpu_products_without_cuda(operator: str) -> None:
    """What has no kernel in CUDA C++ is Triton's where that is faster than ATen."""
    found = [
        gpu_choice(4, 64, torch.float32, kernel=1, memory_format=memory_format, operator=operator)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    taken = [OPERATORS[operator]._existing(name)[0] for name in found]
    assert taken == ["aten", "triton" if "triton" in OPERATORS[operator].kernels else "aten"]


@pytest.mark.parametrize(
    ("memory_format", "mean", "worst"), (("contiguous", 2.14, 0.95), ("channels_last", 2.11, 1.0))
)
def test_gpu_figures_of_what_is_chosen(memory_format: str, mean: float, worst: float) -> None:
    """docs/gpu_kernels.md against the rows: 1 and 16 channels with the kernel of each that is chosen, as batch 128 is."""
    root = Path(__file__).parent.parent
    content = json.loads((root / "benchmarks" / "results" / "gpu_products.json").read_text())
    ratios = []
    for row in content["rows"]:
        k, took, label = row["selected"], row["microseconds"], row["label"]
        if (
            row["memory_format"] != memory_format
            or k not in (1, 16)
            or row["operator"] != "conv2d_channel_grad"
        ):
            continue
        size = int(label.split("@")[1].split()[0]) // (2 if "/2" in label else 1)
        kind = "1x1" if label.startswith("1x1") else "kxk"
        key = ("conv2d_channel_grad", kind, getattr(torch, LAYOUTS[memory_format]), torch.float32)
        limits = [limit for limit in choice._GPU if limit.key == key]
        taken = k <= next(limit.most_channels for limit in limits if 128 * size**2 <= limit.most_pixels)
        # CUDA C++ stands for Triton's product of 1x1 layers, which was measured in another run.
        ours = (
            "cuda" if kind == "1x1" else "triton" if k == 16 and memory_format == "channels_last" else THREE
        )
        if not taken or (label.startswith("7x7") and memory_format == "channels_last"):
            ours = "aten path"
        ratios.append(
            min(took[name] for name in ("aten compact", "aten padded") if name in took) / took[ours]
        )
    assert len(ratios) == 84 and math.exp(math.fsum(map(math.log, ratios)) / 84) == pytest.approx(
        mean, abs=5e-3
    )
    assert min(ratios) == pytest.approx(worst, abs=5e-3)
    assert f"**{mean:.2f}**, **{worst:.2f}**" in (root / "docs" / "gpu_kernels.md").read_text()


def test_avx2_figures_of_what_is_chosen() -> None:
    """docs/cpu_kernels.md against tune_avx2.json: ATen's path over what the shipped limits take, and that over the faster one."""
    root = Path(__file__).parent.parent
    content = json.loads((root / "benchmarks" / "results" / "tune_avx2.json").read_text())
    assert content["machine"]["instruction_set"] == "avx2"
    document = (root / "docs" / "cpu_kernels.md").read_text()
    longer = []
    for entry in content["limits"]:
        family, memory_format, dtype = entry["family"], entry["memory_format"], getattr(torch, entry["dtype"])
        key = (entry["operator"], family, getattr(torch, LAYOUTS[memory_format]), dtype)
        (limit,) = (known for known in choice._AVX2 if known.key == key)
        measured = [Point(**point) for point in entry["points"]]
        longer.append(losses([limit], measured)[0])
        if dtype != torch.float32:
            continue
        cells = []
        for threads, few in itertools.product((1, 2), (True, False)):
            ratios = [
                point.aten / point.ours if point.channels <= limit.most_channels else 1.0
                for point in measured
                if point.threads == threads and (point.selected <= 12) == few
            ]
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            cells.append(f"{mean:.2f} ({min(ratios):.2f})")
        layers = {"kxk": "3x3, 7x7"}.get(family, family)
        name = layers if family == "linear" else f"{layers}, {memory_format}"
        assert f"| {name} | {' | '.join(cells)} |" in document
    assert f"{min(longer):.1%} to {max(longer):.1%} longer" in document


THREE = "triton, three products of TF32"
LAYOUTS = {"contiguous": "contiguous_format", "channels_last": "channels_last"}


def test_gpu_shipped_for_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    planes = ("conv2d_channel_grad", "1x1", torch.contiguous_format, torch.float32)
    for reason, capability, expected in (
        (None, (8, 0), {"1x1", "1x1 strided", "kxk", "linear", "grouped"}),
        (None, (7, 5), {"1x1", "1x1 strided", "linear", "grouped"}),
        ("not built", (9, 0), {"1x1", "1x1 strided", "kxk", "linear", "grouped"}),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        monkeypatch.setattr(choice, "unavailable", lambda name, why=reason: why if name == "cuda" else None)
        limits = shipped("cuda")
        assert {limit.family for limit in limits} == expected
        assert any(limit.key == planes for limit in limits) == (reason is None)
        halves = {limit.family for limit in limits if limit.dtype in choice.HALVES}
        assert halves == (expected if capability >= (8, 0) else {"grouped"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen depends on the GPU here")
def test_gpu_shipped_for_points_in_channels_last() -> None:
    """Of a small map cuBLAS is as fast, whose product is one launch, where it needs no padding to eight channels."""
    limits = {limit.most_pixels: limit.most_channels for limit in shipped("cuda") if limit.key[1:] == POINTS}
    assert limits == {50_000: 7, choice.ANY: 16}
    for size, k, expected in ((14, 8, "aten"), (14, 4, "triton"), (28, 8, "triton")):
        with FakeTensorMode():
            x, dy = (
                torch.empty(128, c, size, size, dtype=torch.bfloat16, device="cuda").to(
                    memory_format=torch.channels_last
                )
                for c in (k, 64)
            )
            channels = torch.empty(k, dtype=torch.int64, device="cuda")
            geometry = (1, 1, 1, 1, 0, 0, 1, 1)
            name = OPERATORS["conv2d_channel_grad"].choose(x, dy, channels, 64, geometry, 1)
        assert name == expected


POINTS = ("1x1", torch.channels_last, torch.bfloat16)

# The packages' own names for these are the functions in them.
CONV_ATEN, LINEAR_ATEN = (
    importlib.import_module(f"trady_kernels.ops.{name}_channel_grad.aten") for name in ("conv2d", "linear")
)


class Products(TorchDispatchMode):
    """Notes how many channels of the input ATen multiplies, and what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: list[int] = []
        self.calls: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(function)
        if function is torch.ops.aten.mm.default:
            self.channels.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selected", "multiplied"), ((20, 24), (24, 24), (1, 1)))
def test_gpu_aten_takes_channels_by_eights(
    selected: int, multiplied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one channel, which is a product with a vector. On the CPU, which otherwise does not."""
    for aten in (CONV_ATEN, LINEAR_ATEN):
        monkeypatch.setattr(aten, "unaligned", lambda tensor, channels: channels % 8 != 0)
    x, dy = (torch.randn(2, c, 9, 9).to(memory_format=torch.channels_last) for c in (selected, 64))
    expected = torch.einsum("nchw,nohw->co", x, dy)
    geometry = (1, 1), (1, 1), (0, 0), (1, 1)
    with Products() as products:
        found = (
            CONV_ATEN.conv2d_channel_grad(x, dy, torch.arange(selected), 64, *geometry, 1)[:, :, 0, 0],
            LINEAR_ATEN.linear_channel_grad(x.movedim(1, 3), dy.movedim(1, 3)),
        )
    for grad in found:
        torch.testing.assert_close(grad, expected)
    assert products.channels == [multiplied] * 2


def test_gpu_channels_of_half_types_alone_are_aligned() -> None:
    with FakeTensorMode():
        for dtype, device, expected in (
            (torch.bfloat16, "cuda", True),
            (torch.float16, "cuda", True),
            (torch.float32, "cuda", False),
            (torch.bfloat16, "cpu", False),
        ):
            tensor = torch.empty(1, dtype=dtype, device=device)
            assert [LINEAR_ATEN.unaligned(tensor, channels) for channels in (20, 24)] == [expected, False]


@pytest.mark.parametrize("dtype", choice.HALVES, ids=str)
def test_gpu_products_widen_as_they_are_summed(dtype: torch.dtype) -> None:
    """In one launch: no call follows that reads the result to widen it."""
    real = torch.cuda.is_available()
    with nullcontext() if real else FakeTensorMode(), Products() as products:
        # 33 times the bfloat16 after 1 is no value of either type.
        x, dy = (
            torch.full((33, size), v, dtype=dtype, device="cuda") for size, v in ((8, 1.0078125), (24, 1.0))
        )
        products.calls.clear()
        grad = LINEAR_ATEN.widened_product(x.t(), dy)
        calls = [call for call in products.calls if call.namespace == "aten" and not call.is_view]
    assert calls == [torch.ops.aten.mm.dtype]
    assert grad.dtype == torch.float32 and grad.shape == (8, 24)
    if real:
        assert grad.unique().tolist() == [33 * 1.0078125]


def test_gpu_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no matrix units there, CUDA C++ needs none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    limits = shipped("cuda")
    assert {limit.dtype for limit in limits if limit.family != "grouped"} == {torch.float32}
    assert {limit.dtype for limit in limits if limit.family == "grouped"} >= {torch.bfloat16, torch.float16}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert len(shipped("cuda")) > len(limits)


def test_gpu_float64() -> None:
    """Triton has no products of it everywhere."""
    assert gpu_choice(1, 32, torch.float64) == "aten"
    assert gpu_choice(1, 64, torch.float64, groups=64) == "cuda"
    with FakeTensorMode():
        rows = [torch.empty(9, 4, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.float64)]
    choose = OPERATORS["linear_channel_grad"].choose
    assert [choose(x, x) for x in rows] == ["cuda", "aten"]


def test_gpu_table(table: Path) -> None:
    """A file of its own beside the CPU's, read and checked in the same way."""
    key = ("conv2d_channel_grad", "kxk", torch.contiguous_format, torch.bfloat16)
    path = choice.table_path("cuda")
    assert path == table.with_name("choice-cuda.json")
    content = choice.render([Limit(*key, 5)], "2026-01-02", "cuda")
    assert set(content["made"]) == {"gpu", "triton", "torch", "date"}
    written(table)
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.load()
    assert [gpu_choice(k, 32, torch.bfloat16) for k in (5, 6)] == ["triton", "aten"]
    assert [gpu_choice(k, 32, torch.float16) for k in (3, 4)] == ["triton", "aten"], "as shipped"
    assert TUNED[0] in choice.limits_in_force() and TUNED[0] not in choice.limits_in_force("cuda")
    content["made"]["gpu"] = "another"
    path.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="made with gpu 'another', here"):
        choice.load()
    assert gpu_choice(5, 32, torch.bfloat16) == "aten" and choice.in_force().ignored is None
    path.unlink()


@pytest.mark.parametrize("family", ("1x1", "kxk", "grouped"))
def test_gpu_stand_ins(family: str) -> None:
    """Without compiled CUDA code groups go to Triton, without Triton everything to ATen."""
    operator = OPERATORS["conv2d_channel_grad"]
    name = own_kernel("cuda", family, torch.channels_last, torch.float32, 4)
    without_cuda = {name: kernel for name, kernel in operator.kernels.items() if name != "cuda"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "kernels", without_cuda | {"triton": operator.kernels["reference"]})
        assert operator._existing(name, torch.float32)[0] == "triton"
        assert operator._existing("cuda", torch.float64)[0] == "aten", "Triton refuses it"
        patch.delitem(operator.kernels, "triton")
        assert operator._existing(name)[0] == "aten"


# ---- tuning -------------------------------------------------------------------------------------------------


def point(pixels: int, k: int, cpp: float, aten: float) -> Point:
    return Point("", 1, pixels, k, k, cpp, aten)


def shapes(crossing: dict[int, int], counts: tuple[int, ...] = (1, 4, 16, 64)) -> list[Point]:
    """C++ takes a microsecond a channel; ATen as much at ``crossing[pixels]`` channels, whatever there are."""
    return [point(pixels, k, float(k), float(at)) for pixels, at in crossing.items() for k in counts]


def test_fit_finds_the_crossing() -> None:
    assert fit(POINT, shapes({49: 8, 196: 9})) == [Limit(*POINT, 8)]  # between 4 and 16
    assert fit(POINT, shapes({49: 1000})) == [Limit(*POINT, ANY)]
    never = [point(49, k, 2.0, 1.0) for k in (1, 4)]
    assert fit(POINT, never) == [Limit(*POINT, 0)]
    assert losses([Limit(*POINT, ANY)], never) == pytest.approx((1.0, 1.0))


def test_fit_splits_by_pixels_only_where_it_pays() -> None:
    apart = shapes({392: 2, 25088: 1000})
    assert fit(POINT, apart) == [Limit(*POINT, 2, 512), Limit(*POINT, ANY)]
    assert losses(fit(POINT, apart), apart) == (0.0, 0.0)
    nearly = [point(pixels, 64, 1.0, 1.0 + slack) for pixels, slack in ((392, 0.01), (25088, -0.01))]
    assert len(fit(POINT, nearly)) == 1


def test_a_large_loss_weighs_more_than_small_ones() -> None:
    of = [point(49, 16, 1.0, 2.0), *(point(49, 16, 1.05, 1.0) for _ in range(10))]
    assert fit(POINT, of) == [Limit(*POINT, ANY)]


def test_points_time_both_kernels() -> None:
    if unavailable("cpp"):
        pytest.skip(unavailable("cpp"))
    layer = ConvLayer("", 8, 16, 9, 3)
    setting = Setting("channels_last", batch=2, rounds=1)
    found = list(points("conv2d_channel_grad", layer, setting))
    assert [point.selected for point in found] == [1, 2, 4, 8] and {point.pixels for point in found} == {
        2 * 81
    }
    assert all(point.ours > 0 and point.aten > 0 for point in found)
    assert {point.threads for point in found} == {torch.get_num_threads()}


def test_a_point_counts_the_smaller_of_channels_and_outputs() -> None:
    if unavailable("cpp"):
        pytest.skip(unavailable("cpp"))
    found = {
        kernel: [
            point.channels
            for point in points("conv2d_channel_grad", ConvLayer("", 8, 3, 9, kernel), Setting(rounds=1))
        ]
        for kernel in (1, 3)
    }
    assert found == {1: [1, 2, 3, 3], 3: [1, 2, 4, 8]}


def test_keys() -> None:
    usual = Setting()
    assert key_of("conv2d_channel_grad", ConvLayer("", 8, 16, 9), usual) == POINT
    assert key_of("linear_channel_grad", LinearLayer("", 7, 8, 16), usual) == LINEAR
    assert pixels_of(LinearLayer("", 7, 8, 16), 4) == 28
    assert key_of("gather_channels", ConvLayer("", 8, 16, 9), usual) is None
    assert key_of("conv2d_channel_grad", ConvLayer("", 8, 16, 9), Setting(dtype="bfloat16")) is None
    for memory_format in ("contiguous", "channels_last"):
        depthwise = ConvLayer("", 8, 8, 9, 3, 2, 8)
        assert key_of("conv2d_channel_grad", depthwise, Setting(memory_format)) is None, "oneDNN errs here"
