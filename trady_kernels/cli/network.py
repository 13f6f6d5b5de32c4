"""The arguments by which commands without training take a network, a batch and a selection."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from trady_kernels.batch import Example
from trady_kernels.cli import BadUsage, usage_errors
from trady_kernels.cli.console import seed_argument
from trady_kernels.convert import sparsify
from trady_kernels.convert.network import Lean
from trady_kernels.cost import measure_layers
from trady_kernels.functional.stored import STORED
from trady_kernels.models.front import Front
from trady_kernels.models.loading import LoadedModel, Sizes, classifier_name, load_model
from trady_kernels.ops.layout import FORMATS
from trady_kernels.selection import SCHEMES, ChannelSampler, LayerRanking, Scheme
from trady_kernels.training.ingredients import PRESETS, Spec
from trady_kernels.training.regimes import find_ranking, metric_of, sparsify_options

DEFAULT_BUDGET = "28000"
AUTOCAST = {"off": None, "bfloat16": torch.bfloat16}
LEAN: dict[str, Lean] = {"on": True, "off": False, "8bit": "8bit"}
#: Of the arguments that ingredients may set too.
_DEFAULTS = {"lean": "on", "stored": "exact", "biases": None}


@dataclass(frozen=True)
class Batch:
    """A batch of random input and labels: memory and cost depend on the shapes alone."""

    input: Example
    labels: torch.Tensor  # (N,)
    front: Front

    def __str__(self) -> str:
        return f"{len(self.labels)} {self.front.kind} of {self.front.size}"


def add_network_arguments(parser: argparse.ArgumentParser, *, batch_size: int, image_size: int) -> None:
    """Declare ``--model`` and the size of its batch."""
    parser.add_argument(
        "--model",
        default="efficientnet_lite0",
        metavar="NAME",
        help="efficientnet_lite0, minilm, or a name of timm or torchvision (default: efficientnet_lite0)",
    )
    parser.add_argument(
        "--classes", type=int, default=10, help="outputs of the classifier (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="samples in a step (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, default=image_size, help="side of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=64, help="tokens of a sentence (default: %(default)s)"
    )
    parser.add_argument(
        "--autocast",
        choices=AUTOCAST,
        default="off",
        help="run the steps under autocast (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-format",
        choices=FORMATS,
        default="contiguous",
        help="of the images and weights (default: %(default)s)",
    )


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how channels are selected."""
    parser.add_argument(
        "--budget",
        default=DEFAULT_BUDGET,
        help="elements of one sample (28000), bytes of a batch (256KiB) or a share (5%%) (default: %(default)s)",
    )
    parser.add_argument(
        "--scheme",
        default="trady",
        metavar="NAME",
        help=f"{', '.join([*_without_data(), *PRESETS])}, with ingredients and a budget as in trady finetune: "
        "late+bias+8bit@5%% (default: %(default)s)",
    )
    parser.add_argument(
        "--pool",
        metavar="LAYERS",
        help="layers to draw from, in place of the scheme's own choice: 97%%, '20 layers', 'alpha 20%%', each with ' by lara' or "
        "another metric, 'only NAME, NAME', 'without NAME'",
    )
    parser.add_argument(
        "--ranking", metavar="FILE", help="layer ranking instead of the one that ships for the model"
    )
    parser.add_argument(
        "--layer-fractions",
        metavar="FILE",
        help="of sparse-update, instead of those that ship for the model",
    )
    parser.add_argument(
        "--lean",
        choices=LEAN,
        default=_DEFAULTS["lean"],
        help="what stands between the layers keeps bits (on), its tensors (off), or bits and everything else in one "
        "byte an element, which is not exact (8bit) (default: %(default)s)",
    )
    parser.add_argument(
        "--stored",
        choices=STORED,
        default=_DEFAULTS["stored"],
        help="selected channels are kept as they are, or in one byte an element (8bit), which is not exact, so that a budget "
        "in bytes holds more of them (default: %(default)s)",
    )
    parser.add_argument(
        "--biases",
        default=_DEFAULTS["biases"],
        metavar="N|all",
        help="train the biases of the last N sparse layers too, and of the norms behind them, or all of them",
    )
    parser.add_argument(
        "--seed", type=seed_argument, default=0, help="of the channels drawn (default: %(default)s)"
    )


@dataclass(frozen=True)
class Selection:
    """The scheme that the arguments name, for their network, what it is combined with, and its budget."""

    spec: Spec
    scheme: Scheme
    budget: str


def make_selection(args: argparse.Namespace) -> Selection:
    """The scheme and the ingredients that the arguments name.

    Raises:
        BadUsage: there is none of that name, or one that is for a training alone, or it needs data, or a file that
            cannot be read; or another argument sets what an ingredient sets.
    """
    known = _without_data()
    with usage_errors():
        spec = Spec.parse(args.scheme)
        if spec.scheme not in known:
            draws = "draws by the gradients of a data set that this command does not read"
            why = draws if spec.scheme in SCHEMES else "trains something else than channels"
            raise ValueError(
                f"scheme: got {args.scheme!r}, which {why}, expected one of {', '.join([*known, *PRESETS])}"
            )
        if part := next((part for part in spec.ingredients if part.dense or part.at_once), None):
            raise ValueError(
                f"scheme: got {args.scheme!r}, expected it without {part.name}, which is for trady finetune"
            )
        for name, default in _DEFAULTS.items():
            if name in spec.sparsify and (given := getattr(args, name)) != default:
                raise ValueError(
                    f"{name}: got {given!r} beside {args.scheme}, which sets it, expected one of the two"
                )
        scheme = SCHEMES[spec.scheme].for_network(args.model, args.layer_fractions)
    return Selection(spec, scheme, args.budget if spec.budget is None else spec.budget)


def _without_data() -> list[str]:
    """The schemes that draw without gradients of real data."""
    return [name for name, scheme in SCHEMES.items() if not scheme.needs_gradients]


def make_network(args: argparse.Namespace) -> LoadedModel:
    """The network that the arguments name, in training mode, with random weights.

    Raises:
        BadUsage: no such network, or a count below 1.
    """
    for name in ("classes", "batch_size", "image_size", "max_length"):
        if getattr(args, name) < 1:
            raise BadUsage(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    with usage_errors():
        sizes = Sizes(args.image_size, args.max_length)
        loaded = load_model(args.model, args.classes, pretrained=False, sizes=sizes)
    loaded.model.train().to(memory_format=FORMATS[args.memory_format])  # type: ignore[call-overload]
    return loaded


def make_batch(loaded: LoadedModel, args: argparse.Namespace, batch_size: int | None = None) -> Batch:
    """A batch for a network, of the size that the arguments give, or of another."""
    generator = torch.Generator().manual_seed(0)
    count = args.batch_size if batch_size is None else batch_size
    input = loaded.front.random_input(count, generator)
    labels = torch.randint(args.classes, (count,), generator=generator)
    if isinstance(input, torch.Tensor):
        input = input.contiguous(memory_format=FORMATS[args.memory_format])
    return Batch(input, labels, loaded.front)


def in_autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """The autocast mode that the arguments ask for."""
    dtype = AUTOCAST[args.autocast]
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def make_sparse(
    model: nn.Module, batch: Batch, args: argparse.Namespace, selection: Selection
) -> LayerRanking | None:
    """Convert ``model`` in place as the arguments and the selection say; returns its layers' ranking.

    Raises:
        BadUsage: a bad ranking or number of biases, or a network that the batch does not fit.
    """
    given = {} if args.biases is None else {"biases": _biases(args.biases)}
    with usage_errors():
        ranking = find_ranking(args.ranking, args.model, metric_of(type(selection.scheme), args.pool))
        head = classifier_name(model, args.classes)
        layers = {name: cost for name, cost in measure_layers(model, batch.input).items() if name != head}
        own = sparsify_options(selection.spec, selection.scheme, layers)
        options = {"lean": LEAN[args.lean], "stored": args.stored, **own, **given}
        sparsify(model, batch.input, head=head or "auto", **options)
    return ranking


def _biases(text: str) -> bool | int:
    if text == "all":
        return True
    if not text.isdecimal():
        raise BadUsage(f"--biases: got {text!r}, expected all or a number of last layers, from 0")
    return int(text)


def make_sampler(model: nn.Module, batch: Batch, args: argparse.Namespace) -> ChannelSampler:
    """Convert ``model`` in place and select channels in it as the arguments say.

    Raises:
        BadUsage: a bad budget, scheme or ranking, or a network that the batch does not fit.
    """
    selection = make_selection(args)
    ranking = make_sparse(model, batch, args, selection)
    with usage_errors(), in_autocast(args):
        return ChannelSampler(
            model,
            batch.input,
            budget=selection.budget,
            scheme=selection.scheme,
            ranking=ranking,
            pool=args.pool,
            seed=args.seed,
        )
