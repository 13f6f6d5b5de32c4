"""timm's ViT: the size of its images, its fused projections, and a whole run on digits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import trady_kernels as tk
from trady_kernels.cli import main
from trady_kernels.convert import sparse_layers
from trady_kernels.models import loading
from trady_kernels.models.loading import Sizes, load_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
NAME = "timm:vit_tiny_patch16_224"


def test_fused_projections_train_as_one_layer() -> None:
    loaded = load_model(NAME, 3, pretrained=False, sizes=Sizes(image_size=32))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    dense = load_model(NAME, 3, pretrained=False, sizes=Sizes(image_size=32)).model
    model = tk.sparsify(loaded.model, images, head="head")
    # Of each of the twelve blocks qkv, proj, fc1 and fc2, and the patches' convolution.
    assert (
        len(sparse_layers(model)) == 49 and model.get_submodule("blocks.3.attn.qkv").out_features == 3 * 192
    )
    sampler = tk.ChannelSampler(model, images, budget="5%")
    # A sample is 4 patches and the class token.
    assert sampler.layers["blocks.3.attn.qkv"].channel.elements == 3 * 192 + 5
    for network in (model, dense):
        F.cross_entropy(network(images), labels).backward()
    for name, channels in sampler.selection.items():
        if len(channels) and "attn.qkv" in name:
            expected = dense.get_submodule(name).weight.grad.t()[channels]
            torch.testing.assert_close(model.get_submodule(name).channel_weight.grad, expected)
    assert any(len(channels) for name, channels in sampler.selection.items() if "attn.qkv" in name)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_run_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.import_library("timm"), "is_model_pretrained", lambda name: False)
    arguments = ["--model", NAME, "--data", "digits", "--image-size", "32", "--budget", "5%", "--epochs", "1"]
    arguments += ["--train-samples", "20", "--test-samples", "10", "--batch-size", "10", "--threads", "1"]
    assert main(["finetune", *arguments, "--output", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["schemes"]
    assert rows["head-only"]["saved_bytes"] < rows["trady"]["saved_bytes"] < rows["full"]["saved_bytes"]
    assert 0 < rows["trady"]["cost"] <= 0.05 * rows["trady"]["full_cost"]
