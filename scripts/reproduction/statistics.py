"""Means with 95 % intervals over prompts and seeds.

Legend: T trainings (seeds), P prompts, R resamples, N samples of a prompt, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.reproduction.metrics import frechet_distance

RESAMPLES, FRECHET_RESAMPLES = 1000, 60
BOUNDS = (0.025, 0.975)


class Interval(NamedTuple):
    """A value and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 10 else 1
        half = max(self.high - self.mean, self.mean - self.low)
        return f"{self.mean:.{digits}f} ± {half:.{digits}f}"


def mean_interval(values: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of values [T P] and its interval. Trainings and prompts are resampled independently."""
    table = torch.tensor(values, dtype=torch.float64)
    trainings, prompts = _resampled(table.shape[0], RESAMPLES), _resampled(table.shape[1], RESAMPLES, seed=1)
    means = table[trainings[:, :, None], prompts[:, None, :]].mean((1, 2))
    low, high = torch.quantile(means, torch.tensor(BOUNDS, dtype=torch.float64)).tolist()
    return Interval(table.mean().item(), low, high)


def difference_interval(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of ``ours - theirs``, values [T P] each, and its interval.

    Both have the same prompts, and trainings with the same seeds. If one has fewer trainings, only its seeds count.
    """
    pairs = zip(ours, theirs, strict=False)
    return mean_interval([[one - other for one, other in zip(*pair, strict=True)] for pair in pairs])


def frechet_interval(real: Tensor, made: Sequence[Tensor]) -> Interval:
    """Return the Frechet distance of features made [P N D] by each training from real ones, and its interval.

    A mean over the trainings. Prompts are resampled, the same ones on both sides.
    """
    whole = sum(frechet_distance(real.flatten(0, 1), part.flatten(0, 1)) for part in made) / len(made)
    distances = []
    for prompts in _resampled(len(real), FRECHET_RESAMPLES):
        values = [frechet_distance(real[prompts].flatten(0, 1), part[prompts].flatten(0, 1)) for part in made]
        distances.append(sum(values) / len(values))
    # Repeated prompts make every resample a little too far away: the spread counts, not the place.
    spread = torch.tensor(distances, dtype=torch.float64)
    low, high = (torch.quantile(spread, torch.tensor(BOUNDS, dtype=torch.float64)) - spread.mean()).tolist()
    return Interval(whole, max(0.0, whole + low), whole + high)


def _resampled(count: int, resamples: int, *, seed: int = 0) -> Tensor:
    """Return indices [R count], drawn with replacement, the same in every run."""
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
