"""Helpers of browser tests besides the fixtures of conftest.py: find Chromium, and run servers in new processes."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.endurance.kills import start_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
PATIENCE = 90.0  # seconds for a server to come up on a busy machine


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def leaves(url: str, address: str) -> bool:
    """Return whether a request goes to another address than the server."""
    return not url.startswith((address, address.replace("http", "ws", 1), "data:", "blob:"))


@contextmanager
def running(*command: str | Path) -> Iterator[str]:
    """Run a Python program that serves. Yield the address that it prints, as soon as it answers there."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        (process,) = start_ranks(_serve, (list(map(str, command)), log), 1)
        try:
            wait_until(lambda: (log.exists() and ADDRESS.search(log.read_text())) or not process.is_alive())
            match = ADDRESS.search(said := log.read_text())
            assert match, said
            wait_until(lambda: urllib.request.urlopen(f"{match[0]}/healthz", timeout=5).status == 200)
            yield match[0]
        finally:
            process.terminate()
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"{command[0]} has not ended {PATIENCE} s after SIGTERM")


def _serve(command: list[str], log: Path) -> None:
    """Be the process of a program, with its output in a file."""
    os.chdir(REPOSITORY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds. An OSError counts as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
