"""Exponential moving average of a module's parameters. Sharded parameters are averaged shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.parallelize import local_part

log = logging.getLogger(__name__)

LARGEST_INITIAL_SHARE = 0.1
"""The largest share that the initial weights may still have in the average at the end, without a warning."""


class EMA:
    """A running average of the trained parameters of ``module``. It is stored separately from the module.

    Args:
        module: the module that trains. The average of a frozen parameter is the parameter itself.
        decay: share of the old average that is kept at each update, in [0, 1).
        start_step: up to this step the average is a copy of the parameters.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay={decay} must lie in [0, 1)")
        self.module = module
        self.decay = decay
        self.start_step = start_step
        self.average = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }

    def initial_share(self, steps: int) -> float:
        """Return the share that the weights of ``start_step`` still have in the average after ``steps`` steps."""
        return self.decay ** max(0, steps - self.start_step)

    def warn_if_young(self, steps: int) -> None:
        """Log a warning if ``steps`` steps are too few for the average to forget the weights it began with."""
        share = self.initial_share(steps)
        if share > LARGEST_INITIAL_SHARE:
            log.warning(
                "trainer.ema_decay=%g: after %d steps, %.0f %% of the averaged weights are still those of step %d; "
                "use a smaller decay, train longer, or set 0 to keep the trained weights",
                *(self.decay, steps, 100 * share, min(self.start_step, steps)),
            )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after step ``step`` (1, 2, ...)."""
        decay = self.decay if step > self.start_step else 0.0
        averages, parameters = self._parts()
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged parameters into the module, run the block, then put the trained ones back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values in place, because sharded parameters are views of storage that other code uses."""
        for average, parameter in zip(*self._parts(), strict=True):
            trained = parameter.clone()
            parameter.copy_(average)
            average.copy_(trained)

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the parameters. Of sharded ones, return the part that this process holds."""
        named = dict(self.module.named_parameters())
        averages = [local_part(average) for average in self.average.values()]
        return averages, [local_part(named[name].detach()) for name in self.average]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, with the module's parameter names."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of :meth:`state_dict`."""
        for name, value in state.items():
            self.average[name].copy_(value)
