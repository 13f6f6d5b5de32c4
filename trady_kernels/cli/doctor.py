"""``trady doctor``: what is installed here, which kernels run, and how to get what is missing."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from trady_kernels.atomic_write import write_json
from trady_kernels.batch import tensors_in
from trady_kernels.cli.console import check_writable, make_console
from trady_kernels.data.digits import find_digits
from trady_kernels.data.fashion_mnist import DEBIAN_FOLDER, is_idx_folder
from trady_kernels.data.mnist import find_mnist
from trady_kernels.data.sentences import FILES, find_sentences
from trady_kernels.models.loading import find_efficientnet_lite0_weights, find_minilm_weights
from trady_kernels.ops import available, choice, last_kernel
from trady_kernels.ops.backend import OPERATORS, TRITON_INTERPRETED, build_record, triton_version
from trady_kernels.provenance import commit, machine, versions

_DESCRIPTION = """\
Show versions, the machine, which backends can run and why the others cannot, the instruction set of the C++ kernels,
which kernel each operator took just now, and what optional parts are missing and how to get them.

TRADY_ISA=baseline in the environment, or another set of those that it names, chooses the instruction set, and
TRADY_CHOICE=FILE the table by which kernels are chosen (empty: the shipped one)."""

_EPILOG = """\
examples:
  trady doctor
  TRADY_ISA=avx2 trady doctor
  trady doctor --json doctor.json"""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, whether it is here, and what it is or how to get it."""

    name: str
    present: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here too")


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit code 1 when an operator gives a wrong result."""
    if args.json is not None:
        check_writable("json", args.json)
    sections = {
        "versions": _versions(),
        "backends": _backends(),
        "operators": _operators(),
        "optional parts": _optional(),
    }
    console = make_console()
    for title, findings in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            table.add_row(finding.name, "yes" if finding.present else "no", finding.detail)
        console.print(table)
        console.print()
    if args.json is not None:
        write_json(args.json, {title: [asdict(f) for f in findings] for title, findings in sections.items()})
    return 0 if all(finding.present for finding in sections["operators"]) else 1


def _versions() -> list[Finding]:
    facts = machine(torch.device("cpu"))
    source = commit()
    return [
        *(Finding(name, True, version) for name, version in versions().items()),
        Finding("source", source is not None, f"commit {source}" if source else "not a git checkout"),
        Finding("machine", True, f"{facts['name']}, {facts['threads']} threads, {platform.platform()}"),
    ]


def _backends() -> list[Finding]:
    findings = [
        Finding(name, reason is None, reason or _ABOUT[name]()) for name, reason in available().items()
    ]
    findings.append(_choice())
    record = build_record()
    if record:
        findings.append(Finding("built", "missing" not in record, _build_in_words(record)))
    return findings


def _choice() -> Finding:
    table = choice.in_force()
    if table.path is None:
        return Finding("choice", True, "the shipped limits; trady bench --tune measures this machine's")
    if table.ignored is not None:
        return Finding("choice", False, f"the shipped limits; {table.path} is ignored: {table.ignored}")
    return Finding("choice", True, f"limits measured here on {table.made['date']}: {table.path}")


def _instruction_sets() -> str:
    from trady_kernels import _C

    forced = ", forced by TRADY_ISA" if "TRADY_ISA" in os.environ else ""
    missing = _C.build_facts()["missing_isas"]
    return (
        f"instruction set {_C.isa()}{forced}; this CPU has {', '.join(_C.available_isas())}"
        f"{f'; left out at installation: {missing}' if missing else ''}"
    )


_ABOUT: dict[str, Callable[[], str]] = {
    "reference": lambda: "plain PyTorch, the definition",
    "aten": lambda: "ATen's weight gradient on the compact input",
    "cpp": _instruction_sets,
    "cuda": lambda: torch.cuda.get_device_name(),
    "triton": lambda: f"{triton_version()}{' in its interpreter' if TRITON_INTERPRETED else ''}",
}


def _build_in_words(record: dict[str, str]) -> str:
    if "missing" in record:
        return record["missing"]
    gpu = (
        f"{record['nvcc']} for {record['cuda_archs']}" if "nvcc" in record else record.get("cuda_missing", "")
    )
    return f"{record['compiler']}, torch {record['torch']}; CUDA: {gpu}"


def _operators() -> list[Finding]:
    """Run every operator once on a small example beside its reference."""
    x, dy = torch.randn(2, 8, 9, 9), torch.randn(2, 6, 9, 9)
    channels, window = torch.tensor([1, 4, 5]), ((3, 3), (2, 2), (1, 1), (1, 1))
    codes, bits = torch.randint(-127, 128, (130,), dtype=torch.int8), torch.arange(162, dtype=torch.uint8)
    _, offsets = OPERATORS["max_pool2d_offsets"].kernels["reference"](x, *window, False)
    linear = (torch.randn(33, 3), torch.randn(33, 20))
    convolution = (x[:, channels], dy, channels, 8, (3, 3, 1, 1, 1, 1, 1, 1), 1)
    norm = tuple(torch.rand(6) for _ in range(5))
    examples: dict[str, tuple[Any, ...]] = {
        "fold_norm": (torch.randn(6, 8, 3, 3), *norm, 1e-5, torch.bfloat16),
        "shift_channels_": (x, torch.randn(8)),
        "gather_channels": (x, channels),
        "conv2d_channel_grad": convolution,
        "conv2d_channel_grad_squares": convolution,
        "conv2d_channel_grad_with_bias": convolution,
        "conv2d_depthwise_input_grad": (x, torch.randn(8, 1, 3, 3), (9, 9), (1, 1), (1, 1), (1, 1)),
        "linear_channel_grad": linear,
        "linear_channel_grad_squares": linear,
        "rectify": (x, 0.0, 1.0, None),
        "rectify_": (x, 0.0, None, 0.1),
        "scale_by_bits": (x, bits, 1.0, None),
        "pack_bits": (x > 0,),
        "scatter_channels_": (torch.randn(6, 4, 3, 3), channels, torch.randn(3, 3, 3, 3), 2),
        "max_pool2d_offsets": (x, *window, False),
        "max_pool2d_offsets_backward": (torch.randn(2, 8, 5, 5), offsets, (9, 9), *window),
        "quantize_blocks": (x,),
        "dequantize_blocks": (codes, torch.rand(3), torch.float32),
    }
    findings = []
    for name, operator in OPERATORS.items():
        right = _alike(
            _results(operator, examples[name]), _results(operator.kernels["reference"], examples[name])
        )
        verdict = "equal to the reference" if right else "WRONG: differs from the reference"
        findings.append(Finding(name, right, f"ran on {last_kernel(name)}, {verdict}"))
    return findings


def _results(operator: Callable[..., Any], example: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an operator returns and what it wrote, from a copy of the example."""
    arguments = copy.deepcopy(example)
    return list(tensors_in((operator(*arguments), arguments)))


def _alike(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(results, expected, strict=True))


def _optional() -> list[Finding]:
    findings = [_package(name, use) for name, use in _PACKAGES.items()]
    files: list[tuple[str, Callable[[], Path]]] = [
        ("EfficientNet-Lite0 weights", find_efficientnet_lite0_weights),
        ("mnist", find_mnist),
        ("digits", find_digits),
        ("MiniLM weights", find_minilm_weights),
        *((name, partial(find_sentences, name)) for name in FILES),
    ]
    for name, find in files:
        try:
            findings.append(Finding(name, True, str(find())))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            findings.append(Finding(name, False, str(error)))
    fashion = is_idx_folder(DEBIAN_FOLDER)
    detail = (
        str(DEBIAN_FOLDER) if fashion else "apt-get install dataset-fashion-mnist, or give --data its folder"
    )
    return [*findings, Finding("fashion-mnist", fashion, detail)]


_PACKAGES = {
    "matplotlib": "plots",
    "PIL": "folders of images",
    "numpy": "data sets",
    "scipy": "studies",
    "peft": "the scheme lora",
    "safetensors": "MiniLM's weights",
    "tokenizers": "sentences",
    "timm": "networks by name",
    "torchvision": "networks by name",
}
_DISTRIBUTIONS = {"PIL": "pillow"}


def _package(module: str, use: str) -> Finding:
    present = importlib.util.find_spec(module) is not None
    install = f"pip install {_DISTRIBUTIONS.get(module, module)}"
    return Finding(_DISTRIBUTIONS.get(module, module), present, use if present else f"for {use}: {install}")
