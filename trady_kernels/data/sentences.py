"""Sentences that people rated from very negative to very positive, from the sources of the package vaderSentiment."""

from __future__ import annotations

import io
import math
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import torch

CLASSES = ("negative", "positive")
#: The rated sentences of each data set, by the names that their collectors gave the files.
FILES = {
    "movie-reviews": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "product-reviews": "amazonReviewSnippets_GroundTruth.txt",
}
#: Environment variable with a folder to look in first.
FOLDER_VARIABLE = "TRADY_DATA"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_INNER = "hutto_ICWSM_2014.tar.gz"
#: Multiplier and modulus of the checksum of a sentence.
_BASE, _PRIME = 257, 2**31 - 1


@dataclass(frozen=True)
class LabelledSentences:
    """Sentences with their class numbers.

    Args:
        sentences: N strings.
        labels: int64 ``(N,)``.
    """

    kind: ClassVar[str] = "sentences"
    sentences: tuple[str, ...]
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> LabelledSentences:
        """The sentences at ``indices`` (int64 ``(n,)``), in that order."""
        return LabelledSentences(
            tuple(self.sentences[index] for index in indices.tolist()), self.labels[indices]
        )

    def checksum(self) -> int:
        """A number that changes when a sentence, a label or their order does."""
        total = 0
        for sentence, label in zip(self.sentences, self.labels.tolist(), strict=True):
            total = (total * _BASE + zlib.crc32(sentence.encode())) % _PRIME
            total = (total * _BASE + label) % _PRIME
        return total


def folders() -> tuple[Path, ...]:
    """Where the archive is looked for: the folder in ``TRADY_DATA``, where set, then the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trady_kernels"
    named = os.environ.get(FOLDER_VARIABLE)
    return (Path(named).expanduser(), cache) if named else (cache,)


def find_sentences(name: str) -> Path:
    """Path of the source archive of vaderSentiment 3.3.2, which has the rated sentences; it is never unpacked.

    Args:
        name: of the data set, for the message.

    Raises:
        FileNotFoundError: it is not here; the message has the command that fetches it.
    """
    for folder in folders():
        if (folder / ARCHIVE).is_file():
            return folder / ARCHIVE
    looked_in = " and ".join(map(str, folders()))
    raise FileNotFoundError(
        f"data: {name!r} needs {ARCHIVE}, which is not in {looked_in}; fetch it with: pip download --no-deps "
        f"--no-binary vaderSentiment -d {folders()[0]} vaderSentiment==3.3.2"
    )


def read_sentences(path: Path, name: str) -> LabelledSentences:
    """Read the rated sentences of one data set: label 1 for a positive mean rating, 0 for a negative one.

    Sentences rated 0 on average are left out, and of equal ones all but the first, so that none is both trained
    and tested on.

    Args:
        path: the source archive.
        name: one of ``FILES``.

    Raises:
        ValueError: the archive is damaged or another one.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    again = f"remove it and fetch {ARCHIVE} again"
    try:
        with tarfile.open(path, "r:gz") as outer:
            packed = io.BytesIO(_member(outer, _INNER))
        with tarfile.open(fileobj=packed, mode="r:gz") as inner:
            lines = _member(inner, FILES[name]).decode("utf-8").split("\n")
    except (OSError, EOFError, KeyError, UnicodeDecodeError, zlib.error, tarfile.TarError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise ValueError(f"data: {path} has no readable {FILES[name]} ({reason}); {again}") from error
    ratings: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _, rating, sentence = line.rstrip("\r").split("\t", 2)
            value = float(rating)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"data: {FILES[name]} in {path} line {number} is {line.strip()[:40]!r}, expected an id, a mean "
                f"rating and a sentence between tabs; {again}"
            )
        ratings.setdefault(sentence, value)
    rated = {sentence: value > 0 for sentence, value in ratings.items() if value}
    if len(set(rated.values())) < len(CLASSES):
        raise ValueError(
            f"data: {FILES[name]} in {path} has {len(rated)} rated sentences, expected positive and negative "
            f"ones; {again}"
        )
    return LabelledSentences(tuple(rated), torch.tensor(list(rated.values())).long())


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    for member in archive:
        if PurePosixPath(member.name).name == name:
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise KeyError(f"no file {name}")
