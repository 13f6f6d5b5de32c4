"""Rated sentences: what is read from the archive, where it is looked for, and how it is split."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rated_sentences import opinions, write_archive

from trady_kernels.data import LabelledSentences, load_data
from trady_kernels.data.sentences import ARCHIVE, find_sentences, folders, read_sentences


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in TRADY_DATA; the cache is empty."""
    monkeypatch.setenv("TRADY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_the_sign_of_the_rating_is_the_label(folder: Path) -> None:
    lines = [
        '1\t2.5\tSo good; even "great"',
        "2\t-0.05\tna\u00efve\tand tabbed\u2028on ",
        "3_1\t0\tneither",
        "",
        "4\t-0.0\tneither, too",
        '5\t-3\tSo good; even "great"',  # the same sentence again, rated otherwise
        "6\t0.05\tlast, without a line's end",
    ]
    read = read_sentences(write_archive(folder, lines), "tweets")
    assert read.sentences == (
        "So good; even \"great\"", "na\u00efve\tand tabbed\u2028on ", "last, without a line's end"
    )  # fmt: skip
    assert read.labels.tolist() == [1, 0, 1] and read.labels.dtype == torch.int64


def test_split_is_fixed_and_even(folder: Path) -> None:
    write_archive(folder, opinions(50))
    data = load_data("tweets")
    assert (data.name, data.kind, data.classes) == ("tweets", "sentences", ("negative", "positive"))
    assert data.train.labels.bincount().tolist() == [20, 20] and data.test.labels.bincount().tolist() == [
        5,
        5,
    ]
    assert not set(data.train.sentences) & set(data.test.sentences)  # type: ignore[attr-defined]
    for part in (data.train, data.test):
        words = zip(part.sentences, part.labels.tolist(), strict=True)  # type: ignore[attr-defined]
        assert all(("good" in sentence) == bool(label) for sentence, label in words)
    assert load_data("tweets", image_size=8).test.checksum() == data.test.checksum()
    limited = load_data("tweets", train_samples=10, validation_share=0.25)
    assert limited.train.labels.bincount().tolist() == [5, 5] and len(limited.test) == 10
    held_out = {*limited.train.sentences, *limited.test.sentences}  # type: ignore[attr-defined]
    assert not held_out & set(data.test.sentences)  # type: ignore[attr-defined]


def test_checksum_sees_sentences_labels_and_order() -> None:
    sentences = LabelledSentences(("a b", "c", "b a"), torch.tensor([0, 1, 0]))
    different = (
        sentences.subset(torch.tensor([2, 1, 0])),
        LabelledSentences(("a b", "c", "b a"), torch.tensor([0, 1, 1])),
        LabelledSentences(("a b", "d", "b a"), torch.tensor([0, 1, 0])),
    )
    assert sentences.checksum() not in {other.checksum() for other in different}
    assert sentences.checksum() == sentences.subset(torch.arange(3)).checksum()


def test_a_named_folder_comes_before_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = folders()[1]
    cached = write_archive(cache, opinions(4))
    assert find_sentences("tweets") == cached
    assert find_sentences("tweets") != write_archive(folder, opinions(4)) == find_sentences("tweets")
    monkeypatch.delenv("TRADY_DATA")
    assert find_sentences("tweets") == cached and folders() == (cache,)


def test_a_missing_archive_gets_the_command_that_fetches_it(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data: 'tweets' needs vaderSentiment-3\.3\.2") as caught:
        load_data("tweets")
    message = str(caught.value)
    assert f"pip download --no-deps --no-binary vaderSentiment -d {folder} vaderSentiment==3.3.2" in message
    assert "\n" not in message


def _without_inner(path: Path) -> None:
    with tarfile.open(path, "w:gz"):
        pass


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b"no archive"), "no readable tweets_GroundTruth"),
        (_cut_short, "no readable tweets_GroundTruth"),
        (_without_inner, r"no file hutto_ICWSM_2014\.tar\.gz"),
        (lambda path: write_archive(path.parent, opinions(4), "editorials"), "no file tweets_GroundTruth"),
        (lambda path: write_archive(path.parent, ["1\t2", "2\t1\tb"]), r"line 1 is '1\\t2'"),
        (lambda path: write_archive(path.parent, ["1\t1\ta", "2\tmuch\tb"]), "line 2"),
        (lambda path: write_archive(path.parent, ["1\tnan\ta"]), "line 1"),
        (lambda path: write_archive(path.parent, ["1\t1\ta", "2\t0\tb"]), "expected positive and negative"),
        (lambda path: write_archive(path.parent, []), "expected positive and negative"),
    ],
    ids=["no_archive", "cut_short", "no_inner", "no_file", "two_fields", "word", "nan", "one_sign", "empty"],
)  # fmt: skip
def test_a_damaged_archive_gets_one_sentence(
    folder: Path, damage: Callable[[Path], object], says: str
) -> None:
    write_archive(folder, opinions(4))
    damage(folder / ARCHIVE)
    with pytest.raises(ValueError, match=rf"^data: .*{says}.*remove it and fetch .* again$") as caught:
        load_data("tweets")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    not any((folder / ARCHIVE).is_file() for folder in folders()),
    reason=f"{ARCHIVE} is in none of {', '.join(map(str, folders()))}",
)
@pytest.mark.parametrize(
    ("name", "count"),
    [("movie-reviews", 10566), ("tweets", 4196), ("editorials", 4878), ("product-reviews", 3599)],
)
def test_the_real_sentences(name: str, count: int) -> None:
    data = load_data(name)
    assert len(data.train) + len(data.test) == count
