"""A lock that allows one writer for each folder. A crash releases it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError
from utils.files import NO_FOLLOW, is_own_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


@contextmanager
def folder_lock(folder: str | Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder. The operating system releases it when the process ends for any reason.

    Args:
        folder: it must exist.
        what: the holder, such as "training". A refused process shows it in its error.

    Raises:
        UserError: one line that names the folder, the process that holds the lock, and the remedy.
    """
    path = Path(folder) / LOCK_FILE
    if os.path.lexists(path) and not is_own_file(path):
        raise UserError(f"{path}: is a link or a folder, but it must be the lock file of this folder; move it away")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another folder") from error
    try:
        if not try_lock(descriptor):
            raise UserError(
                f"{folder} is in use by {_holder(descriptor)}; wait for it to end, or choose another folder"
            )
        holder = {"what": what, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        with suppress(OSError):  # a full disk; the lock still works
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file. Return False if another process holds it. Closing the file releases it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"{holder['what']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
