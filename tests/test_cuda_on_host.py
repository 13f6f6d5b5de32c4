"""What tests of CUDA kernels rely on where there is no GPU: fibers in the place of a GPU's threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_on_host
import pytest

_HEAD = """
#include <cuda_runtime.h>
#include <cstdio>
#include <vector>

template <class Kernel, class... Arguments>
void launch(dim3 grid, dim3 block, Kernel* kernel, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}
"""

_SUMS = """
__global__ void sums(const int* values, int* totals) {
  __shared__ int of_warp[4];
  int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) totals[blockIdx.x] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
  __syncthreads();
}
int main() {
  std::vector<int> values(5 * 128), totals(5);
  for (int i = 0; i < 5 * 128; ++i) values[i] = i;
  launch(5, 128, sums, values.data(), totals.data());
  for (int total : totals) std::printf("%d ", total);
}
"""

_LANES = """
__global__ void lanes(int* found) {
  const int lane = threadIdx.x % 32;
  found[threadIdx.x * 4 + 0] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  found[threadIdx.x * 4 + 1] = __shfl_sync(0xffffffffu, lane, 2, 16);
  found[threadIdx.x * 4 + 2] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  if (lane < 8) found[threadIdx.x * 4 + 3] = __shfl_xor_sync(0x000000ffu, lane, 1);
}
int main() {
  std::vector<int> of(64 * 4, -1);
  launch(1, 64, lanes, of.data());
  for (int thread : {4, 5, 31, 50}) {
    std::printf("%d %d %u %d\\n", of[thread * 4], of[thread * 4 + 1], static_cast<unsigned>(of[thread * 4 + 2]), of[thread * 4 + 3]);
  }
}
"""

_NO_BARRIER = """
__global__ void turned(const int* values, int* results) {
  __shared__ int shared[64];
  shared[threadIdx.x] = values[blockIdx.x * 64 + threadIdx.x];
  results[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x ^ 1];
}
int main() {
  std::vector<int> values(128), results(128);
  for (int i = 0; i < 128; ++i) values[i] = i + 1;
  launch(2, 64, turned, values.data(), results.data());
  int wrong = 0;
  for (int i = 0; i < 128; ++i) wrong += results[i] != values[i ^ 1];
  std::printf("%d", wrong > 0);
}
"""

_DIVERGED = """
__global__ void diverged() {
  if (threadIdx.x < 32) __syncthreads();
  else __syncwarp(0x0000ffffu);
}
int main() { launch(1, 64, diverged); }
"""

_MASK = """
__global__ void outside() { __shfl_xor_sync(0x0000ffffu, 1, 1); }
int main() { launch(1, 32, outside); }
"""


def run(source: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    (tmp_path / "program.cpp").write_text(_HEAD + source)
    folder = cuda_on_host.FOLDER
    sources = [tmp_path / "program.cpp", folder / "fibers.cpp"]
    # What some systems define by default takes a jump from fiber to fiber for a broken stack.
    command = [compiler, "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-I", folder, *sources]
    subprocess.run([*command, "-o", tmp_path / "program"], check=True)
    return subprocess.run([tmp_path / "program"], capture_output=True, text=True)


def test_sums_of_a_block(tmp_path: Path) -> None:
    expected = [sum(range(128 * block, 128 * block + 128)) for block in range(5)]
    assert run(_SUMS, tmp_path).stdout.split() == list(map(str, expected))


def test_lanes_of_a_warp(tmp_path: Path) -> None:
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    lines = run(_LANES, tmp_path).stdout.splitlines()
    # down by 3 in groups of 8, lane 2 of each 16, the votes, the neighbour among the first 8
    assert lines == [f"7 2 {ballot} 5", f"5 2 {ballot} 4", f"31 18 {ballot} -1", f"21 18 {ballot} -1"]


def test_a_missing_barrier_shows(tmp_path: Path) -> None:
    assert run(_NO_BARRIER, tmp_path).stdout == "1"


@pytest.mark.parametrize(
    ("source", "message"),
    ((_DIVERGED, "threads wait at a barrier that others never reach"), (_MASK, "whose mask leaves it out")),
    ids=("diverged", "mask"),
)
def test_what_hangs_on_a_gpu_is_told(source: str, message: str, tmp_path: Path) -> None:
    done = run(source, tmp_path)
    assert done.returncode != 0 and message in done.stderr
