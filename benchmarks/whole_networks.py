"""The networks whose memory is measured, and what they must reach: batch 8, 224x224, or 128 tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trady_kernels.models import loading
from trady_kernels.models.loading import load_model


def _image_network(source: str, num_classes: int, image_size: int) -> nn.Module:
    model = load_model(source, num_classes, pretrained=False).model
    if hasattr(model, "set_input_size"):  # a vision transformer's position embedding depends on it
        model.set_input_size(img_size=image_size)
    return model


def _images(batch_size: int, image_size: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, image_size, image_size)


def _bert(source: str, num_classes: int, tokens: int) -> nn.Module:
    if importlib.util.find_spec("torchvision") is not None:
        # Transformers imports it too, and fails where its binaries do not fit.
        loading.import_library("torchvision")
    from transformers import BertConfig, BertForSequenceClassification

    shape: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "num_labels": num_classes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**shape)).train()


def _tokens(batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(30522, (batch_size, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what a network returns."""
    return F.cross_entropy(getattr(output, "logits", output).float(), target)


@dataclass(frozen=True, eq=False)
class Network:
    """A whole network.

    Attributes:
        name: as printed.
        source: what builds it: a library and the name it has there.
        note: modes that decide what it keeps.
        relu_like: whether all its activations keep one bit an element, exactly.
        shares: the most that each selection may keep, as a share of full fine-tuning.
        size: of the input's sides in the full benchmark, in pixels or tokens.
        small: likewise in tests.
    """

    name: str
    source: str
    note: str = ""
    relu_like: bool = True
    shares: Mapping[str, float] = field(default_factory=dict)
    size: int = 224
    small: int = 64
    build: Callable[[str, int, int], nn.Module] = _image_network
    sample: Callable[[int, int], Any] = _images

    @property
    def library(self) -> str:
        return self.source.partition(":")[0]

    @property
    def missing(self) -> str | None:
        """Why it cannot be built here, in one sentence."""
        if importlib.util.find_spec(self.library) is not None:
            return None
        return f"{self.library} is not installed: pip install {self.library}"

    def make(self, num_classes: int = 1000, size: int | None = None) -> nn.Module:
        """The network at random values, the same each time, in training mode."""
        return self.build(self.source, num_classes, size or self.size)

    def batch(
        self, batch_size: int, num_classes: int = 1000, size: int | None = None
    ) -> tuple[Any, torch.Tensor]:
        """Random input and target, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.sample(batch_size, size or self.size), torch.randint(num_classes, (batch_size,))


FRACTION, BUDGET = "5%", "1MiB"
NETWORKS: tuple[Network, ...] = (
    Network("EfficientNet-Lite0", "timm:efficientnet_lite0", shares={FRACTION: 0.033, BUDGET: 0.015}),
    Network("MobileNetV2", "torchvision:mobilenet_v2", shares={FRACTION: 0.033, BUDGET: 0.015}),
    Network("ResNet-18", "torchvision:resnet18", shares={FRACTION: 0.054, BUDGET: 0.033}),
    Network("ResNet-50", "torchvision:resnet50", shares={FRACTION: 0.047, BUDGET: 0.022}),
    Network("MobileNetV3-small", "timm:mobilenetv3_small_100", relu_like=False),
    Network("ConvNeXt-atto", "timm:convnext_atto", relu_like=False),
    Network("ViT-tiny", "timm:vit_tiny_patch16_224", relu_like=False),
    Network(
        "BERT",
        "transformers:bert",
        "MiniLM's shape, train mode, dropout 0.1 of hidden states and of attention",
        relu_like=False,
        size=128,
        small=32,
        build=_bert,
        sample=_tokens,
    ),
)
