"""Divides a global batch over processes and passes. Random numbers do not depend on the division."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.rollout import randn
from utils.distributed import Ranks
from utils.errors import UserError
from utils.seeds import random_stream

Rows = TypeVar("Rows", Tensor, Sequence)


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive samples of an update's global batch, for one forward and backward pass.

    Its random streams depend on the update, the purpose and a sample's place in the global batch, never on the process
    that draws them: however a batch is divided, its samples see the same numbers.
    """

    seed: int
    """The seed of the update."""
    batch: range
    """Indices of the whole global batch in the training data."""
    number: int
    """The number of this pass among the passes of the process."""
    start: int
    """The place of the first sample in the global batch."""
    size: int
    """Number of samples."""

    @property
    def total(self) -> int:
        """Number of samples of the global batch."""
        return len(self.batch)

    @property
    def indices(self) -> range:
        """The indices of these samples in the training data."""
        return self.of(self.batch)

    def of(self, whole: Rows) -> Rows:
        """Return the rows of this micro-batch from the rows [total ...] of the global batch."""
        return whole[self.start : self.start + self.size]

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator for numbers that are drawn once for a global batch. All its micro-batches get the same."""
        return random_stream(self.seed, purpose)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return one generator for each sample."""
        places = range(self.start, self.start + self.size)
        return [random_stream(self.seed, purpose, place) for place in places]

    def randn(self, purpose: str, like: Tensor) -> Tensor:
        """Draw standard normal noise [size ...] in the shape, device and dtype of ``like``."""
        return randn(like.shape, self.generators(purpose), like)

    def each(self, draw: Callable[[Tensor, torch.Generator], Tensor], purpose: str, samples: Tensor) -> Tensor:
        """Join the results of ``draw(samples[i : i + 1], generator of sample i)`` for every sample i."""
        pairs = zip(samples.split(1), self.generators(purpose), strict=True)
        return torch.cat([draw(sample, generator) for sample, generator in pairs])

    def weight(self, counted: Tensor) -> float:
        """Return the factor for the mean over the counted entries of this micro-batch.

        Micro-batches are averaged with equal weights, although they may hold different numbers of counted entries.
        With this factor the average is the mean over all counted entries of the global batch.

        Args:
            counted: which entries count, bool [total ...], of the global batch.
        """
        everywhere = max(1, int(counted.sum()))
        return int(self.of(counted).sum()) / everywhere * self.total / self.size


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: each process takes consecutive samples, in passes of ``micro`` samples."""

    micro: int
    """Samples in a pass."""
    passes: int
    """Passes of each process in an update; their gradients are added up."""
    ranks: Ranks

    @property
    def local(self) -> int:
        """The number of samples of each process."""
        return self.micro * self.passes

    @property
    def total(self) -> int:
        """The number of samples in the global batch."""
        return self.local * self.ranks.world_size

    def divide(self, batch: range, seed: int) -> list[MicroBatch]:
        """Return the passes of this process over a global batch. ``seed`` gives the random streams of the update."""
        first = self.ranks.rank * self.local
        return [
            MicroBatch(seed, batch, number, first + number * self.micro, self.micro) for number in range(self.passes)
        ]


def plan_batches(micro: int, total: int | None, ranks: Ranks) -> BatchPlan:
    """Divide a global batch of ``total`` samples into passes of ``micro``. None: one pass for each process.

    Raises:
        UserError: the batch is not a multiple of the samples in one pass of all processes.
    """
    at_once = micro * ranks.world_size
    total = at_once if total is None else total
    if total % at_once:
        raise UserError(
            f"trainer.total_batch_size={total} is not a multiple of {at_once} = trainer.batch_size={micro} x "
            f"{ranks.world_size} processes; change one of them"
        )
    return BatchPlan(micro, total // at_once, ranks)
