"""``trady rank``: rank a network's layers by a short fine-tuning of all of them, once for the network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table

from trady_kernels.atomic_write import write_json
from trady_kernels.cli import usage_errors
from trady_kernels.cli.console import check_writable, make_console
from trady_kernels.data import load_data
from trady_kernels.models.loading import Sizes
from trady_kernels.provenance import describe
from trady_kernels.selection import LayerRanking
from trady_kernels.training.ranking import rank_model
from trady_kernels.training.regimes import find_ranking

_EPILOG = """\
examples:
  trady rank --model efficientnet_lite0 --data fashion-mnist --steps 300 --output lite0.json
  trady rank --data mnist --budget 10% --output lite0.json
  trady finetune --model efficientnet_lite0 --data mnist --ranking lite0.json
  trady rank --model minilm --data movie-reviews --lr 0.05 --output minilm.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Rank a network's layers by gradient for what training them costs, over a short fine-tuning of all of them."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model", default="efficientnet_lite0", help="as in trady finetune (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        default="fashion-mnist",
        help="as in trady finetune; any task will do (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--metric", default="rgn", help="rgn (TraDy) or lara (MeDyate) (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        help="rank inside a budget, as in trady finetune: each step trains one block of channels that fits it, so there "
        "have to be steps enough for all blocks (default: whole gradients)",
    )
    parser.add_argument("--steps", type=int, default=300, help="of SGD (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=64, help="tokens of a sentence (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Rank, show the ranks, write the file."""
    console = make_console()
    check_writable("output", args.output)
    provenance = describe(torch.device(args.device))
    with usage_errors(), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("ranking", total=args.steps)
        ranking = rank_model(
            args.model,
            load_data(args.data, image_size=args.image_size),
            metric=args.metric,
            budget=int(args.budget) if args.budget and args.budget.isdecimal() else args.budget,
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.lr,
            seed=args.seed,
            device=args.device,
            sizes=Sizes(args.image_size, args.max_length),
            on_step=lambda: progress.advance(task),
        )
    console.print(_table(ranking))
    ranking.save(args.output)
    content = json.loads(args.output.read_text())
    write_json(args.output, content | {"provenance": provenance})
    shipped = find_ranking(None, args.model, args.metric)
    if shipped is not None and set(shipped) == set(ranking):
        console.print(f"Spearman's correlation with the ranking that ships: {ranking.agreement(shipped):.3f}")
    console.print(f"written to {args.output}; use it with: trady finetune --ranking {args.output}")
    return 0


def _table(ranking: LayerRanking) -> Table:
    pool = set(ranking.top())
    sum_of_scores, reached = sum(ranking.values()), 0.0
    table = Table(
        title=f"{len(pool)} of {len(ranking)} layers hold 97% of the cumulative score ({ranking.metric})"
    )
    for heading in ("rank", "layer", "score", "cumulative", "pool"):
        table.add_column(heading, justify="left" if heading in ("layer", "pool") else "right")
    for rank, (name, score) in enumerate(ranking.items(), start=1):
        reached += score
        table.add_row(
            str(rank), name, f"{score:.4g}", f"{reached / sum_of_scores:.1%}", "yes" if name in pool else ""
        )
    return table
