"""The command ``trady``: one file a command, imported when it is called.

A command's module has ``add_arguments(parser)``, which also sets the parser's description and an epilog with a
working example, and ``run(args) -> int``, the exit code: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import trady_kernels
from trady_kernels.selection import NothingSelected


@dataclass(frozen=True)
class Command:
    """A command: the module that has it, and what it does in a few words."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "finetune": Command("trady_kernels.cli.finetune", "fine-tune a network inside a memory budget"),
    "plan": Command(
        "trady_kernels.cli.plan", "what each layer's channels cost; what a budget or a total buys"
    ),
    "memory": Command("trady_kernels.cli.memory", "bytes that a training step keeps, dense beside sparse"),
    "rank": Command("trady_kernels.cli.rank", "rank a network's layers, for the schemes that need it"),
    "search": Command(
        "trady_kernels.cli.search", "find the share of each layer that sparse-update trains inside a budget"
    ),
    "study": Command("trady_kernels.cli.study", "experiments over many runs: tables, tests and plots"),
    "bench": Command("trady_kernels.cli.bench", "time the operators beside ATen"),
    "doctor": Command("trady_kernels.cli.doctor", "what is installed, what is missing and how to get it"),
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class BadUsage(Exception):
    """What the user asked for cannot be done; the message is one sentence that says how to mend it."""


class Failed(Exception):
    """The work could not be finished; the message is one sentence."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Report what the library rejects inside the block as bad usage, in its own sentence."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # Python's own sentences begin with a number.
        if isinstance(error, OSError) and error.strerror is not None:
            raise BadUsage(f"{error.filename}: {error.strerror}, expected a file that can be read") from error
        raise BadUsage(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadUsage(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingSelected)  # their reports say so
            return _dispatch(arguments)
    except BadUsage as error:
        return _complain(arguments, error, 2)
    except Failed as error:
        return _complain(arguments, error, 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except SystemExit as exit:  # argparse, after printing its help
        return int(exit.code or 0)
    except BrokenPipeError:  # the reader of our output left
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"trady {trady_kernels.__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadUsage(f"command: got {name!r}, expected one of {', '.join(COMMANDS)}{hint}")
    try:
        module = importlib.import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("trady_kernels"):
            raise
        raise BadUsage(
            f"trady {name} needs the package {error.name}; install it with: pip install 'trady-kernels[cli]'"
        ) from error
    parser = _Parser(
        prog=f"trady {name}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments[1:])))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "Fine-tuning of a few input channels of each layer, inside a memory budget.\n\n"
        f"usage: trady COMMAND [arguments]\n\ncommands:\n{commands}\n\n"
        "trady COMMAND --help shows a command's arguments and an example."
    )


def _complain(arguments: list[str], error: Exception, code: int) -> int:
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    print(f"trady {command}".strip() + f": {' '.join(str(error).split())}", file=sys.stderr)
    return code
