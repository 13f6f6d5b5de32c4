"""The embedded networks."""

from trady_kernels.models.efficientnet_lite import EfficientNetLite0
from trady_kernels.models.minilm import MiniLM
from trady_kernels.models.mobilenet_v2 import MobileNetV2

__all__ = ["EfficientNetLite0", "MiniLM", "MobileNetV2"]
