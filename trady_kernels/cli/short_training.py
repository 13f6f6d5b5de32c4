"""What the commands that learn something from a short training share: its arguments, and the file that they write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from trady_kernels.cli.console import seed_argument
from trady_kernels.models.loading import Sizes


def add_training_arguments(parser: argparse.ArgumentParser, *, data: str, lr: float, lr_words: str) -> None:
    """Declare network, data, file to write, and settings of the training.

    Args:
        parser: of the command.
        data: what the command does with the data, in words.
        lr, lr_words: default of the learning rate, and what it is.
    """

    def add(flag: str, default: object, text: str, type: Callable[[str], object] | None = None) -> None:
        parser.add_argument(
            flag, default=default, type=type or default.__class__, help=f"{text} (default: %(default)s)"
        )

    add("--model", "efficientnet_lite0", "as in trady finetune")
    add("--data", "fashion-mnist", f"as in trady finetune; {data}")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    add("--batch-size", 32, "samples in a step")
    add("--lr", lr, lr_words)
    add("--image-size", 64, "side in pixels")
    add("--max-length", 64, "tokens of a sentence")
    add("--seed", 0, "of the classifier, the order of the samples and whatever is drawn", seed_argument)
    add("--device", "cpu", "cpu or cuda")


def sizes_of(args: argparse.Namespace) -> Sizes:
    """Sizes of the network's input."""
    return Sizes(args.image_size, args.max_length)
