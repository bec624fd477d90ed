"""Measures the seconds of the stages of some work, on a CPU or on a CUDA device."""

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


class StageTimer:
    """Seconds by stage. On CUDA they are measured between events in the current stream, because work is queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = moment(self._device)
        yield
        self._spans.append((stage, start, moment(self._device)))

    def throttle(self) -> None:
        """Wait until only the newest span of work is queued, so that a stop takes effect soon."""
        if self._device.type == "cuda" and len(self._spans) > 1:
            self._spans[-2][2].synchronize()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage. Waits for queued work."""
        total: dict[str, float] = {}
        for stage, start, end in self._spans:
            total[stage] = total.get(stage, 0.0) + elapsed(start, end)
        return total
