"""Gradient through networks that must not be trained by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.objectives.dmd import GeneratorLoss


def through_frozen(loss: Callable[[Tensor], Tensor], x0: Tensor) -> GeneratorLoss:
    """``loss(x0)``, a scalar, whose gradient reaches ``x0`` but no parameter used on the way.

    The gradient with respect to x0 is taken at once: the networks inside free their activations before the caller's
    backward runs, and they neither need ``requires_grad_(False)`` nor have their own gradients touched.

    Returns:
        the loss, and ``sum |d loss / d x0|``, which for a DMD loss is the gradient norm that DMD reports: the two
        tell how strongly different objectives pull. A gradient that is not finite makes the loss so too.
    """
    leaf = x0.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    surrogate = ((x0 - x0.detach()) * gradient).sum()
    return GeneratorLoss(value.detach() + surrogate, gradient.float().abs().sum())
