"""Compiles every Triton kernel for a GPU that need not be there, and tells what each takes of it.

    python tests/compile_triton.py --arch 90

Fails where a kernel does not compile, uses local memory inside a loop or more than a few words of it, or asks for more
shared memory than the GPU has. Pointers count as aligned to 16 bytes, as those of whole tensors are.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: KiB of shared memory that one block may have, by compute capability.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
#: Of local memory that a thread may have, for values that wait there while a loop runs: the assemblers for Blackwell park
#: two or three words where one more block then fits a multiprocessor.
PARKED_BYTES = 16
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Row:
    """What one variant of a kernel takes.

    Attributes:
        kernel: its name.
        types: of the tensors that it takes, without repetition.
        constants: its constexprs.
        registers: of a thread.
        spill_bytes: that a thread writes to local memory for want of registers, or reads back if those are more.
        local_bytes: of local memory a thread has.
        local_in_loops: loads and stores of it inside a loop.
        shared_bytes: of a block.
        narrow_loads: loads from memory of two bytes or less, which the compiler starts none of ahead.
        failure: why it counts as failed; empty where it does not.
        skipped: why it was not compiled; empty where it was.
    """

    kernel: str
    types: str
    constants: str
    num_warps: int
    registers: int = 0
    spill_bytes: int = 0
    local_bytes: int = 0
    local_in_loops: int = 0
    shared_bytes: int = 0
    narrow_loads: int = 0
    failure: str = ""
    skipped: str = ""


def ptxas(arch: int) -> Path:
    """The assembler that Triton takes for an architecture: newer ones have their own where it ships with two."""
    blackwell = _TOOLS / "ptxas-blackwell"
    return blackwell if arch >= 100 and blackwell.exists() else _TOOLS / "ptxas"


def full_name(arch: int) -> str:
    """As the assembler has it; from Hopper on with what only this architecture can do."""
    return f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"


def is_known(arch: int) -> bool:
    """Whether Triton's assembler compiles for the architecture."""
    usage = subprocess.run([ptxas(arch), "--help"], capture_output=True, text=True, check=True).stdout
    return f"'{full_name(arch)}'" in usage


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _numbers(text: str, *patterns: str) -> list[int]:
    found = [re.search(pattern, text) for pattern in patterns]
    if not all(found):
        raise RuntimeError(f"expected {patterns} in: {text}")
    return [int(match.group(1)) for match in found if match]


def local_in_loops(sass: str) -> int:
    """Loads and stores of local memory between a branch and an earlier place that it goes back to.

    Args:
        sass: disassembly of one kernel. What follows its last instruction, where barriers are tried again, is no loop of it.
    """
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loops, last = [], max((at for at, text in instructions if text.strip() == "EXIT"), default=0)
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at < last:
            loops.append((int(target[1], 16), at))
    local = [at for at, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= end for first, end in loops) for at in local)


def _compiled(configuration: Any, arch: int) -> Any:
    kernel = configuration.kernel
    types, constants = configuration.signature, configuration.constexprs
    if set(types) | set(constants) != set(kernel.arg_names) or set(types) & set(constants):
        raise ValueError(
            f"arguments: got {sorted(types)} and {sorted(constants)}, expected {kernel.arg_names}"
        )
    specialised = [
        parameter.name
        for parameter in kernel.params
        if types.get(parameter.name, "").startswith("i") and not parameter.do_not_specialize
    ]
    if specialised:  # trady_kernels.ops.triton_launch launches the variant of one number for all
        raise ValueError(f"arguments: {', '.join(specialised)}: expected in do_not_specialize")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(constants), aligned)
    options = {
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        "debug": bool(kernel.debug),
        "sanitize_overflow": False,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measured(configuration: Any, arch: int) -> Row:
    """Compile one variant and read what the assembler says about it."""
    types = dict.fromkeys(name[1:] for name in configuration.signature.values() if name.startswith("*"))
    row = {
        "kernel": configuration.kernel.__name__.lstrip("_"),
        "types": " ".join(types),
        "constants": " ".join(f"{name}={value}" for name, value in configuration.constexprs.items()),
        "num_warps": configuration.num_warps,
    }
    try:
        compiled = _compiled(configuration, arch)
    except Exception as error:  # a compiler that fails may raise anything
        return Row(**row, failure=f"{type(error).__name__}: {error}".strip())
    if arch < 80 and "tt.dot" in compiled.asm["ttir"] and {"bf16", "fp16"} & set(types):
        return Row(
            **row, skipped="Triton takes no tensor cores before sm_80: such products are another backend's"
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(_TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        registers, stack, local = _numbers(usage, r"REG:(\d+)", r"STACK:(\d+)", r"LOCAL:(\d+)")
        spilled = in_loops = 0
        if stack or local:
            in_loops = local_in_loops(_output(_TOOLS / "cuobjdump", "-sass", cubin))
        if stack:  # of the stack the assembler alone tells what are spills
            ptx.write_text(compiled.asm["ptx"])
            log = _output(ptxas(arch), "-v", f"--gpu-name={full_name(arch)}", ptx, "-o", cubin)
            spilled = max(_numbers(log, r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"))
    shared = compiled.metadata.shared  # all of it is asked for at the launch; the cubin's own is the system's
    failures = []
    if stack + local > PARKED_BYTES or in_loops:
        failures.append(
            f"{stack + local} bytes of local memory a thread, {in_loops} loads and stores of it in loops, {spilled} bytes of spills"
        )
    if shared > SHARED_KIB[arch] * 1024:
        failures.append(f"{shared} bytes of shared memory, the GPU has {SHARED_KIB[arch]} KiB")
    return Row(
        **row,
        registers=registers,
        spill_bytes=spilled,
        local_bytes=stack + local,
        local_in_loops=in_loops,
        shared_bytes=shared,
        narrow_loads=len(re.findall(r"\bld\.global[.\w]*\.[bus](?:8|16)\b", compiled.asm["ptx"])),
        failure="; ".join(failures),
    )


def measured_by_all_cores(configurations: Sequence[Any], arch: int) -> list[Row]:
    """``measured`` of each; forks have the kernels, which cannot be sent to another process."""
    _forked[:] = configurations
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(partial(_measured_in_fork, arch), range(len(configurations)), chunksize=1)


_forked: list[Any] = []


def _measured_in_fork(arch: int, index: int) -> Row:
    return measured(_forked[index], arch)


def of_operators() -> list[Any]:
    """Configurations of every operator that has a Triton kernel."""
    from trady_kernels.ops.backend import OPERATORS

    modules = dict.fromkeys(operator.triton for operator in OPERATORS.values() if operator.triton)
    return [
        configuration
        for module in modules
        for configuration in importlib.import_module(module).configurations()
    ]


def of_file(path: Path) -> list[Any]:
    """Configurations of a file that is no part of the package."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module.configurations()


# ---- the report -------------------------------------------------------------------------------------------

_COLUMNS = {
    "kernel": "kernel",
    "types": "types",
    "constants": "constants",
    "num_warps": "warps",
    "registers": "registers",
    "spill_bytes": "spills",
    "local_bytes": "local",
    "local_in_loops": "in loops",
    "shared_bytes": "shared",
}


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows in columns, a failure or the reason of a skip under its row."""
    rows = list(rows)
    cells = [list(_COLUMNS.values())] + [[str(getattr(row, name)) for name in _COLUMNS] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    for line, row in zip(cells, [None, *rows], strict=True):
        yield "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        if row is not None and row.skipped:
            yield f"  skipped: {row.skipped}"
        if row is not None and row.failure:
            yield f"  FAILED: {row.failure}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a kernel failed, 2 for an architecture that this Triton does not compile for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, default=90, choices=SHARED_KIB, help="compute capability without its dot (90)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there for machines too")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="a Python file whose configurations() to compile instead"
    )
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled")
    if not is_known(options.arch):
        parser.error(f"--arch: got {options.arch}, which Triton {triton.__version__} has no assembler for")
    configurations = of_operators() if options.file is None else of_file(options.file)
    rows = measured_by_all_cores(configurations, options.arch)
    print(*table(rows), sep="\n")
    failed = sum(bool(row.failure) for row in rows)
    skipped = sum(bool(row.skipped) for row in rows)
    print(
        f"{len(rows)} variants for {full_name(options.arch)} with Triton {triton.__version__}: "
        f"{failed} failed, {skipped} skipped"
    )
    if options.json is not None:
        content = {"arch": options.arch, "triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
