"""The names of all figures that benchmark.py and doctor.py print, and the goals of some. Both scripts take them here.

A name ends with its unit, unless it is a rate or a ratio. Times, memory and ratios: lower is better. Rates (frames/s)
and "batched / in turn": higher is better.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PATHS = ("compiled", "triton")
"""How a layer is computed: compiled, and compiled with optimize.kernels=triton."""
FIGURES: dict[str, tuple[str, ...]] = {
    "inference": (
        *("text", "step N", "context", "decode of a first latent", "decode", "host copy", "steps of chunk N"),
        *("first frame s", "denoise and context s", "total s", "warm-up s"),
        *("frames/s", "frames/s without decode", "peak memory GiB", "estimated memory GiB"),
    ),
    "session": ("frames/s", "first frame", "first chunk"),
    "viewers": ("N viewers in turn frames/s", "N viewers batched frames/s", "N viewers batched / in turn"),
    "endless": ("chunk N ms", "late / early"),
    "floor": ("rollout s", "bare products s", "rollout / bare products"),
    "peer": ("ours s", "diffusers s", "ours / diffusers"),
    "codec": ("decode s", "decoded frames/s", "encode s", "peak memory GiB", "warm-up s"),
    "codec_peer": ("ours s", "diffusers s", "ours / diffusers"),
    "graph": tuple(
        f"{path} {figure}" for path in PATHS for figure in ("kernels a layer", "passes a layer", "MB a layer")
    ),
    "load": ("inference.py --help s", "imports s", "imports, parts and a prompt s"),
    "train": ("seconds", "seconds_PHASE", "samples_per_second", "peak memory GiB"),
}
"""Measurement -> its figures. N is a number and PHASE a word. A figure that is a distribution is printed as ``p50 ms``
and ``p90 ms``, or ``p50`` and ``best``."""
SPREAD = r"( (p50|p90|best)( ms)?)?"


class Goal(NamedTuple):
    """The value that a figure should reach. It is for an H100 or H200, unless the row is a ratio of two programs."""

    row: str
    """The title of its row in doctor.py."""
    figure: str
    value: float
    higher: bool = False
    """True if higher is better."""

    def __str__(self) -> str:
        return f"{'at least' if self.higher else 'at most'} {self.value:g}"


FULL_ROW, COMPILED_ROW, FP8_ROW = "1.3B at 480x832, Wan VAE", "the same, compiled", "the same, compiled, fp8"
GOALS = (
    Goal(COMPILED_ROW, "steps of chunk 6 p50 ms", 250),
    Goal(FP8_ROW, "steps of chunk 6 p50 ms", 215),
    Goal(COMPILED_ROW, "context p50 ms", 50),
    Goal(COMPILED_ROW, "frames/s without decode", 50, higher=True),
    Goal(COMPILED_ROW, "warm-up s", 30),
    Goal(FULL_ROW, "peak memory GiB", 12),
    Goal("session, Wan VAE, compiled", "frames/s p50", 29, higher=True),
    Goal("session, Wan VAE, compiled", "first frame p50 ms", 300),
    Goal("session, TAEHV, compiled", "frames/s p50", 38, higher=True),
    Goal("session, TAEHV, compiled", "first frame p50 ms", 200),
    Goal("Wan VAE, 81 frames", "decode s", 0.7),
    Goal("Wan VAE, 81 frames", "encode s", 0.5),
    Goal("rollout over bare products", "rollout / bare products", 1.12),
    Goal("one pass, beside diffusers", "ours / diffusers", 0.95),
    Goal("Wan VAE, beside diffusers", "ours / diffusers", 0.8),
)


def is_known(measurement: str, figure: str) -> bool:
    """Return whether a measurement may print a figure of this name."""
    patterns = (re.escape(name).replace("N", r"\d+").replace("PHASE", r"\w+") for name in FIGURES[measurement])
    return any(re.fullmatch(pattern + SPREAD, figure) for pattern in patterns)


def goals_of(row: str) -> dict[str, Goal]:
    """Return the goals of a row of doctor.py, by figure."""
    return {goal.figure: goal for goal in GOALS if goal.row == row}
