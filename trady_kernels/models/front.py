"""What stands before a network: it turns a data set's samples into the network's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from trady_kernels.batch import Example
from trady_kernels.data import LabelledImages, LabelledSentences, Samples, to_network_input

#: A token between [CLS] and [SEP].
_SHORTEST = 3


class Front(Protocol):
    """Turns samples of one kind into the input of one network."""

    @property
    def kind(self) -> str:
        """The kind of samples that it takes."""

    @property
    def size(self) -> str:
        """What one sample measures, in words: "64x64", "64 tokens"."""

    def prepare(self, samples: Samples) -> Samples:
        """Do once, for all samples, what needs no second time; the result stays in memory."""

    def input(self, samples: Samples, device: torch.device | str) -> Example:
        """The network's input for prepared samples."""

    def random_input(self, count: int, generator: torch.Generator) -> Example:
        """Random input of the right shapes, for what depends on shapes alone."""


@dataclass(frozen=True)
class ImageFront:
    """Byte images, scaled as the network was trained.

    Args:
        side: of the images in pixels.
        mean: of the three channels of the network's input, on a 0..1 scale.
        std: standard deviation, likewise.
    """

    kind: ClassVar[str] = "images"
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> str:
        """Width and height."""
        return f"{self.side}x{self.side}"

    def prepare(self, samples: Samples) -> Samples:
        """The images as they are: ``load_data`` has resized them."""
        return samples

    def input(self, samples: Samples, device: torch.device | str) -> torch.Tensor:
        """float32 ``(N, 3, side, side)``, channels last.

        A step of full fine-tuning of EfficientNet-Lite0 (batch 32, 64x64, 2 cores) takes 240 ms so, 388 otherwise.
        """
        assert isinstance(samples, LabelledImages)
        images = to_network_input(samples.images, self.mean, self.std, device)
        return images.contiguous(memory_format=torch.channels_last)

    def random_input(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """float32 ``(count, 3, side, side)``, contiguous."""
        return torch.randn((count, 3, self.side, self.side), generator=generator)


@dataclass(frozen=True)
class LabelledTokens:
    """Sentences as numbers, each padded to the same length.

    Args:
        ids: int32 ``(N, L)``.
        lengths: int64 ``(N,)``, tokens before the padding.
        labels: int64 ``(N,)``.
    """

    kind: ClassVar[str] = "sentences"
    ids: torch.Tensor  # (N, L) int32
    lengths: torch.Tensor  # (N,) int64
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> LabelledTokens:
        """The sentences at ``indices`` (int64 ``(n,)``), in that order."""
        return LabelledTokens(self.ids[indices], self.lengths[indices], self.labels[indices])

    def checksum(self) -> int:
        """A number that changes when a token, a label or their order does."""
        row, column = (torch.arange(1, size + 1) for size in self.ids.shape)
        return int((((self.ids * column).sum(1) * 1009 + self.labels) * row).sum())


@dataclass(frozen=True)
class TokenFront:
    """Sentences, cut into tokens.

    Every sentence is padded to the same length, so that every batch of a run costs the same and a budget counts
    what trains; longer ones are cut.

    Args:
        tokenizer: finds the file of the ``tokenizers`` library with the vocabulary and the rules.
        max_length: tokens of a sentence, [CLS] and [SEP] included.
        vocabulary: number of different tokens.
        positions: most tokens that the network takes.

    Raises:
        ValueError: ``max_length`` is out of range.
    """

    kind: ClassVar[str] = "sentences"
    tokenizer: Callable[[], Path]
    max_length: int
    vocabulary: int
    positions: int

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.max_length <= self.positions:
            raise ValueError(
                f"max_length: got {self.max_length}, expected {_SHORTEST} to {self.positions} tokens"
            )

    @property
    def size(self) -> str:
        """Tokens of a sentence."""
        return f"{self.max_length} tokens"

    def prepare(self, samples: Samples) -> LabelledTokens:
        """The sentences as tokens.

        Raises:
            ModuleNotFoundError: the tokenizers library is not installed.
            FileNotFoundError: the package with the vocabulary is not installed.
        """
        if isinstance(samples, LabelledTokens):
            return samples
        assert isinstance(samples, LabelledSentences)
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "model: a network for sentences needs the package tokenizers; install it with: pip install tokenizers"
            ) from error
        tokenizer = Tokenizer.from_file(str(self.tokenizer()))
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(length=self.max_length)
        encoded = tokenizer.encode_batch(list(samples.sentences))
        return LabelledTokens(
            torch.tensor([row.ids for row in encoded], dtype=torch.int32).view(-1, self.max_length),
            torch.tensor([sum(row.attention_mask) for row in encoded], dtype=torch.int64),
            samples.labels,
        )

    def input(self, samples: Samples, device: torch.device | str) -> dict[str, torch.Tensor]:
        """``input_ids`` int64 ``(N, max_length)`` and ``attention_mask`` bool ``(N, max_length)``."""
        assert isinstance(samples, LabelledTokens)
        inside = torch.arange(self.max_length) < samples.lengths[:, None]
        return {"input_ids": samples.ids.long().to(device), "attention_mask": inside.to(device)}

    def random_input(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The same, of random tokens without padding."""
        return {
            "input_ids": torch.randint(self.vocabulary, (count, self.max_length), generator=generator),
            "attention_mask": torch.ones((count, self.max_length), dtype=torch.bool),
        }
