"""A queue for the frames of a live source, from the connection of a client to the thread that makes its stream."""

from __future__ import annotations

import threading
from collections import deque

MOST_WAITING = 12  # frames; beyond that the oldest are dropped, so that the stream follows the present


class LiveSource:
    """A queue of frames from a client to its stream. One thread pushes frames, another one iterates over them.

    An item is a frame (RGB, row by row), or None if no frame waits.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._lock = threading.Lock()
        self._frames: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._ended = False

    def push(self, pixels: bytes) -> None:
        """Add a frame: RGB, row by row."""
        with self._lock:
            if not self._ended:
                self._frames.append(pixels)

    def end(self) -> None:
        """End the source: no more frames follow."""
        with self._lock:
            self._ended = True

    def __iter__(self) -> LiveSource:
        return self

    def __next__(self) -> bytes | None:
        with self._lock:
            if not self._frames:
                if self._ended:
                    raise StopIteration
                return None
            return self._frames.popleft()
