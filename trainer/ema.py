"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """A running average of the parameters of ``module``, kept beside it.

    Args:
        module: the module that trains.
        decay: share of the old average kept at each update, in [0, 1).
        start_step: updates before this one copy the parameters.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay={decay} must lie in [0, 1)")
        self.module = module
        self.decay = decay
        self.start_step = start_step
        self.average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after step ``step`` (1, 2, ...)."""
        decay = self.decay if step > self.start_step else 0.0
        averages, parameters = zip(
            *((self.average[n], p.detach()) for n, p in self.module.named_parameters()), strict=True
        )
        torch._foreach_lerp_(list(averages), list(parameters), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the averaged parameters in the module, then put the trained ones back."""
        trained = {name: parameter.data for name, parameter in self.module.named_parameters()}
        try:
            for name, parameter in self.module.named_parameters():
                parameter.data = self.average[name]
            yield
        finally:
            for name, parameter in self.module.named_parameters():
                parameter.data = trained[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The average, under the module's parameter names."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name, value in state.items():
            self.average[name].copy_(value)
