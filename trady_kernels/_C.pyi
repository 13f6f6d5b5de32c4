"""The compiled module: what has no tensors. Missing where the package was installed without a compiler."""

from typing import TypedDict

class BuildFacts(TypedDict):
    compiler: str
    isas: list[str]

def build_facts() -> BuildFacts:
    """Version of the compiler and the instruction sets compiled in."""

def isa() -> str:
    """Instruction set that the C++ kernels run on now: ``baseline``, ``avx2`` or ``avx512``."""

def available_isas() -> list[str]:
    """Instruction sets that this CPU has, the best last."""

def set_isa(name: str) -> None:
    """Choose the instruction set; ``ValueError`` for one that this CPU does not have."""

def read_bandwidth(bytes: int, threads: int = 1) -> float:
    """Bytes a second read from a working set of ``bytes``, best of five rounds of 20 ms."""

def copy_bandwidth(bytes: int, threads: int = 1) -> float:
    """Bytes a second read plus bytes a second written, source and target together ``bytes``."""

def fma_peak(threads: int = 1) -> float:
    """Float32 operations a second, an FMA counted as two, on the current instruction set."""
