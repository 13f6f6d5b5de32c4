"""Data sets for fine-tuning: images and sentences by name, anything else as a folder of images."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trady_kernels.data.digits import find_digits, read_digits
from trady_kernels.data.fashion_mnist import CLASSES as FASHION_CLASSES
from trady_kernels.data.fashion_mnist import DEBIAN_FOLDER, is_idx_folder, read_idx_folder
from trady_kernels.data.image_folder import find_classes, read_images
from trady_kernels.data.images import LabelledImages, resize, to_network_input
from trady_kernels.data.mnist import find_mnist, read_mnist
from trady_kernels.data.samples import DataSet, Samples, SamplesOfAKind, complement, stratified_subset
from trady_kernels.data.sentences import CLASSES as SENTENCE_CLASSES
from trady_kernels.data.sentences import FILES, LabelledSentences, find_sentences, read_sentences

__all__ = [
    "CLASSES",
    "DATA_SETS",
    "DataSet",
    "LabelledImages",
    "LabelledSentences",
    "Samples",
    "kind_of",
    "load_data",
    "to_network_input",
]

#: Share of the samples tested on where a data set brings no test set of its own.
TEST_SHARE = 0.2
#: Splits do not follow the training seed: every run tests on the same samples.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class _Parts:
    """A data set before it is cut to the asked number of samples."""

    name: str
    classes: tuple[str, ...]
    train: Samples
    test: Samples | None  # None: a share of train is held out


_DIGITS = tuple("0123456789")
#: Classes of the data sets that go by a name.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "mnist": _DIGITS,
    "digits": _DIGITS,
    "fashion-mnist": FASHION_CLASSES,
    **dict.fromkeys(FILES, SENTENCE_CLASSES),
}


def _resized(images: LabelledImages, size: int) -> LabelledImages:
    return LabelledImages(resize(images.images, size), images.labels)


def _mnist(size: int) -> _Parts:
    return _Parts("mnist", CLASSES["mnist"], _resized(read_mnist(find_mnist()), size), None)


def _digits(size: int) -> _Parts:
    return _Parts("digits", CLASSES["digits"], _resized(read_digits(find_digits()), size), None)


def _sentences(name: str) -> Callable[[int], _Parts]:
    def read(size: int) -> _Parts:
        return _Parts(name, CLASSES[name], read_sentences(find_sentences(name), name), None)

    return read


def _idx_folder(folder: Path, size: int, name: str, classes: tuple[str, ...] | None) -> _Parts:
    train, test = (_resized(part, size) for part in read_idx_folder(folder))
    count = 1 + int(torch.cat([train.labels, test.labels]).max())
    return _Parts(name, classes or tuple(map(str, range(count))), train, test)


def _fashion_mnist(size: int) -> _Parts:
    if not is_idx_folder(DEBIAN_FOLDER):
        raise FileNotFoundError(
            f"data: 'fashion-mnist' needs its IDX files in {DEBIAN_FOLDER}; install them with "
            "apt-get install dataset-fashion-mnist, or give the folder that has them"
        )
    return _idx_folder(DEBIAN_FOLDER, size, "fashion-mnist", CLASSES["fashion-mnist"])


def _class_folders(folder: Path, size: int) -> _Parts:
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or held_out is None:
        classes = find_classes(folder)
        return _Parts(folder.name, tuple(classes), read_images(classes, size), None)
    train, test = find_classes(folder / "train"), find_classes(held_out)
    if list(train) != list(test):
        differing = sorted(set(train) ^ set(test))
        raise ValueError(
            f"data: {folder / 'train'} and {held_out} must have the same class folders, "
            f"{', '.join(differing)} is in one only"
        )
    return _Parts(folder.name, tuple(train), read_images(train, size), read_images(test, size))


#: Data sets that go by a name.
DATA_SETS: dict[str, Callable[[int], _Parts]] = {
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    **{name: _sentences(name) for name in FILES},
}


def kind_of(data: str) -> str:
    """The kind of samples that a data set of that name has: "sentences" or "images"."""
    return LabelledSentences.kind if data in FILES else LabelledImages.kind


def _read(data: str, size: int) -> _Parts:
    if data in DATA_SETS:
        return DATA_SETS[data](size)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        close = difflib.get_close_matches(data, DATA_SETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise FileNotFoundError(
            f"data: got {data!r}, expected {', '.join(map(repr, DATA_SETS))} or an existing folder{hint}"
        )
    if is_idx_folder(folder):
        return _idx_folder(folder, size, folder.name, None)
    return _class_folders(folder, size)


def _limited(part: SamplesOfAKind, samples: int | None, argument: str) -> SamplesOfAKind:
    if samples is None or samples == len(part):
        return part
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    try:
        return part.subset(stratified_subset(part.labels, samples, generator))
    except ValueError as error:
        raise ValueError(str(error).replace("samples", argument, 1)) from error


def load_data(
    data: str,
    *,
    image_size: int = 64,
    train_samples: int | None = None,
    test_samples: int | None = None,
    validation_share: float = 0.0,
) -> DataSet:
    """Read a data set, split it the same way every time, and resize its images once.

    Args:
        data: a name in ``DATA_SETS``, or a folder: of IDX files, of class folders of images, or of
            ``train`` and ``test`` (or ``val``) folders of class folders.
        image_size: side of the images in pixels; sentences have none.
        train_samples: train on that many samples only, classes in proportion; None for all.
        test_samples: the same for the test samples.
        validation_share: above 0, that share of the training samples is held out and takes the place of
            the test samples, for choosing settings without looking at the test set.

    Returns:
        The data set in memory, images as bytes, sentences as strings.

    Raises:
        FileNotFoundError: no such data set or folder, or its package is not installed.
        ValueError: a file could not be read, a class is empty, or an argument is out of range.
    """
    if image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1 pixel")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share: got {validation_share}, expected 0 to below 1")
    parts = _read(data, image_size)
    train, test = parts.train, parts.test
    for share in ([] if test is not None else [TEST_SHARE]) + (
        [validation_share] if validation_share else []
    ):
        count = max(round(share * len(train)), len(parts.classes))
        if int(torch.bincount(train.labels, minlength=len(parts.classes)).min()) < 2:
            smallest = parts.classes[int(torch.bincount(train.labels, minlength=len(parts.classes)).argmin())]
            raise ValueError(
                f"data: class {smallest!r} of {data} has fewer than 2 {train.kind}, "
                "expected at least one to train on and one to test on"
            )
        held_out = stratified_subset(train.labels, count, torch.Generator().manual_seed(_SPLIT_SEED))
        train, test = train.subset(complement(held_out, len(train))), train.subset(held_out)
    assert test is not None
    return DataSet(
        parts.name,
        parts.classes,
        _limited(train, train_samples, "train_samples"),
        _limited(test, test_samples, "test_samples"),
    )
