"""Seconds of the stages of some work, on a CPU or on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Now: by the clock, or on CUDA, where work is only queued, by the current stream. Nothing is waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Moment, end: Moment) -> float:
    """Seconds between two moments; on CUDA it waits until the second has come."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class StageTimer:
    """Seconds by stage. On CUDA, where work is only queued, they are measured between events in the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = moment(self._device)
        yield
        self._spans.append((stage, start, moment(self._device)))

    def throttle(self) -> None:
        """Wait until only the newest span of work is still queued. A stop then takes effect soon."""
        if self._device.type == "cuda" and len(self._spans) > 1:
            self._spans[-2][2].synchronize()

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage. Waits for the work that is queued."""
        total: dict[str, float] = {}
        for stage, start, end in self._spans:
            total[stage] = total.get(stage, 0.0) + elapsed(start, end)
        return total
