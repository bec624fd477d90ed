"""Denoising steps: one list of timesteps for all chunks, or a list for each chunk.

Later chunks continue a video that is already there, so they need fewer steps (rCM, arXiv 2510.08431: [4, 2], [4, 1]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import pairwise
from typing import Any

Steps = Sequence[float] | Sequence[Sequence[float]]
"""Timesteps for all chunks, or one list for each chunk. The last list is used for all later chunks too."""


class GradientSteps(Enum):
    """The denoising passes of a chunk that carry gradient."""

    last = "last"
    """Only the pass at which the chunk stops."""
    all = "all"
    """Every pass, so gradient flows through the noised predictions back to the first one."""


def steps_of_chunk(steps: Steps, index: int) -> list[float]:
    """Return the timesteps of the generated chunk ``index``, descending."""
    if not isinstance(steps[0], Sequence):
        return list(steps)
    return list(steps[min(index, len(steps) - 1)])


def list_for_chunks(steps: Steps) -> list[list[float]]:
    """Return the steps as a new list with one list for each chunk. The last list is used for all later chunks too."""
    return [list(each) for each in _lists(steps)]


def most_steps(steps: Steps) -> int:
    """Return the largest number of steps of a chunk."""
    return max(len(each) for each in _lists(steps))


def even_steps(count: int) -> list[float]:
    """Return ``count`` evenly spaced timesteps from 1000 down."""
    return [float(round(1000 * (count - index) / count)) for index in range(count)]


def map_steps(steps: Steps, change: Callable[[Sequence[float]], list[float]]) -> Steps:
    """Apply ``change`` to every list of timesteps."""
    return [change(each) for each in steps] if isinstance(steps[0], Sequence) else change(steps)


def checked_steps(name: str, steps: Any) -> list:
    """Return the steps as floats.

    Raises:
        ValueError: they are not a list of numbers or of such lists, or a list does not descend within (0, 1000].
    """
    for each in _lists(steps):
        numbers = all(isinstance(step, int | float) and not isinstance(step, bool) for step in each)
        inside = numbers and all(0 < step <= 1000 for step in each)  # false for NaN
        if not each or not inside or any(a <= b for a, b in pairwise(each)):
            raise ValueError(
                f"{name}={steps} must descend within (0, 1000], such as [1000, 750, 500, 250], or be a list for each "
                "chunk, such as [[1000, 750, 500, 250], [1000, 500]]"
            )
    return list(map_steps(steps, lambda each: [float(step) for step in each]))


def _lists(steps: Any) -> list[Sequence[float]]:
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        return [[]]
    if not any(isinstance(each, Sequence) for each in steps):
        return [steps]
    return [each if isinstance(each, Sequence) and not isinstance(each, str) else [] for each in steps]
