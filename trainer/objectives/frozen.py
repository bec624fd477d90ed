"""Gradient through networks to their input, without training the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.objectives.dmd import GeneratorLoss


def through_frozen(loss: Callable[[Tensor], Tensor], x0: Tensor) -> GeneratorLoss:
    """Return the scalar ``loss(x0)``. Its gradient reaches ``x0``, but no parameter of the networks that it uses.

    The gradient with respect to x0 is computed at once. So the networks free their activations before the caller's
    backward pass runs. They do not need ``requires_grad_(False)``, and their own gradients stay untouched.

    Returns:
        the loss, and ``sum |d loss / d x0|``. For a DMD loss this is the gradient norm that DMD reports, so the two can
        be compared. If the gradient is not finite, the loss is not finite either.
    """
    leaf = x0.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    surrogate = ((x0 - x0.detach()) * gradient).sum()
    return GeneratorLoss(value.detach() + surrogate, gradient.float().abs().sum())
