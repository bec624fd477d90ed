"""Python commands in one folder, each in its own process. The processes share one import of the slow modules.

A command is executed as ``python WORDS`` is: its file or module is ``__main__``, the folder comes first in sys.path,
and every module comes from there. Only the import of the modules in SLOW_IMPORTS has happened before.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from scripts.endurance.kills import SLOW_IMPORTS

LONGEST = 240
"""Seconds after which SIGALRM ends a command."""


class Forked:
    """A process in `folder` that forks once for each command."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._folder = folder
        self._parent = subprocess.Popen(
            [sys.executable, "-c", "from tests.forked import serve; serve()"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, words: list[str], said: Path) -> int:
        """Run ``python WORDS``, write all that it prints to the file `said`, and return its exit code."""
        print(json.dumps([words, str(said)]), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._parent.communicate(timeout=60)


def serve() -> None:
    """Run the commands of stdin, and print the exit code of each. Return when stdin is closed, or as a command."""
    for name in SLOW_IMPORTS:
        import_module(name)
    for line in sys.stdin:
        words, said = json.loads(line)
        if (child := os.fork()) == 0:
            signal.alarm(LONGEST)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            return execute(words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def execute(words: list[str]) -> None:
    """Execute a file with arguments, or ``-m MODULE`` with arguments, as the main program."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
