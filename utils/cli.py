"""What every command line shares."""

from __future__ import annotations

import sys
from collections.abc import Callable

from utils.errors import UserError


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0 when it ends, 2 and one line on stderr for a mistake of the user's."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
