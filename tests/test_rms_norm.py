"""LayerNorm, GroupNorm and RMSNorm with a frozen affine: one full-size tensor, and RMSNorm's exact gradient."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import laid_out
from networks import as_trained
from saved import saved_bytes
from tolerances import ROUNDING
from torch import nn

from trady_kernels.functional.rms_norm import frozen_rms_norm
from trady_kernels.nn.eight_bit import keep_in_eight_bits
from trady_kernels.nn.rms_norm import LeanRMSNorm


class LayerNorm2d(nn.LayerNorm):
    """As ConvNeXt has it: over the channels of an image."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def lean(norm: nn.RMSNorm) -> LeanRMSNorm:
    norm.requires_grad_(False).__class__ = LeanRMSNorm
    assert isinstance(norm, LeanRMSNorm)
    return norm


@dataclass(frozen=True)
class NormCase:
    """A norm with a frozen affine, its input, and the statistics that it may keep besides."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    statistics: int
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    #: Whether what is kept is the input itself, memory that a neighbour may share.
    shared: bool = True

    def __str__(self) -> str:
        return self.name


TOKENS, IMAGES = (3, 50, 64), (2, 32, 9, 7)
ROWS, PIXELS = 150, 126

NORM_CASES = (
    NormCase("LayerNorm", lambda: nn.LayerNorm(64), TOKENS, 2 * ROWS),
    NormCase(
        "LayerNorm without affine", lambda: nn.LayerNorm(64, elementwise_affine=False), TOKENS, 2 * ROWS
    ),
    NormCase("LayerNorm of a slice", lambda: nn.LayerNorm(64), TOKENS, 2 * ROWS, "slice"),
    NormCase("LayerNorm, transposed", lambda: nn.LayerNorm(64), TOKENS, 2 * ROWS, "transposed"),
    NormCase("LayerNorm2d", lambda: LayerNorm2d(32), IMAGES, 2 * PIXELS),
    NormCase("LayerNorm2d, channels_last", lambda: LayerNorm2d(32), IMAGES, 2 * PIXELS, "channels_last"),
    NormCase("LayerNorm bfloat16", lambda: nn.LayerNorm(64), TOKENS, 2 * ROWS, dtype=torch.bfloat16),
    NormCase("GroupNorm", lambda: nn.GroupNorm(4, 32), IMAGES, 2 * 2 * 4),
    NormCase("GroupNorm, channels_last", lambda: nn.GroupNorm(4, 32), IMAGES, 2 * 2 * 4, "channels_last"),
    # F.group_norm makes the slice dense first.
    NormCase("GroupNorm of a slice", lambda: nn.GroupNorm(4, 32), IMAGES, 2 * 2 * 4, "slice", shared=False),
    NormCase("RMSNorm", lambda: nn.RMSNorm(64), TOKENS, ROWS),
    NormCase("RMSNorm lean", lambda: lean(nn.RMSNorm(64)), TOKENS, 0),
    NormCase("RMSNorm lean bfloat16", lambda: lean(nn.RMSNorm(64)), TOKENS, 0, dtype=torch.bfloat16),
)


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_at_most_one_tensor_is_kept(case: NormCase) -> None:
    norm = case.build().to(case.dtype).requires_grad_(False)
    input = laid_out(torch.randn(case.shape).to(case.dtype), case.layout).requires_grad_()
    x = input * 1  # no leaf, and dense in any case but a slice's
    if case.layout == "slice":
        whole = torch.randn([size + 3 for size in case.shape], requires_grad=True) * 1
        x = whole[tuple(slice(2, 2 + size) for size in case.shape)]
    kept = saved_bytes(norm, lambda: norm(x))
    size, statistics = x.element_size(), case.statistics * 4
    own = x.untyped_storage().nbytes() if case.shared else x.numel() * size
    assert kept <= own + statistics
    if case.shared:  # a neighbour that keeps the input adds nothing
        assert saved_bytes(norm, lambda: (norm(x), F.gelu(x))) == kept


def test_rms_norm_of_torch_keeps_a_float32_copy() -> None:
    """Why there is a lean one; once torch does without, there need not be."""
    norm = nn.RMSNorm(64).bfloat16().requires_grad_(False)
    x = torch.randn(TOKENS, dtype=torch.bfloat16, requires_grad=True) * 1
    assert saved_bytes(norm, lambda: norm(x)) >= 2 * x.numel() * 2
    assert saved_bytes(lean(norm), lambda: norm(x)) == x.numel() * 2


def test_in_eight_bits_it_is_packed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), lean(nn.RMSNorm(64)))
    x = torch.randn(8, 50, 64)
    keep_in_eight_bits(model)
    elements = x.numel()
    assert saved_bytes(model, lambda: model(x)) == elements * 4 + elements + elements // 16  # the batch apart


# ---- RMSNorm ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RMSCase:
    """An RMS norm and its input."""

    name: str
    shape: tuple[int, ...]
    normalized: tuple[int, ...]
    eps: float | None = None
    affine: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


RMS_CASES = (
    RMSCase("tokens", (3, 11, 19), (19,)),
    RMSCase("two dimensions", (4, 5, 7), (5, 7), eps=1e-5),
    RMSCase("without affine", (6, 9), (9,), affine=False),
    RMSCase("large eps", (6, 9), (9,), eps=0.5),
    RMSCase("slice", (3, 5, 8), (8,), layout="slice"),
    RMSCase("transposed", (3, 5, 8), (8,), layout="transposed"),
    RMSCase("everything", (7,), (7,)),
    RMSCase("empty", (0, 7), (7,)),
)


def _both(case: RMSCase, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    dense = as_trained(nn.RMSNorm(case.normalized, case.eps, case.affine)).to(dtype).requires_grad_(False)
    if case.affine:
        dense.weight.uniform_(0.5, 1.5)
    values = torch.randn(case.shape).to(dtype)
    values = values if len(case.shape) < 2 else laid_out(values, case.layout)
    grad_output = torch.randn(case.shape).to(dtype)
    results = []
    for norm in (dense, lean(copy.deepcopy(dense))):
        x = values.detach().requires_grad_()
        output = norm(x)
        results.append([output.detach(), *torch.autograd.grad(output, x, grad_output)])
    return results[0], results[1]


@pytest.mark.parametrize("case", RMS_CASES, ids=str)
def test_rms_norm_is_torchs(case: RMSCase) -> None:
    (output, grad), (lean_output, lean_grad) = _both(case, torch.float64)
    assert torch.equal(lean_output, output)
    torch.testing.assert_close(lean_grad, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rms_norm_in_other_precisions(dtype: torch.dtype) -> None:
    (output, grad), (lean_output, lean_grad) = _both(RMS_CASES[0], dtype)
    assert torch.equal(lean_output, output) and lean_grad.dtype == dtype
    assert (lean_grad - grad).abs().max() <= ROUNDING[dtype] * grad.abs().max()


def test_rms_norm_gradcheck() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    for arguments in ((x, (5,), weight, 1e-3), (x, (4, 5), None, None)):
        assert torch.autograd.gradcheck(frozen_rms_norm, arguments)
        assert torch.autograd.gradgradcheck(frozen_rms_norm, arguments)


def test_rms_norm_not_finite() -> None:
    x = torch.randn(4, 8)
    x[0, 1], x[1, 2], x[2] = torch.nan, torch.inf, 0
    results = []
    for norm in (nn.RMSNorm(8).requires_grad_(False), lean(nn.RMSNorm(8))):
        input = x.clone().requires_grad_()
        output = norm(input)
        results.append((output.detach(), *torch.autograd.grad(output, input, torch.ones(4, 8))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_rms_norm_that_trains_is_torchs() -> None:
    norm = lean(nn.RMSNorm(8))
    norm.weight.requires_grad_(True)
    x, grad_output = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    actual = torch.autograd.grad(norm(x), (x, norm.weight), grad_output)
    expected = torch.autograd.grad(F.rms_norm(x, (8,), norm.weight), (x, norm.weight), grad_output)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_under_autocast() -> None:
    dense = nn.RMSNorm(8).requires_grad_(False)
    norm = lean(copy.deepcopy(dense))
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = dense(x), norm(x)
        assert saved_bytes(norm, lambda: norm(x)) == x.numel() * 2
    assert a.dtype == b.dtype and torch.equal(a, b)
    (grad_a,), (grad_b,) = (torch.autograd.grad(y, x, torch.ones_like(y)) for y in (a, b))
    assert (grad_a - grad_b).abs().max() <= ROUNDING[torch.bfloat16] * grad_a.abs().max()


def test_rms_norm_copies_and_compiles() -> None:
    norm = lean(as_trained(nn.RMSNorm(8)))
    x = torch.randn(5, 8, requires_grad=True)
    output = norm(x)
    (expected,) = torch.autograd.grad(output, x, torch.ones_like(output))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), compiled):
        torch.testing.assert_close(twin(x), output)
        torch.testing.assert_close(torch.autograd.grad(twin(x).sum(), x)[0], expected)
    with torch.no_grad():
        assert torch.equal(norm(x), output)
