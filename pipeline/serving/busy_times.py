"""Find a thread that hangs: each thread marks when it begins and ends a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BusyTimes:
    """Remembers when each thread began its present piece of work. Several threads may use one object."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """Mark the thread ``name`` as busy while the block runs."""
        self._since[name] = self._clock()
        try:
            yield
        finally:
            del self._since[name]

    def longest(self) -> tuple[str, float]:
        """Return the thread that has been busy for the longest time, and the seconds; ("", 0) if all wait for work."""
        since = dict(self._since)
        if not since:
            return "", 0.0
        name = min(since, key=since.__getitem__)
        return name, self._clock() - since[name]
