"""One update of one optimizer. The gradients of all passes and processes are clipped and applied, or all skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.micro_batch import MicroBatch
from trainer.optimizer import Optimizer
from trainer.parallelize import average_replicated, synchronise_gradients
from utils.distributed import all_reduce_mean
from utils.timer import Stopwatch


class Loss(NamedTuple):
    """The result of one pass."""

    total: Tensor
    """A scalar with gradient, the mean over the samples."""
    metrics: dict[str, Tensor]
    """Scalars to log, without gradient. They are averaged like the loss."""
    output: Any = None
    """The output for later parts of the step, such as the generated videos, without gradient."""


@dataclass(frozen=True)
class Updated:
    """The result of an update."""

    metrics: dict[str, float]
    """The means over all passes of all processes, the gradient norm and the learning rate."""
    outputs: list[Any]
    """:attr:`Loss.output` of each pass of this process."""
    micro_batches: list[MicroBatch]
    """The passes of this process."""
    is_applied: bool
    """False if a loss or a gradient was not finite on any process. Then no weight has changed."""


def make_update(
    optimizer: Optimizer,
    loss: Callable[[MicroBatch], Loss],
    micro_batches: list[MicroBatch],
    *,
    clock: Stopwatch,
    prefix: str = "",
    reduce_every_pass: bool = False,
) -> Updated:
    """Compute the gradient of the mean loss, clip it, and step once. Skip the step if something is not finite.

    Args:
        loss: computes the loss of one pass.
        micro_batches: the passes of this process.
        clock: counts the phases "backward" and "optimizer".
        prefix: the prefix of the names of the gradient norm and of the learning rate.
        reduce_every_pass: sum gradients over processes after every pass instead of once; needs less memory.
    """
    metrics, outputs = _accumulate(optimizer, loss, micro_batches, clock, reduce_every_pass)
    is_finite = all(map(math.isfinite, metrics.values()))
    with clock.phase("optimizer"):
        lr = optimizer.lr
        norm = optimizer.step(skip=not is_finite)
    metrics |= {f"{prefix}gradient_norm": norm, f"{prefix}lr": lr}
    return Updated(metrics, outputs, micro_batches, is_finite and math.isfinite(norm))


def _accumulate(
    optimizer: Optimizer,
    loss: Callable[[MicroBatch], Loss],
    micro_batches: list[MicroBatch],
    clock: Stopwatch,
    reduce_every_pass: bool,
) -> tuple[dict[str, float], list[Any]]:
    """Add the gradients of all passes. Returns the means of the metrics, and the outputs."""
    sums: dict[str, Tensor] = {}
    outputs = []
    share = 1 / len(micro_batches)
    for micro_batch in micro_batches:
        last = micro_batch is micro_batches[-1]
        synchronise_gradients(optimizer.module, last or reduce_every_pass)
        total, metrics, output = loss(micro_batch)
        with clock.phase("backward"):
            (share * total).backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + share * value.float()
        outputs.append(output)
    average_replicated(optimizer.named.values())
    means = all_reduce_mean(torch.stack(list(sums.values())))
    return dict(zip(sums, means.tolist(), strict=True)), outputs


def mean_metrics(updates: Sequence[Updated]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it, in the order of first appearance."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.metrics.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}
