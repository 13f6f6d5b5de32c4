"""The one table by which ``auto`` takes a kernel of ours or ATen: shipped limits, or a user's own, for each device type.

==========  ============================================================
``cpu``     C++ up to a limit, then ATen (oneDNN, BLAS)
``cuda``    Triton up to a limit, then ATen (cuDNN, cuBLAS); CUDA C++ for convolutions in groups
==========  ============================================================

``trady bench --tune`` measures the limits on the machine it runs on and writes them to :func:`table_path`. They are
read when the package is imported, so that no call and no traced graph reads a file, and only where they were made on
this machine: the same CPU and instruction set or GPU, the same versions of torch and Triton.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trady_kernels.ops.backend import HALVES, cpu_name, instruction_set, triton_version, unavailable
from trady_kernels.ops.layout import FORMATS

ANY = 1 << 62


@dataclass(frozen=True)
class Limit:
    """Up to how many channels a kernel of ours is taken; above, ATen on the compact input.

    On the CPU a dtype without a limit always runs in C++: ATen rounds the sums of the half types to the half type
    before they can be widened. On a GPU it always runs in ATen.

    Attributes:
        operator: name of the operator.
        family: kind of call, as the operator names it.
        memory_format: of the tensor that has all channels.
        dtype: of the input.
        most_channels: the limit: selected channels; of a 1x1 convolution, where both kernels may exchange input and
            grad_output, the smaller of selected channels and outputs.
        most_pixels: holds for calls of up to this many output pixels of the whole batch, or rows of a linear layer.
    """

    operator: str
    family: str
    memory_format: torch.memory_format
    dtype: torch.dtype
    most_channels: int
    most_pixels: int = ANY

    @property
    def key(self) -> Key:
        """What the limit is for, calls of any number of pixels together."""
        return self.operator, self.family, self.memory_format, self.dtype


Key = tuple[str, str, torch.memory_format, torch.dtype]

_CONTIGUOUS, _CHANNELS_LAST = torch.contiguous_format, torch.channels_last
_F32, _F64 = torch.float32, torch.float64

#: What ``trady bench --tune`` found against torch 2.13 (oneDNN and MKL), on the layers of MobileNetV2, EfficientNet-Lite0,
#: ResNet-18 and ResNet-50 at batch 8, by instruction set of the C++ kernels, on one thread and two. With AMX: on a Xeon
#: that has it (benchmarks/results/tune.json), where a call takes 0.9 to 7.4% longer (root mean square) than the faster of the two
#: kernels. With AVX-512: on a Zen 4, one thread, by the number of selected channels alone, before the last changes to the
#: kernels; strided 1x1 in channels_last was not measured there. With AVX2, and taken for the other sets: on a first Zen
#: (benchmarks/results/tune_avx2.json, docs/cpu_kernels.md), 0.0 to 5.5% longer.
_LINEAR = (
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F32, ANY),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F64, ANY),
)
_AVX512 = (
    Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, _F32, ANY),
    Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, _F32, ANY),
    Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, _F32, ANY),
    Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, _F32, ANY),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, ANY),
    Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, _F32, ANY),
    *_LINEAR,
)
_AMX = (
    Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, _F32, ANY),
    Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, _F32, 119),
    Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, _F32, 362),
    Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, _F32, 90),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, ANY),
    Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, _F32, ANY),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F32, 156, 64),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F32, 24),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F64, 156, 64),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F64, 24),
)
_AVX2 = (
    Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, _F32, 303),
    Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, _F32, 135),
    Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, _F32, 362),
    Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, _F32, 90),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, 90),
    Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, _F32, ANY),
    *_LINEAR,
)
# Families without a limit above are where oneDNN is not to be trusted, and no table may have one for them: strided and
# padded depthwise (pytorch#50042). Of strided 1x1 in channels_last (oneDNN#6035) ATen's path is no convolution.

_SHIPPED = {"avx512": _AVX512, "avx512_bf16": _AVX512, "avx512_amx": _AMX}

#: Measured on an H200 (torch 2.11, Triton 3.6), layers of MobileNetV2, ResNet-50, ViT-tiny and BERT at batch 128, up to 32
#: channels in float32 without TF32, in both layouts, and 1, 4 and 16 in bfloat16 in channels_last
#: (benchmarks/results/gpu_operators.json, gpu_products.json). Half types: Triton's kernels take less time than ATen's path, which has channels by
#: eights, on large maps, and up to seven channels on all but the smallest. float32: CUDA C++ wins at all numbers of
#: channels that were measured in 1x1 layers of planes, Triton in larger kernels up to a number that grows with the map.
#: Not measured: half types in contiguous layout (with taps held to three channels) and more than 16 channels of them.
#: float16 is taken for bfloat16's twin.
_GPU = (
    Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, _F32, 32),
    Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, _F32, 32),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, 1, 10_000),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, 4, 50_000),
    Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, _F32, 16),
    Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, _F32, 16),
    Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, _F32, 16),
    Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, _F32, 32),
    Limit("linear_channel_grad", "linear", _CONTIGUOUS, _F32, 16),
    *(
        limit
        for dtype in HALVES
        for limit in (
            Limit("conv2d_channel_grad", "1x1", _CONTIGUOUS, dtype, 16),
            Limit("conv2d_channel_grad", "1x1 strided", _CONTIGUOUS, dtype, 16),
            Limit("conv2d_channel_grad", "kxk", _CONTIGUOUS, dtype, 3),
            Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, dtype, 7, 50_000),
            Limit("conv2d_channel_grad", "1x1", _CHANNELS_LAST, dtype, 16),
            Limit("conv2d_channel_grad", "1x1 strided", _CHANNELS_LAST, dtype, 16),
            Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, dtype, 3, 10_000),
            Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, dtype, 7, 300_000),
            Limit("conv2d_channel_grad", "kxk", _CHANNELS_LAST, dtype, 16),
            Limit("linear_channel_grad", "linear", _CONTIGUOUS, dtype, 7),
        )
    ),
    *(
        Limit("conv2d_channel_grad", "grouped", memory_format, dtype, ANY)
        for memory_format in (_CONTIGUOUS, _CHANNELS_LAST)
        for dtype in (_F32, *HALVES, _F64)
    ),
)

#: What a table may have limits for, by device type.
KEYS: dict[str, tuple[Key, ...]] = {
    "cpu": tuple(dict.fromkeys(limit.key for limit in _AVX512)),
    "cuda": tuple(dict.fromkeys(limit.key for limit in _GPU)),
}


def shipped(device: str = "cpu") -> tuple[Limit, ...]:
    """The limits that come with the package for a device type and, on the CPU, the C++ kernels' instruction set."""
    if device == "cpu":
        return _SHIPPED.get(instruction_set() or "", _AVX2)
    if not torch.cuda.is_available():
        return _GPU
    limits = list(_GPU)
    if torch.cuda.get_device_capability() < (8, 0):
        # Triton has no matrix units there: what needs them would be multiplied one by one.
        on_units = [limit for limit in limits if limit.dtype in HALVES or limit.family == "kxk"]
        limits = [limit for limit in limits if limit not in on_units or limit.family == "grouped"]
    if unavailable("cuda"):  # Triton's products of planes in float32 are slower than ATen's
        limits = [limit for limit in limits if not _of_planes(limit.family, limit.memory_format, limit.dtype)]
    return tuple(limits)


#: Channels from which on Triton's products of float32 take less time than those in CUDA C++ where outputs are adjacent.
_FEW_ROWS = 8


def own_kernel(
    device: str, family: str, memory_format: torch.memory_format, dtype: torch.dtype, channels: int
) -> str:
    """Backend of the kernel that a limit is for: of two for the same call the one that is faster on an H200."""
    if device == "cpu":
        return "cpp"
    if family == "grouped":
        return "cuda"
    few = dtype == _F32 and family != "kxk" and channels < _FEW_ROWS
    return "cuda" if few or _of_planes(family, memory_format, dtype) else "triton"


def _of_planes(family: str, memory_format: torch.memory_format, dtype: torch.dtype) -> bool:
    return family in ("1x1", "1x1 strided") and memory_format == _CONTIGUOUS and dtype == _F32


def own_or_aten(
    device: str,
    operator: str,
    family: str,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    channels: int,
    pixels: int,
) -> str:
    """:func:`own_kernel` or ``"aten"`` by the table in force. Simple comparisons only: sizes may be symbolic.

    Args:
        device: type of the tensors' device, ``"cpu"`` or ``"cuda"``.
        operator, family, memory_format, dtype: the limit's.
        channels: the number that :attr:`Limit.most_channels` is for.
        pixels: of the output, in the whole batch; a linear layer's rows.
    """
    for limit in _limits[device].get((operator, family, memory_format, dtype), ()):
        if limit.most_pixels == ANY or pixels <= limit.most_pixels:
            few = limit.most_channels == ANY or channels <= limit.most_channels
            return own_kernel(device, family, memory_format, dtype, channels) if few else "aten"
    return "cpp" if device == "cpu" else "aten"


def limited(operator: str) -> bool:
    """Whether any limit of the CPU's table in force sends calls of ``operator`` to ATen."""
    return operator in _limited


# ---- which table is in force ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Where the limits in force come from.

    Attributes:
        path: file of a tuned table, read or not; None where there is none.
        made: when it was made, and for which machine; empty for the shipped limits.
        ignored: why the file is not in force; None where it is, or where there is none.
    """

    path: Path | None
    made: dict[str, str]
    ignored: str | None


DEVICES = ("cpu", "cuda")


def table_path(device: str = "cpu") -> Path | None:
    """File of the user's own limits: ``TRADY_CHOICE``, or ``trady_kernels/choice.json`` in the user's configuration.

    A GPU's has ``-cuda`` behind the name. None where ``TRADY_CHOICE`` is set and empty: the shipped limits then hold.
    """
    if "TRADY_CHOICE" in os.environ:
        if not os.environ["TRADY_CHOICE"]:
            return None
        path = Path(os.environ["TRADY_CHOICE"])
    else:
        folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = Path(folder) / "trady_kernels" / "choice.json"
    return path if device == "cpu" else path.with_stem(f"{path.stem}-{device}")


def this_machine(device: str = "cpu") -> dict[str, str]:
    """What limits hold for: CPU and instruction set of the C++ kernels, or GPU and Triton; version of torch."""
    if device == "cpu":
        here = {"cpu": cpu_name(), "instruction_set": instruction_set() or "none"}
    else:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        here = {"gpu": gpu, "triton": triton_version() or "none"}
    return {**here, "torch": torch.__version__}


def load() -> None:
    """Put the user's limits in force, or the shipped ones, with a warning where a file cannot be used."""
    for device in DEVICES:
        _load(device)


def _load(device: str) -> None:
    path = table_path(device)
    _put_in_force(device, _by_key(shipped(device)))
    _tables[device] = Table(None, {}, None)
    if path is None or not os.path.exists(path):
        if path is not None and "TRADY_CHOICE" in os.environ and device == "cpu":
            # No warning: trady bench --tune may be about to make it.
            _tables[device] = Table(path, {}, "there is no such file")
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        limits, made = parse(content, device)
        here = this_machine(device)
        other = [f"{name} {made[name]!r}, here {here[name]!r}" for name in here if made[name] != here[name]]
        if other:
            raise ValueError(f"made with {', '.join(other)}")
    except (OSError, ValueError) as error:
        _tables[device] = Table(path, {}, str(error))
        warnings.warn(
            f"{path} is ignored, the shipped limits hold ({error}): make it anew with trady bench --tune, or remove it",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    _put_in_force(device, _by_key(shipped(device)) | _by_key(limits))
    _tables[device] = Table(path, made, None)


def in_force(device: str = "cpu") -> Table:
    """Where the limits in force come from."""
    return _tables[device]


def limits_in_force(device: str = "cpu") -> list[Limit]:
    """The limits themselves."""
    return [limit for limits in _limits[device].values() for limit in limits]


def _by_key(limits: Iterable[Limit]) -> dict[Key, tuple[Limit, ...]]:
    found: dict[Key, tuple[Limit, ...]] = {}
    for limit in limits:
        found[limit.key] = (*found.get(limit.key, ()), limit)
    return found


def _put_in_force(device: str, limits: dict[Key, tuple[Limit, ...]]) -> None:
    global _limited
    _limits[device] = limits
    if device == "cpu":
        _limited = {limit.operator for of in limits.values() for limit in of if limit.most_channels != ANY}


_limits: dict[str, dict[Key, tuple[Limit, ...]]] = {device: {} for device in DEVICES}
_limited: set[str] = set()
_tables = {device: Table(None, {}, None) for device in DEVICES}


# ---- the file -------------------------------------------------------------------------------------------

#: Types by their names there.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def render(limits: Iterable[Limit], date: str, device: str = "cpu") -> dict[str, Any]:
    """Limits measured on this machine, as JSON takes them; no limit (:data:`ANY`) is null."""
    formats = {value: name for name, value in FORMATS.items()}
    dtypes = {value: name for name, value in DTYPES.items()}
    return {
        "made": {**this_machine(device), "date": date},
        "limits": [
            {
                "operator": limit.operator,
                "family": limit.family,
                "memory_format": formats[limit.memory_format],
                "dtype": dtypes[limit.dtype],
                "most_pixels": None if limit.most_pixels == ANY else limit.most_pixels,
                "most_channels": None if limit.most_channels == ANY else limit.most_channels,
            }
            for limit in limits
        ],
    }


def parse(content: Any, device: str = "cpu") -> tuple[list[Limit], dict[str, str]]:
    """Limits of a file that :func:`render` made for a device type, and what it says about itself.

    Raises:
        ValueError: anything that ``render`` does not write, and limits for calls that ATen must not get.
    """
    expected = (*this_machine(device), "date")
    made = content.get("made") if isinstance(content, dict) else None
    if not isinstance(made, dict) or not all(isinstance(made.get(name), str) for name in expected):
        raise ValueError(f"made: got {made!r}, expected texts for {', '.join(expected)}")
    rows = content.get("limits")
    if not isinstance(rows, list):
        raise ValueError(f"limits: got {rows!r}, expected a list")
    limits = [_limit(f"limits[{index}]", row, device) for index, row in enumerate(rows)]
    for key, of in _by_key(limits).items():
        pixels = [limit.most_pixels for limit in of]
        if pixels[-1] != ANY or pixels != sorted(set(pixels)):
            raise ValueError(
                f"limits: got most_pixels {pixels} for {key[:2]}, expected them to grow and to end in null"
            )
    return limits, {name: made[name] for name in expected}


def _limit(name: str, row: Any, device: str) -> Limit:
    if not isinstance(row, dict):
        raise ValueError(f"{name}: got {row!r}, expected an object")
    numbers: list[int] = []
    for field, least in (("most_channels", 0), ("most_pixels", 1)):
        value = row.get(field, "nothing")
        if value is None:
            value = ANY
        if type(value) is not int or value < least:
            raise ValueError(
                f"{name}: got {field} {value!r}, expected null or an integer of at least {least}"
            )
        numbers.append(value)
    limit = Limit(
        str(row.get("operator")),
        str(row.get("family")),
        FORMATS.get(str(row.get("memory_format"))),  # type: ignore[arg-type]
        DTYPES.get(str(row.get("dtype"))),  # type: ignore[arg-type]
        *numbers,
    )
    if limit.key not in KEYS[device]:
        raise ValueError(
            f"{name}: got operator {row.get('operator')!r}, family {row.get('family')!r}, memory format "
            f"{row.get('memory_format')!r} and dtype {row.get('dtype')!r}, for which there is no choice"
        )
    return limit
