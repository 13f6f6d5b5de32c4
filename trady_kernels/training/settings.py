"""The settings of a fine-tuning run: everything that its numbers depend on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from trady_kernels.data import kind_of
from trady_kernels.selection import Pool
from trady_kernels.training.ingredients import Spec

#: Schemes that set a run's floor and ceiling.
BASELINES = ("head-only", "full")

#: Peak learning rate of a scheme where none is asked for: three rates each, on a fifth of the training digits, held
#: out (``--validation-share 0.2``; EfficientNet-Lite0, MNIST, 5 epochs, seed 0, 28,000 elements).
#: Samplers (trady): 0.1 95.1%, 0.2 96.0%, 0.4 96.2%, the last two level within their two images; few channels at a
#: time need a high rate. Full: 0.005 96.4%, 0.01 97.6%, 0.02 97.4%; from 0.05 on the network with frozen norms dies.
#: Head only: 0.025 91.4%, 0.05 92.6%, 0.1 92.5%. Bias only has the samplers' rate: 0.05 92.8%, 0.1 93.8%, 0.2 95.4%.
#: Velocity and LoRA: the best of three on held-out samples of three tasks (docs/results.json, the cells of these schemes with
#: held_out; 1,000 images, 2.2%). Velocity: 0.0067 83.8%, 0.02 87.6%, 0.06 86.7%; LoRA: 0.017 87.0%, 0.05 88.6%, 0.15 diverges.
LEARNING_RATES = {"full": 0.01, "head-only": 0.05, "velocity": 0.02, "lora": 0.05}
LEARNING_RATE_OF_SAMPLERS = 0.2
#: The same by the kind of samples: of the schemes that have their own, and of the samplers. For sentences on a fifth of
#: the training tweets, held out (MiniLM, 1,000 tweets of 32 tokens, 3 epochs, seed 0, 5% of the full cost from every
#: layer). Samplers (trady): 0.1 80.8% after the first epoch, where the others had 87.5%; 0.2 90.0%, 0.5 91.4%. Full: 0.02
#: 90.8%, 0.05 91.7%, 0.1 92.0%, the last two level within their two tweets. Head only: 0.2 83.2% after the first epoch,
#: where 0.5 had 85.5%; 0.5 87.0%, 1 87.6%, four tweets apart. Velocity and LoRA have not been tuned for sentences: theirs
#: are the middle ones that trady study results tries.
RATES: dict[str, tuple[dict[str, float], float]] = {
    "images": (LEARNING_RATES, LEARNING_RATE_OF_SAMPLERS),
    "sentences": ({"full": 0.05, "head-only": 0.5, "velocity": 0.1, "lora": 0.2}, 0.5),
}


@dataclass(frozen=True)
class Settings:
    """What to fine-tune, on what, and how.

    Args:
        model: as :func:`trady_kernels.models.loading.load_model` takes it.
        weights: checkpoint file instead of the pretrained weights.
        data: as :func:`trady_kernels.data.load_data` takes it.
        image_size: side of the images in pixels.
        max_length: tokens of a sentence: shorter ones are padded, longer ones cut.
        train_samples: number of training samples, None for all.
        test_samples: number of test samples, None for all.
        validation_share: share of the training samples to test on instead of the test samples.
        test_once: test after the last epoch alone.
        budget: elements of one sample, bytes of a batch (``"256KiB"``) or a share (``"5%"``).
        schemes: names of channel selection schemes, each with any ingredients ("trady+bias"), trained one after the
            other from the same start.
        resampling: when the samplers draw again: "epoch", "2 epochs", "50 steps" or "norm 60%", see
            :class:`trady_kernels.ChannelSampler`.
        pool: layers that take part, in place of each scheme's own choice, as :class:`trady_kernels.ChannelSampler` takes it;
            schemes that have no choice of layers ignore it.
        ranking: file with a layer ranking; None takes the one that ships for the model, if any.
        layer_fractions: file with the layer fractions of sparse-update; None takes those that ship for the model.
        epochs: passes over the training samples.
        warmup_epochs: of them, the first in which the learning rate rises linearly from zero.
        batch_size: samples in a step.
        learning_rate: peak of the cosine schedule; None takes each scheme's own, see :meth:`learning_rate_of`.
        seed: of the classifier's first values, the order of the samples and the choice of channels.
        device: as ``torch.device`` takes it.
        threads: threads of a CPU operator; sums depend on it in their last bits.
    """

    model: str = "efficientnet_lite0"
    weights: str | None = None
    data: str = "mnist"
    image_size: int = 64
    max_length: int = 64
    train_samples: int | None = None
    test_samples: int | None = None
    validation_share: float = 0.0
    test_once: bool = False
    budget: int | str = 28_000
    schemes: tuple[str, ...] = ("trady", *BASELINES)
    resampling: str = "epoch"
    pool: str | None = None
    ranking: str | None = None
    layer_fractions: str | None = None
    epochs: int = 5
    warmup_epochs: float = 0.5
    batch_size: int = 32
    learning_rate: float | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        least_of = {"epochs": 1, "batch_size": 1, "threads": 1, "image_size": 1, "max_length": 1, "seed": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a finite number above 0")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs: got {self.warmup_epochs}, expected 0 to epochs = {self.epochs}")
        if self.pool is not None:
            Pool.parse(self.pool)
        if not self.schemes or len(set(self.schemes)) != len(self.schemes):
            raise ValueError(
                f"schemes: got {', '.join(self.schemes) or 'none'}, expected at least one, none twice"
            )

    def learning_rate_of(self, scheme: str) -> float:
        """Peak learning rate of a scheme: the one asked for, or its own for this kind of samples.

        With momentum m it is 1 - m times that: a gradient moves the weights 1 / (1 - m) times as far in the end.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        rates, rate_of_samplers = RATES[kind_of(self.data)]
        spec = Spec.parse(scheme)
        return rates.get(spec.scheme, rate_of_samplers) * (1 - spec.momentum)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {**dataclasses.asdict(self), "schemes": list(self.schemes)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """The settings that :meth:`to_json` gave.

        Raises:
            ValueError: a setting is missing or unknown.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if differing := sorted(expected ^ content.keys()):
            raise ValueError(
                f"settings: {', '.join(differing)} missing or unknown; another version wrote them"
            )
        return cls(**{**content, "schemes": tuple(content["schemes"])})

    def difference(self, other: Settings) -> str | None:
        """Name of the first setting in which ``other`` differs, or None."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != getattr(other, field.name):
                return field.name
        return None


def plain(value: Any) -> str:
    """A setting's value, as a sentence has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
