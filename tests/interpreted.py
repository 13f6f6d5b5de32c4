"""What tests of Triton kernels share: tensors on their device, and an interpreter that rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device of the tensor and of all that its memory holds, laid out alike."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((elements,), (1,), 0).to(device, copy=True)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def round_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter convert between float32 and bfloat16 as a GPU does.

    Its own conversion cuts digits off and gets denormal numbers wrong (Triton 3.5 to 3.7).
    """
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(input: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(input.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(input.view("int16").copy()).view(torch.bfloat16).float().numpy()
        return convert(input, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
