"""Measures the seconds of the phases of some work, on a CPU or on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Return the present time of the clock, or on CUDA an event in the current stream. It does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Moment, end: Moment) -> float:
    """Return the seconds between two moments. On CUDA it waits for the second one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Stopwatch:
    """Measures the seconds of named phases. A phase inside another one is not counted twice.

    On CUDA it puts events into the current stream, because work is queued there. So a phase does not wait for the
    device; the other methods do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._open: list[str] = []
        self._since: Moment | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name`."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def throttle(self) -> None:
        """Wait until only the newest span of work is queued, so that a stop takes effect soon."""
        if self._device.type == "cuda" and len(self._spans) > 1:
            self._spans[-2][2].synchronize()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every phase since the start or the last lap, in order of appearance."""
        total: dict[str, float] = {}
        for name, start, end in self._spans:
            total[name] = total.get(name, 0.0) + elapsed(start, end)
        return total

    def lap(self) -> dict[str, float]:
        """Return the seconds of every phase since the last lap, and begin the next one."""
        total = self.seconds()
        self._spans.clear()
        return total

    def _turn(self) -> None:
        """Add the time since the last turn to the innermost open phase."""
        now = moment(self._device)
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._since = now
