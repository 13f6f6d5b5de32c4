"""``trady finetune``: fine-tune a network inside a memory budget and report what it took."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trady_kernels.atomic_write import write_json
from trady_kernels.cli import INTERRUPTED, BadUsage, Failed, usage_errors
from trady_kernels.cli.console import (
    TrainingProgress,
    budget_argument,
    check_writable,
    in_bytes,
    make_console,
    seed_argument,
)
from trady_kernels.cost import Budget
from trady_kernels.data import DATA_SETS
from trady_kernels.training.ingredients import INGREDIENTS, Spec, scheme_names
from trady_kernels.training.loop import Diverged
from trady_kernels.training.plot import plot_accuracy
from trady_kernels.training.results import SchemeResult
from trady_kernels.training.run import Run, resume_run, start_run
from trady_kernels.training.settings import BASELINES, Settings

_DESCRIPTION = """\
Fine-tune a pretrained network on images or sentences while only the input channels that fit a budget train, and set
accuracy, bytes and time beside those of training the head alone and of training everything.

Without arguments: EfficientNet-Lite0 with its ImageNet weights on 5,000 MNIST digits, at 28,000 elements."""

_EPILOG = """\
examples:
  trady finetune --model efficientnet_lite0 --data mnist --budget 28000 --output runs/digits
  trady finetune --data fashion-mnist --train-samples 4000 --budget 256KiB --scheme trady+bias,d-full-random
  trady finetune --model timm:mobilenetv2_100 --data path/to/class-folders --budget 5% --image-size 128
  trady finetune --model minilm --data tweets --scheme trady --budget 5% --train-samples 1000 --epochs 3
  trady finetune --resume runs/digits

The run folder gets results.json (settings, versions, every epoch), accuracy.png, and checkpoint-SCHEME.pt after
every epoch; torch.load(file)["model"] is a state dict that the plain network loads with strict=True."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; those not given leave no trace, so that a resume can tell."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    defaults = Settings()

    def add(flag: str, text: str, **options: Any) -> None:
        default = getattr(defaults, options.get("dest", flag[2:].replace("-", "_")))
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(
            flag, default=argparse.SUPPRESS, help=(text + shown).replace("%", "%%"), **options
        )

    add("--model", "efficientnet_lite0, minilm, or a name of timm or torchvision", metavar="NAME")
    add("--weights", "checkpoint to start from instead of the pretrained weights", metavar="FILE")
    add(
        "--data",
        f"{', '.join(DATA_SETS)}, a folder of class folders of images, or of IDX files",
        metavar="NAME|FOLDER",
    )
    add(
        "--budget",
        "elements of one sample (28000), bytes of a batch (256KiB) or a share (5%)",
        type=budget_argument,
    )
    parser.add_argument(
        "--scheme",
        default=argparse.SUPPRESS,
        metavar="NAME[+INGREDIENT][,NAME]",
        help=f"how channels are chosen: {', '.join(scheme_names())} (default: {defaults.schemes[0]}); a name may be followed "
        "by ingredients: " + "; ".join(f"+{name}: {known.note}" for name, known in INGREDIENTS.items()),
    )
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"leave away the rows {' and '.join(BASELINES)}",
    )
    add(
        "--resampling",
        "when channels are drawn again: epoch, '2 epochs', '50 steps', or 'norm 60%', once their gradient has fallen so far",
    )
    add(
        "--pool",
        "layers to draw from, in place of each scheme's own choice: 97%, '20 layers', 'alpha 20%', each with ' by lara' or "
        "another metric, 'only NAME, NAME', 'without NAME'",
        metavar="LAYERS",
    )
    add("--ranking", "layer ranking to use instead of the one that ships for the model", metavar="FILE")
    add(
        "--layer-fractions",
        "layer fractions of sparse-update to use instead of those that ship for the model",
        metavar="FILE",
    )
    add("--epochs", "passes over the training samples", type=int)
    add("--warmup-epochs", "of them, with a rising learning rate", type=float)
    add("--batch-size", "samples in a step", type=int)
    add("--lr", "peak learning rate of SGD (default: each scheme's own)", type=float, dest="learning_rate")
    add("--image-size", "side of the images in pixels", type=int)
    add("--max-length", "tokens of a sentence: shorter ones are padded, longer ones cut", type=int)
    add("--train-samples", "train on that many samples only", type=int)
    add("--test-samples", "test on that many samples only", type=int)
    add(
        "--validation-share", "test on that share of the training samples instead of the test set", type=float
    )
    add("--test-once", "test after the last epoch alone", action="store_true")
    add("--seed", "of the classifier, the order of the samples and the channels", type=seed_argument)
    add("--device", "cpu or cuda")
    add("--threads", "threads of a CPU operator", type=int)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="run folder (default: runs/MODEL-DATA-TIME)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on with the interrupted run in this folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results.json's content here too")


def run(args: argparse.Namespace) -> int:
    """Train, show the table, write the run folder."""
    console = make_console()
    asked = _asked_settings(args)
    with usage_errors():
        if args.json is not None:
            check_writable("json", args.json)
        if args.resume is not None:
            if args.output is not None and args.output.resolve() != args.resume.resolve():
                raise ValueError(
                    f"output: got {args.output} with --resume {args.resume}, which goes on in its own folder; "
                    "leave --output away"
                )
            job = resume_run(args.resume, asked)
        else:
            settings = Settings(**asked)
            job = start_run(settings, args.output or _default_output(settings))
    _introduce(console, job)
    try:
        with TrainingProgress(console, len(job.settings.schemes), job.settings.epochs) as progress:
            results = job.train(progress)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: trady finetune --resume {shlex.quote(str(job.folder.path))}")
        return INTERRUPTED
    except Diverged as error:
        raise Failed(str(error)) from error
    except ValueError as error:  # a budget or ranking that the network itself shows to be wrong
        raise BadUsage(str(error)) from error
    except OSError as error:
        raise Failed(
            f"{error}; the last epoch's checkpoint is whole, go on with: trady finetune --resume {job.folder.path}"
        ) from error
    console.print(_table(job, results))
    for note, schemes in _notes(results).items():
        console.print(f"{', '.join(schemes)}: {note}")
    _finish(console, job, results, args.json)
    return 0


def _asked_settings(args: argparse.Namespace) -> dict[str, Any]:
    given = vars(args)
    asked = {field.name: given[field.name] for field in dataclasses.fields(Settings) if field.name in given}
    if "scheme" in given or "no_baselines" in given:
        names = [name.strip() for name in given.get("scheme", Settings().schemes[0]).split(",")]
        if "no_baselines" not in given:
            names += [name for name in BASELINES if name not in names]
        asked["schemes"] = tuple(names)
    return asked


def _default_output(settings: Settings) -> Path:
    data = Path(settings.data).name or "data"
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs", f"{settings.model.replace(':', '-')}-{data}-{now}")


def _introduce(console: Console, job: Run) -> None:
    settings, data = job.settings, job.data
    console.print(
        f"{settings.model} on {data.name}: {len(data.train):,} training and {len(data.test):,} test {data.kind} of "
        f"{job.front.size} in {len(data.classes)} classes, budget "
        f"{Budget.parse(settings.budget)}, {settings.epochs} epochs, {settings.device}, into {job.folder.path}"
    )


def _table(job: Run, results: list[SchemeResult]) -> Table:
    settings = job.settings
    table = Table(
        title=f"{settings.model} on {job.data.name}, seed {settings.seed}, {settings.epochs} epochs"
    )
    table.add_column("scheme", no_wrap=True)
    top1 = "top-1, held out" if settings.validation_share else "top-1"
    for heading in (
        top1, "budget", "cost (elements)", "of full", "saved for backward", "of dense", "gradients, optimiser",
        "gradient FLOPs", "ms a step",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for result in results:
        spec = Spec.parse(result.scheme)
        budget = Budget.parse(settings.budget if spec.budget is None else spec.budget)
        table.add_row(
            result.scheme,
            f"{result.top1:.1%}",
            str(budget) if spec.budgeted else "-",
            f"{result.cost:,}",
            f"{result.cost / result.full_cost:.1%}",
            in_bytes(result.saved_bytes),
            f"{result.saved_bytes / result.dense_saved_bytes:.1%}",
            in_bytes(result.gradient_bytes + result.optimizer_bytes),
            f"{result.gradient_share:.1%}",
            f"{result.step_ms:.0f}",
        )
    return table


def _notes(results: list[SchemeResult]) -> dict[str, list[str]]:
    notes: dict[str, list[str]] = {}
    for result in results:
        for note in [f"weights {result.weights}", f"learning rate {result.learning_rate:g}", *result.notes]:
            notes.setdefault(note, []).append(result.scheme)
    return notes


def _finish(console: Console, job: Run, results: list[SchemeResult], json_file: Path | None) -> None:
    title = f"{job.settings.model} on {job.data.name}, budget {Budget.parse(job.settings.budget)}"
    try:
        plot_accuracy(job.folder.plot, results, title)
    except ModuleNotFoundError as error:
        console.print(str(error))
    if json_file is not None:
        write_json(json_file, job.to_json())
    console.print(f"results, checkpoints and plot are in {job.folder.path}")
