"""The common part of every command line program."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping

from utils.errors import UserError

USER_ERROR = 2
SHOWN_PATH = 200
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended, as in a shell."""


def exit_code(command: Callable[[], None]) -> int:
    """Run a command and return the exit code. Before, leave the distributed job, if the command has joined one.

    Returns:
        0 for success. 2, with one line on stderr, for a mistake of the user or a file that the system refuses. 130,
        with one line, for Ctrl-C.
    """
    try:
        try:
            command()
        finally:
            _leave_job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.filename is None:  # no user can correct this: it is an error in the program
            raise
        path = str(error.filename)
        shown = path if len(path) <= SHOWN_PATH else f"{path[: SHOWN_PATH - 3]}..."
        print(f"error: {shown}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    return 0


def count(text: str) -> int:
    """Read a whole number of at least 1; a `type` of argparse, whose error names the option and the value."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def positive(text: str) -> float:
    """Read a finite number above 0, as :func:`count` reads whole ones."""
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def finite(text: str) -> float:
    """Read a number that is neither NaN nor infinite, as :func:`count` reads whole ones."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def merged_overrides(args: argparse.Namespace, keys: Mapping[str, str]) -> list[str]:
    """Return the overrides of a command line: those of its options, then those that are written as key=value.

    Args:
        args: the parsed command line, with its `overrides`.
        keys: option -> the key of the configuration that it sets.

    Raises:
        UserError: an option has no value, or it and an override give one key different values.
    """
    written = {text.partition("=")[0]: text.partition("=")[2] for text in args.overrides}
    given = {name: str(getattr(args, name)) for name in keys if getattr(args, name) is not None}
    for name, value in given.items():
        if not value.strip():
            raise UserError(f"--{name} is empty; give a value or leave the option out")
        other = written.get(keys[name], value)
        if other != value:
            raise UserError(f"--{name} {value} and {keys[name]}={other} give one key two values; leave one of them out")
    return [*(f"{keys[name]}={value}" for name, value in given.items()), *args.overrides]


def _leave_job() -> None:
    """Leave the process group. Only if the command has already imported the module, which takes seconds."""
    distributed = sys.modules.get("utils.distributed")
    if distributed is not None:
        distributed.shutdown_distributed()
