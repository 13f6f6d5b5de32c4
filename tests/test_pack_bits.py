from __future__ import annotations

import pytest
import torch

from trady_kernels.ops import backend, last_kernel, pack_bits

COUNTS = (0, 1, 7, 8, 9, 63, 64, 65, 128, 1000)


def by_hand(flags: list[bool]) -> list[int]:
    """Bytes, by integers."""
    return [
        sum(1 << i for i, flag in enumerate(flags[start : start + 8]) if flag)
        for start in range(0, len(flags), 8)
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_bits_of_a_row(count: int, isa: str) -> None:
    mask = torch.rand(count) < 0.5
    for kernel in ("cpp", "reference"):
        with backend(kernel):
            assert pack_bits(mask).tolist() == by_hand(mask.tolist())
        assert last_kernel("pack_bits") == kernel


def test_bits_follow_memory() -> None:
    mask = torch.rand(2, 5, 3, 4) < 0.5
    channels_last = mask.contiguous(memory_format=torch.channels_last)
    for kernel in ("cpp", "reference"):
        with backend(kernel):
            assert pack_bits(channels_last).tolist() == by_hand(mask.permute(0, 2, 3, 1).flatten().tolist())
            assert pack_bits(mask.permute(3, 1, 0, 2)).tolist() == by_hand(mask.flatten().tolist())
            window = mask[:, 1:, :, 1:]
            assert pack_bits(window).tolist() == by_hand(window.flatten().tolist())


def test_large_enough_for_threads(threads: int, isa: str) -> None:
    mask = torch.rand(300, 1001) < 0.5
    with backend("cpp"):
        packed = pack_bits(mask)
    with backend("reference"):
        assert torch.equal(packed, pack_bits(mask))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"mask: got torch.float32, expected torch.bool"):
        pack_bits(torch.ones(3))
