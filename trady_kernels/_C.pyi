"""The compiled module: what has no tensors. Missing where the package was installed without a compiler."""

from typing import TypedDict

class BuildFacts(TypedDict):
    compiler: str
    isas: list[str]
    missing_isas: str

def build_facts() -> BuildFacts:
    """Version of the compiler, the instruction sets compiled in, and in words which this compiler cannot build."""

def isa() -> str:
    """Instruction set that the C++ kernels run on now, one of ``available_isas()``."""

def available_isas() -> list[str]:
    """Instruction sets compiled in that this CPU has, in order of preference, the best last.

    x86-64: ``baseline`` (SSE2), ``avx2``, ``avx512``, ``avx512_bf16``, ``avx512_amx``. 64-bit Arm:
    ``baseline`` (NEON), ``neon_bf16``, ``sve256`` (SVE with vectors of exactly 256 bits).
    """

def set_isa(name: str) -> None:
    """Choose the instruction set; ``ValueError`` for one that this CPU does not have."""

def copy_bandwidth(bytes: int, threads: int = 1) -> float:
    """Bytes a second read plus bytes a second written, source and target together ``bytes``, best of five rounds of 20 ms."""

def fma_peak(threads: int = 1) -> float:
    """Float32 operations a second, an FMA counted as two, on the current instruction set."""
