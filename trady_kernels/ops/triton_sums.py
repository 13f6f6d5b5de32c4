"""Sums over many pixels in Triton: how they are split over a GPU, and how the parts are added in a fixed order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from trady_kernels.ops.backend import TRITON_INTERPRETED
from trady_kernels.ops.triton_configuration import Configuration
from trady_kernels.ops.triton_launch import ceil_div, launch

#: Triton's names of the dtypes that are summed in float32.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: So many pixels or fewer take less time than the sum of their part with others.
FEW_PIXELS = 256
#: Pixels of the whole batch are counted in 32 bits, tails of blocks included.
MOST_PIXELS = 2**31 - 2**16
#: Multiprocessors that the interpreter stands for: few, it runs one program after the other.
INTERPRETED_MULTIPROCESSORS = 2

#: Parts and elements that a program adds at a time, and its warps: many parts at once, for a loop over them waits for memory
#: each time; more elements where parts are few.
MANY_PARTS, FEW_PARTS = (256, 16, 8), (64, 32, 4)
STAGES = 2


def check(input_selected: torch.Tensor, pixels: int) -> None:
    """Whether the Triton kernels that sum over pixels take this call.

    Raises:
        NotImplementedError: float64 or a dtype without a gradient; more pixels than 32 bits count.
    """
    if input_selected.dtype not in TYPES:
        raise NotImplementedError(
            f"input_selected: got {input_selected.dtype}, the Triton kernel expects float32, bfloat16 or float16; "
            "use another backend for this dtype"
        )
    if pixels > MOST_PIXELS:
        raise NotImplementedError(
            f"grad_output: got {pixels} pixels, the Triton kernel expects at most {MOST_PIXELS}; "
            "use another backend or a smaller batch"
        )


def matmul_precision(dtype: torch.dtype) -> str:
    """Precision of ``tl.dot`` by torch's switch for matrix products; of half types every product is exact."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def conv_precision(dtype: torch.dtype) -> str:
    """Precision of ``tl.dot`` by torch's switch for convolutions, under which it allows TF32 unless told otherwise."""
    # The new switch shows what the old one was set to; the old one raises where the new one was set.
    switch: Any = torch.backends.cudnn
    allowed = dtype == torch.float32 and switch.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; under the interpreter a small number."""
    return INTERPRETED_MULTIPROCESSORS if TRITON_INTERPRETED else _multiprocessors(device)


@dataclass(frozen=True)
class Split:
    """A sum over pixels in parts, each one program's for a tile of results.

    Attributes:
        parts: how many.
        pixels: of each part, a multiple of the block; the last may have fewer.
    """

    parts: int
    pixels: int


def split(pixels: int, block: int, tiles: int, programs: int) -> Split:
    """Parts that fill the GPU and are still long.

    Args:
        pixels: of the whole batch, at least one.
        block: pixels that a program takes at a time.
        tiles: of results, one program each for every part.
        programs: that the whole launch aims at.
    """
    parts = 1 if pixels <= FEW_PIXELS else max(1, programs // tiles)
    length = ceil_div(pixels, parts * block) * block
    return Split(ceil_div(pixels, length), length)


def divisor(number: int) -> tuple[int, int]:
    """What :func:`divide` takes for a division by ``number``, from 1 to 2^31: a factor of 32 bits, and a shift."""
    shift = (number - 1).bit_length()
    return -(-(1 << (31 + shift)) // number), shift


@triton.jit
def divide(
    dividend: tl.tensor,  # int32, not negative
    factor: tl.tensor,
    shift: tl.tensor,
) -> tl.tensor:
    """A division in a few instructions: the compiler's own takes twenty, for every pixel again.

    Made of operations that keep what the compiler knows of neighbours.
    """
    product = dividend.to(tl.uint32).to(tl.uint64) * factor.to(tl.uint32).to(tl.uint64)
    return (product >> (31 + shift).to(tl.uint64)).to(tl.int32)


@triton.jit
def locate(
    pixel: tl.tensor,  # of all images
    image_pixels: tl.tensor,
    image_factor: tl.tensor,  # of a division by image_pixels / VECTOR
    image_shift: tl.tensor,
    VECTOR: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Its image, and its place there; ``VECTOR`` neighbours are of one image."""
    image = divide(pixel // VECTOR, image_factor, image_shift)
    return image.to(tl.int64), pixel - image * image_pixels


class Sums:
    """Where the programs of a split write: the results themselves, or parts of them in between.

    Args:
        results: the gradient and, where it is wanted, the bias's: contiguous float32 tensors on one device, no two of
            them of one storage.

    Attributes:
        with_bias: whether there are two results.
        targets: one for each result, where part ``i`` starts at ``i * step`` elements; after :meth:`cut`.
        step: from a part to the next.
        output_step, tap_step: from an output, and from a tap, of a channel's gradient to the next; after :meth:`cut`.
    """

    def __init__(self, results: tuple[torch.Tensor, ...]) -> None:
        self.results = results
        self.with_bias = len(results) > 1
        self.step = sum(result.numel() for result in results)

    def cut(self, parts: int, taps: int = 1) -> None:
        """Make room for as many parts, in which a channel's outputs lie next to each other, tap after tap.

        Args:
            parts: how many.
            taps: of a channel and an output, for programs whose lanes go along outputs; 1 leaves a gradient as it is.
        """
        self.parts = parts
        self.targets = self.results
        self.taps, self.outputs = taps, self.results[0].shape[1] if taps > 1 else 1
        self.output_step, self.tap_step = (1, self.outputs) if parts > 1 else (taps, 1)
        if parts > 1:
            partial = self.results[0].new_empty(parts * self.step)
            starts = [sum(result.numel() for result in self.results[:i]) for i in range(len(self.results))]
            self.targets = tuple(partial[start:] for start in starts)

    def add(self) -> None:
        """Add the parts, always in the same order."""
        if self.parts == 1:
            return
        first, last = self.results[0], self.results[-1]
        parts, elements, warps = MANY_PARTS if self.parts > FEW_PARTS[0] else FEW_PARTS
        launch(
            _add_parts,
            (ceil_div(self.step, elements),),
            self.targets[0],
            first,
            last,
            first.numel(),
            self.step,
            self.parts,
            self.outputs,
            self.taps,
            PARTS=parts,
            ELEMENTS=elements,
            num_warps=warps,
            num_stages=STAGES,
        )


class Squares(Sums):
    """The sums of squares of a gradient's rows, which exists in parts only.

    Args:
        squares: ``(rows,)`` float32.
        length: elements of a row.
    """

    def __init__(self, squares: torch.Tensor, length: int) -> None:
        super().__init__((squares,))
        self.length = length
        self.step = squares.numel() * length

    def cut(self, parts: int, taps: int = 1) -> None:
        """Make room for as many parts."""
        self.parts = parts
        self.output_step, self.tap_step = 1, self.length // taps
        self.targets = (self.results[0].new_empty(parts * self.step),)

    def add(self) -> None:
        """Add the parts, then the squares of each row, always in the same order."""
        (squares,) = self.results
        parts, elements, warps = FEW_PARTS
        launch(
            _add_squares,
            (squares.numel(),),
            self.targets[0],
            squares,
            self.length,
            self.step,
            self.parts,
            PARTS=parts,
            ELEMENTS=elements,
            num_warps=warps,
            num_stages=STAGES,
        )


@triton.jit(do_not_specialize=["length", "count", "parts"])
def _add_squares(
    partial: tl.tensor,  # (parts, count)
    squares: tl.tensor,  # (count / length,)
    length: tl.int64,
    count: tl.int64,
    parts: tl.int32,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    squared = tl.zeros((ELEMENTS,), tl.float32)
    for first in range(0, length, ELEMENTS):
        element = first + tl.arange(0, ELEMENTS)
        total = tl.zeros((PARTS, ELEMENTS), tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            total += tl.load(
                partial + part.to(tl.int64)[:, None] * count + row * length + element[None, :],
                mask=(part < parts)[:, None] & (element < length)[None, :],
                other=0.0,
            )
        value = tl.sum(total, axis=0)
        squared += value * value
    tl.store(squares + row, tl.sum(squared))


@triton.jit(do_not_specialize=["first_count", "count", "parts", "outputs", "taps"])
def _add_parts(
    partial: tl.tensor,  # (parts, count), of which first_count elements are (channels, taps, outputs)
    first: tl.tensor,  # (channels, outputs, taps)
    last: tl.tensor,  # (count - first_count,)
    first_count: tl.int64,
    count: tl.int64,
    parts: tl.int32,
    outputs: tl.int32,
    taps: tl.int32,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < count
    total = tl.zeros((PARTS, ELEMENTS), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(
            partial + part.to(tl.int64)[:, None] * count + element[None, :],
            mask=(part < parts)[:, None] & inside[None, :],
            other=0.0,
        )
    value = tl.sum(total, axis=0)
    output, tap = element % outputs, element // outputs % taps
    place = element // (outputs * taps) * (outputs * taps) + output * taps + tap
    tl.store(first + place, value, mask=element < first_count)
    tl.store(last + (element - first_count), value, mask=inside & (element >= first_count))


def configurations() -> list[Configuration]:
    """Every variant of the kernels that add parts."""
    signature = {
        "partial": "*fp32",
        "first": "*fp32",
        "last": "*fp32",
        "first_count": "i64",
        "count": "i64",
        "parts": "i32",
        "outputs": "i32",
        "taps": "i32",
    }
    of_squares = {"partial": "*fp32", "squares": "*fp32", "length": "i64", "count": "i64", "parts": "i32"}
    return [
        Configuration(kernel, types, {"PARTS": parts, "ELEMENTS": elements}, warps, STAGES)
        for kernel, types, (parts, elements, warps) in (
            (_add_parts, signature, MANY_PARTS),
            (_add_parts, signature, FEW_PARTS),
            (_add_squares, of_squares, FEW_PARTS),
        )
    ]
