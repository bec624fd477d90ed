"""Figures of the server: its memory, and the text of /metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil

MEMORY_SECONDS = 1.0  # for which a measured memory figure is reused


def memory_use() -> dict[str, float | None]:
    """Return the gigabytes in use: ``ram`` of this process, ``vram`` of the GPU, and ``vram_total`` of the GPU.

    The last two are None if there is no CUDA GPU in use.
    """
    torch = sys.modules.get("torch")  # importing it here would take seconds
    vram = total = None
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():  # else asking opens a context
        free, total = torch.cuda.mem_get_info()
        vram, total = (total - free) / 1e9, total / 1e9
    return {"ram": resident_bytes() / 1e9, "vram": vram, "vram_total": total}


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


class Remembered:
    """A figure that is measured at most once in `seconds`, no matter how many clients ask for it."""

    def __init__(self, measure: Callable[[], dict], seconds: float) -> None:
        self._measure, self._seconds = measure, seconds
        self._value: dict = {}
        self._measured_at = float("-inf")

    def __call__(self) -> dict:
        now = time.monotonic()
        if now - self._measured_at > self._seconds:
            self._value, self._measured_at = self._measure(), now
        return self._value


class Observed(Protocol):
    """The parts of the server that :func:`metrics_text` reads."""

    hub: Any
    connections: int
    sessions: Any
    state: str
    memory: Callable[[], dict[str, float | None]]


def metrics_text(server: Observed) -> str:
    """Return all figures in the text format of Prometheus, each with its type."""
    hub, counters = server.hub, server.hub.counters
    memory = server.memory()
    vram = {"gpu_used_bytes": memory["vram"], "gpu_total_bytes": memory["vram_total"]}
    figures = [
        ("connections", "gauge", server.connections),
        ("viewers", "gauge", hub.viewers),
        ("waiting", "gauge", hub.waiting),
        ("sessions", "gauge", len(server.sessions)),
        ("model_ready", "gauge", int(server.state == "ready")),
        ("streams_total", "counter", counters.streams),
        ("chunks_total", "counter", counters.chunks),
        ("frames_total", "counter", counters.frames),
        ("failures_total", "counter", counters.failures),
        ("resident_bytes", "gauge", round(memory["ram"] * 1e9)),
        *((name, "gauge", round(value * 1e9)) for name, value in vram.items() if value is not None),
    ]
    lines = [f"# TYPE self_forcing_{name} {kind}\nself_forcing_{name} {value}" for name, kind, value in figures]
    seconds = dict(counters.seconds)
    if seconds:
        lines.append("# TYPE self_forcing_stage_seconds_total counter")
    for stage, value in sorted(seconds.items()):
        lines.append(f'self_forcing_stage_seconds_total{{stage="{stage}"}} {value:.3f}')
    return "\n".join(lines) + "\n"
