"""A log that visitors cannot fill: repeated lines are only counted, and a client that leaves causes no traceback."""

from __future__ import annotations

import logging
import threading
import time

from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.utils import ClientDisconnected

FORMAT = "%(asctime)s %(levelname)s %(message)s"
WINDOW_SECONDS = 60.0
LINES_A_WINDOW = 60  # different lines that are written in a window; further ones are only counted
GONE = (  # errors that a client causes by leaving
    WebSocketDisconnect,
    ClientDisconnect,
    TimeoutError,
    ConnectionError,
    ClientDisconnected,
)


class Bounded(logging.Filter):
    """Writes each line once a minute and counts its repetitions.

    Lines with the same format are the same line, whatever address or name they hold. The count is written with the
    first line after the minute. Errors keep their traceback unless a client caused them by leaving.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._since = 0.0
        self._counts: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], GONE):
            record.exc_info = record.exc_text = None
        key = record.name, str(record.msg)
        with self._lock:
            missed = self._missed(time.monotonic())
            shown = self._counts.get(key, 0)
            full = key not in self._counts and len(self._counts) >= LINES_A_WINDOW
            if full:
                key = "", "other lines"
                shown = self._counts.get(key, 0)
            self._counts[key] = shown + 1
        if missed and not shown:
            record.msg, record.args = f"{record.getMessage()} {missed}", ()
        return not shown and not full

    def _missed(self, now: float) -> str:
        """Begin a new window if the old one is over. Return a text with the number of lines that were not written."""
        if now - self._since < WINDOW_SECONDS:
            return ""
        repeated = sum(count - 1 for (name, _), count in self._counts.items() if name) + self._counts.get(
            ("", "other lines"), 0
        )
        self._since, self._counts = now, {}
        return f"[{repeated} lines like the earlier ones were not written]" if repeated else ""


def configure_logging() -> None:
    """Log to stderr through the filter :class:`Bounded`, also the lines of uvicorn and asyncio."""
    logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, Bounded) for each in handler.filters):
            handler.addFilter(Bounded())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)
