"""Adversarial losses on self-generated videos (Self Forcing, Section 3.3; R3GAN, arXiv 2501.05441).

Real and generated videos are noised to one level with the same noise before a discriminator sees them.

Shapes: B batch, F latent frames, C channels, H W latent height and width, K discriminator heads, L E text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from model.flow_matching import add_noise
from trainer.objectives.dmd import GeneratorLoss
from trainer.objectives.frozen import through_frozen

DiscriminatorFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents [B F C H W], timesteps [B F], prompt_embeds [B L E]) -> logits [B K], high for real."""


class AdversarialLoss(Enum):
    """How logits become a loss."""

    relativistic = "relativistic"
    """Real against generated, pair by pair (RpGAN, arXiv 1807.00734)."""
    non_saturating = "non_saturating"
    """Each against zero (arXiv 1406.2661)."""


class DiscriminatorLoss(NamedTuple):
    """The loss of a discriminator and its parts."""

    loss: Tensor
    """Scalar with gradient, penalties included."""
    real_logit: Tensor
    """Mean logit of the real videos, detached."""
    fake_logit: Tensor
    """Mean logit of the generated videos, detached."""
    penalty: Tensor
    """Sum of the weighted penalties, detached."""


def generator_logit_loss(fake: Tensor, real: Tensor | None, kind: AdversarialLoss) -> Tensor:
    """Return ``mean softplus(D(real) - D(fake))``, or ``mean softplus(-D(fake))``; logits [B K].

    The second, non-saturating form needs no real logits.
    """
    if kind is AdversarialLoss.non_saturating:
        return softplus(-fake).mean()
    return softplus(real - fake).mean()


def discriminator_logit_loss(fake: Tensor, real: Tensor, kind: AdversarialLoss) -> Tensor:
    """Return ``mean softplus(D(fake) - D(real))``, or ``mean softplus(-D(real)) + mean softplus(D(fake))``; [B K]."""
    if kind is AdversarialLoss.non_saturating:
        return softplus(-real).mean() + softplus(fake).mean()
    return softplus(fake - real).mean()


def gradient_penalty(logits: Tensor, perturbed: Tensor, sigma: float) -> Tensor:
    """Return ``mean (((D(x + sigma e) - D(x)) / sigma)^2)`` with e ~ N(0, 1), whose expectation is ``|grad D|^2``.

    At real videos this approximates R1, at generated ones R2 (arXiv 1801.04406), without a second backward pass
    (Seaweed-APT, arXiv 2501.08316, where the weight contains the division by sigma^2).

    Args:
        logits, perturbed: D(x) and D(x + sigma e), [B K].
        sigma: size of the perturbation.
    """
    return ((perturbed - logits) / sigma).square().mean()


def gan_generator_loss(
    x0: Tensor,
    real_x0: Tensor | None,
    discriminator: DiscriminatorFunction,
    prompt_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    kind: AdversarialLoss,
) -> GeneratorLoss:
    """Make the discriminator believe that generated videos are real. The discriminator gets no gradient.

    Args:
        x0: generated video [B F C H W], with gradient.
        real_x0: real videos of the same prompts [B F C H W]; the non-saturating loss does not use them.
        prompt_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
    """
    if kind is AdversarialLoss.relativistic and real_x0 is None:
        raise ValueError("the relativistic loss compares with real videos, but real_x0 is None")
    timesteps = timesteps.expand(-1, x0.shape[1])

    def logits(x: Tensor) -> Tensor:
        return discriminator(add_noise(x, noise, timesteps), timesteps, prompt_embeds)

    real = None
    if kind is AdversarialLoss.relativistic:
        with torch.no_grad():
            real = logits(real_x0)
    return through_frozen(lambda x: generator_logit_loss(logits(x), real, kind), x0)


def gan_discriminator_loss(
    x0: Tensor,
    real_x0: Tensor,
    discriminator: DiscriminatorFunction,
    prompt_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    perturbation: Tensor,
    kind: AdversarialLoss,
    perturbation_sigma: float,
    r1_weight: float,
    r2_weight: float,
    logit_weight: float = 1.0,
) -> DiscriminatorLoss:
    """Tell real videos from generated ones, with penalties on the slope of the discriminator at both.

    Args:
        x0: generated videos [B F C H W]; they get no gradient.
        real_x0: real videos of the same prompts [B F C H W].
        prompt_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise, perturbation: standard normal [B F C H W].
        perturbation_sigma: size of the finite difference, added to the noisy latents.
        r1_weight, r2_weight: weights of the squared slopes at real and at generated videos; 0 leaves one out.
        logit_weight: weight of the loss of the logits.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])
    fake, real = (add_noise(x.detach(), noise, timesteps) for x in (x0, real_x0))
    penalised = [(x, weight) for x, weight in ((real, r1_weight), (fake, r2_weight)) if weight > 0]
    inputs = [fake, real, *(x + perturbation_sigma * perturbation for x, _ in penalised)]
    fake_logits, real_logits, *perturbed = _logits(discriminator, inputs, timesteps, prompt_embeds)
    penalty = fake_logits.new_zeros(())
    for (x, weight), moved in zip(penalised, perturbed, strict=True):
        penalty = penalty + weight * gradient_penalty(
            real_logits if x is real else fake_logits, moved, perturbation_sigma
        )
    loss = logit_weight * discriminator_logit_loss(fake_logits, real_logits, kind) + penalty
    return DiscriminatorLoss(loss, real_logits.detach().mean(), fake_logits.detach().mean(), penalty.detach())


def _logits(
    discriminator: DiscriminatorFunction, inputs: list[Tensor], timesteps: Tensor, prompt_embeds: Tensor
) -> Sequence[Tensor]:
    """Return the logits [B K] of each input [B F C H W], all from one batch."""
    count = len(inputs)
    batch = torch.cat(inputs), timesteps.repeat(count, 1), prompt_embeds.repeat(count, 1, 1)
    return discriminator(*batch).chunk(count)
