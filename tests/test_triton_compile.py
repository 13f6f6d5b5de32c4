"""Every Triton kernel compiles for every GPU, its loops into registers alone, and no launch takes a variant that was not compiled."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_conv2d_channel_grad as conv2d
import test_gather_channels as gather
import test_linear_channel_grad as linear
import torch
from cases import CONV_CASES, FLOATING, LINEAR_CASES
from interpreted import on
from test_operators import SAMPLES

from trady_kernels import ops
from trady_kernels.ops.backend import OPERATORS, triton_version

compile_triton = pytest.importorskip("compile_triton", reason="triton is not installed")
triton = compile_triton.triton

PROGRAM = Path(compile_triton.__file__)


def compiled(arch: int, folder: Path, *options: str | Path) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, output and table of the program, which finds nothing that was compiled before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, "--arch", str(arch), "--json", folder / "table.json", *options],
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    table = folder / "table.json"
    return done.returncode, done.stdout, json.loads(table.read_text())["rows"] if table.exists() else []


def check(arch: int, folder: Path) -> None:
    if not compile_triton.is_known(arch):
        pytest.skip(f"Triton {triton.__version__} has no assembler for sm_{arch}")
    code, output, rows = compiled(arch, folder)
    assert code == 0, output
    kernels = {configuration.kernel.__name__.lstrip("_") for configuration in compile_triton.of_operators()}
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["registers"] > 0 for row in rows if not row["skipped"])
    vectors = [row for row in rows if loads_vectors(row)]
    assert {row["kernel"] for row in vectors} == {"multiply", "multiply_taps"}
    assert [row["constants"] for row in vectors if row["narrow_loads"]] == []
    halves = [
        row for row in rows if row["kernel"] == "multiply" and "16" in row["types"] and not row["skipped"]
    ]
    assert any(row["narrow_loads"] for row in halves) or not halves, "they are seen"


def loads_vectors(row: dict[str, Any]) -> bool:
    """Whether a product's operands both come several elements at a time."""
    # A value may be of several words.
    constants = dict(pair.split("=") for pair in row["constants"].split() if "=" in pair)
    along_pixels = row["kernel"] == "multiply" and constants["ALONG_CHANNELS"] == "False"
    return int(constants.get("X_VECTOR", 1)) > 1 or (along_pixels and constants["VECTOR"] != "1")


@pytest.mark.parametrize("arch", (80, 90))
def test_kernels_compile(arch: int, tmp_path: Path) -> None:
    if arch == 80 and tuple(map(int, (triton_version() or "0").split(".")[:2])) < (3, 7):
        pytest.skip("Triton 3.6 spills 8 bytes a thread in two of the variants for sm_80")
    check(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(compile_triton.SHARED_KIB) - {80, 90}))
def test_kernels_compile_for_other_gpus(arch: int, tmp_path: Path) -> None:
    check(arch, tmp_path)


# ---- that the check can fail ------------------------------------------------------------------------------

PLANTED = """
import triton
import triton.language as tl
from trady_kernels.ops.triton_configuration import Configuration

@triton.jit
def good(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + 1)

@triton.jit
def spilling(x, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), values * tl.sum(values))

@triton.jit
def looping(x, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    for _ in range(tl.load(x).to(tl.int32)):
        values += tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), values)

@triton.jit
def sharing(x, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + place)
    tl.store(x + place, tl.trans(values))

@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), missing)

@triton.jit
def counting(x, count, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), count)

def configurations():
    return [
        Configuration(good, {"x": "*fp32"}, {"BLOCK": 128}, 4, 1),
        Configuration(spilling, {"x": "*fp32"}, {"BLOCK": 8192}, 1, 1),
        Configuration(looping, {"x": "*fp32"}, {"BLOCK": 8192}, 1, 1),
        Configuration(sharing, {"x": "*fp32"}, {"BLOCK": 256}, 8, 1),
        Configuration(broken, {"x": "*fp32"}, {"BLOCK": 128}, 4, 1),
        Configuration(good, {"x": "*fp32"}, {}, 4, 1),
        Configuration(counting, {"x": "*fp32", "count": "i32"}, {"BLOCK": 128}, 4, 1),
    ]
"""


def test_what_is_reported(tmp_path: Path) -> None:
    """Planted kernels: one is well, the others spill, in a loop too, take too much shared memory, do not compile, lack an argument, are
    compiled anew for other numbers."""
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)
    code, output, rows = compiled(80, tmp_path, "--file", planted)
    assert code == 1 and "6 failed, 0 skipped" in output
    good, spilling, looping, sharing, broken, lacking, counting = rows
    assert good["failure"] == "" and good["registers"] > 0 and good["local_bytes"] == 0
    assert spilling["spill_bytes"] > 0 and spilling["local_bytes"] > 0
    assert f"{spilling['local_bytes']} bytes of local memory a thread" in spilling["failure"]
    assert looping["local_in_loops"] > 0 and spilling["local_in_loops"] == 0
    assert (
        sharing["shared_bytes"] > 163 * 1024 and "of shared memory, the GPU has 163 KiB" in sharing["failure"]
    )
    assert "missing is not defined" in broken["failure"]
    assert "arguments: got" in lacking["failure"]
    assert "arguments: count: expected in do_not_specialize" in counting["failure"]
    for row in rows:
        assert f"FAILED: {row['failure']}" in output or not row["failure"]


PRODUCT = """
import triton
import triton.language as tl
from trady_kernels.ops.triton_configuration import Configuration

@triton.jit
def product(x, y):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = tl.load(x + place)
    tl.store(y + place, tl.dot(values, values))

def configurations():
    return [Configuration(product, {"x": x, "y": "*fp32"}, {}, 4, 1) for x in ("*fp32", "*bf16", "*fp16")]
"""


def test_products_of_half_types_are_left_out_before_ampere(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PRODUCT)
    code, output, rows = compiled(75, tmp_path, "--file", planted)
    assert code == 0 and "0 failed, 2 skipped" in output
    assert [bool(row["skipped"]) for row in rows] == [False, True, True]
    assert compiled(80, tmp_path, "--file", planted)[1].endswith("0 failed, 0 skipped\n")


def test_unknown_gpu_and_interpreter_are_refused(tmp_path: Path) -> None:
    code, output, _ = compiled(33, tmp_path)
    assert code == 2 and "invalid choice: 33" in output
    done = subprocess.run(
        [sys.executable, PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


# ---- that it covers what is launched ----------------------------------------------------------------------

Variant = tuple[tuple[tuple[str, Any], ...], int, int]


def _variant(constants: dict[str, Any], num_warps: int, num_stages: int) -> Variant:
    return tuple(sorted(constants.items())), num_warps, num_stages


def _calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Operators with arguments: odd shapes, layouts and dtypes, enough for every kind of tile."""
    for dtype in FLOATING:
        for name, samples in SAMPLES.items():
            for sample in samples:
                # Scales of blocks are float32 whatever the blocks were.
                converted = (
                    a.to(dtype)
                    if isinstance(a, torch.Tensor)
                    and a.dtype.is_floating_point
                    and name != "dequantize_blocks"
                    else a
                    for a in sample
                )
                yield name, OPERATORS[name], tuple(converted)
        for case in CONV_CASES:
            for layout in gather.LAYOUTS:
                input, channels = gather.arguments(case, dtype, layout)
                for target in (None, torch.float32):
                    yield "gather_channels", ops.gather_channels, (input, channels, target)
            x, dy, *rest = conv2d.arguments(case, dtype)
            for convert in conv2d.LAYOUTS.values():
                arguments = (*convert(x, dy), *rest)
                yield "conv2d_channel_grad", ops.conv2d_channel_grad, arguments
                if case.groups == 1 and case.selected:
                    yield "conv2d_channel_grad_with_bias", ops.conv2d_channel_grad_with_bias, arguments
        for case in LINEAR_CASES:
            for selected in case.selected:
                yield (
                    "linear_channel_grad",
                    ops.linear_channel_grad,
                    linear.arguments(case, selected, dtype),
                )


def test_every_launch_is_among_the_configurations(
    monkeypatch: pytest.MonkeyPatch, triton_device: str
) -> None:
    """Launches are noted and not made: constants and pointers each have to be among those that were compiled."""
    known: dict[Any, tuple[set[Variant], set[tuple[str, ...]]]] = {}
    for configuration in compile_triton.of_operators():
        variants, pointers = known.setdefault(configuration.kernel, (set(), set()))
        variants.add(
            _variant(dict(configuration.constexprs), configuration.num_warps, configuration.num_stages)
        )
        pointers.add(tuple(t for t in configuration.signature.values() if t.startswith("*")))
    launched: set[Any] = set()

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variants, pointers = known[kernel]
        parameters = inspect.signature(kernel.fn).parameters
        given = dict(zip(parameters, args, strict=False)) | {
            n: v for n, v in kwargs.items() if n in parameters
        }
        assert list(parameters) == [n for n in parameters if n in given]
        constants = {n: given[n] for n in dict(next(iter(variants))[0])}
        assert _variant(constants, kwargs["num_warps"], kwargs["num_stages"]) in variants, (kernel, constants)
        types = tuple(
            "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
            for value in given.values()
            if isinstance(value, torch.Tensor)
        )
        assert types in pointers, (kernel, types)
        launched.add(kernel)

    for kind in {type(kernel) for kernel in known}:
        monkeypatch.setattr(kind, "run", note)
    with ops.backend("triton"):
        for name, function, arguments in _calls():
            if OPERATORS[name].triton is None:
                continue
            given = (on(triton_device, a) if isinstance(a, torch.Tensor) else a for a in arguments)
            with contextlib.suppress(NotImplementedError):  # a dtype that the kernel refuses
                function(*given)
    assert launched == set(known)
