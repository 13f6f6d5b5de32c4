"""``trady rank``: rank a network's layers by a short fine-tuning of all of them, once for the network."""

from __future__ import annotations

import argparse

import torch
from rich.progress import Progress
from rich.table import Table

from trady_kernels.cli import usage_errors
from trady_kernels.cli.console import budget_argument, check_writable, make_console
from trady_kernels.cli.short_training import add_training_arguments, sizes_of
from trady_kernels.data import load_data
from trady_kernels.provenance import describe
from trady_kernels.selection import LayerRanking
from trady_kernels.training.ranking import rank_model
from trady_kernels.training.regimes import find_ranking
from trady_kernels.training.run import check_device

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
    add_training_arguments(parser, data="any task will do", lr=0.01, lr_words="learning rate")
    parser.add_argument(
        "--metric", default="rgn", help="rgn (TraDy), lara (MeDyate) or norm (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=budget_argument,
        help="rank inside a budget, as in trady finetune: each step trains one block of channels that fits it, so there "
        "have to be steps enough for all blocks (default: whole gradients)",
    )
    parser.add_argument("--steps", type=int, default=300, help="of SGD (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Rank, show the ranks, write the file."""
    console = make_console()
    check_writable("output", args.output)
    with usage_errors():
        check_device(args.device)
    provenance = describe(torch.device(args.device))
    with usage_errors(), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("ranking", total=args.steps)
        ranking = rank_model(
            args.model,
            load_data(args.data, image_size=args.image_size),
            metric=args.metric,
            budget=args.budget,
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.lr,
            seed=args.seed,
            device=args.device,
            sizes=sizes_of(args),
            on_step=lambda: progress.advance(task),
        )
    console.print(_table(ranking))
    ranking.save(args.output, provenance=provenance)
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
