"""What every command line shares."""

from __future__ import annotations

import sys
from collections.abc import Callable

from utils.errors import UserError

USER_ERROR = 2
SHOWN_PATH = 200
INTERRUPTED = 130
"""What a shell gives for a program that Ctrl-C has ended."""


def exit_code(command: Callable[[], None]) -> int:
    """Run a command. Every program ends here, and leaves the job it has joined, if any, in order.

    Returns:
        0 at its end; 2 and one line on stderr for a mistake of the user's or a file that the system refuses; 130 and
        one line for Ctrl-C.
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
        if error.filename is None:  # nothing that a user can mend: a fault of the program
            raise
        path = str(error.filename)
        shown = path if len(path) <= SHOWN_PATH else f"{path[: SHOWN_PATH - 3]}..."
        print(f"error: {shown}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    return 0


def _leave_job() -> None:
    """Leave the process group, if the command has loaded what could join one: loading it takes seconds."""
    distributed = sys.modules.get("utils.distributed")
    if distributed is not None:
        distributed.shutdown_distributed()
