"""Distribution matching distillation (DMD2, arXiv 2405.14867) on self-generated videos (Self Forcing, Section 3.3).

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.flow_matching import FlowMatching, add_noise
from trainer.objectives.diffusion import flow_matching_loss, frame_mean, sample_levels

MIN_TIMESTEP, MAX_TIMESTEP = 20, 980


class GeneratorLoss(NamedTuple):
    """A scalar loss, and the mean absolute value of the distribution-matching gradient behind it."""

    loss: Tensor
    gradient_norm: Tensor


def sample_score_timesteps(
    batch: int, schedule: FlowMatching, generator: torch.Generator, *, lowest: float = 0.0, highest: float = 1000.0
) -> Tensor:
    """Draw one timestep a video, [B 1].

    An integer is drawn uniformly from [lowest, highest), stratified over the batch. The schedule shifts it, and the
    result is clamped to [20, 980].

    Args:
        lowest, highest: bounds before the shift, in [0, 1000]. ``ts_schedule`` of the official code sets them to the
            neighbours of the rollout's exit step.
    """
    if not 0 <= lowest < highest <= 1000:
        raise ValueError(f"lowest={lowest} and highest={highest} must satisfy 0 <= lowest < highest <= 1000")
    drawn = (lowest + (highest - lowest) * sample_levels((batch, 1), generator)).floor()
    return schedule.timestep(drawn / 1000).clamp(MIN_TIMESTEP, MAX_TIMESTEP)


def guided_x0(
    score: Denoiser,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Return ``c + g (c - u)`` [B F C H W]. Both halves run in one batch; g = 0 skips the unconditional half."""
    if guidance_scale == 0:
        return score(latents, timesteps, prompt_embeds).x0
    both = score(latents.repeat(2, 1, 1, 1, 1), timesteps.repeat(2, 1), torch.cat([prompt_embeds, negative_embeds])).x0
    conditional, unconditional = both.chunk(2)
    return conditional + guidance_scale * (conditional - unconditional)


def dmd_loss(
    x0: Tensor,
    real_score: Denoiser,
    fake_score: Denoiser,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    real_guidance_scale: float,
    fake_guidance_scale: float = 0.0,
    counted: Tensor | None = None,
) -> GeneratorLoss:
    """Push generated videos along ``real - fake``, divided per sample by ``mean|x - real|`` (DMD, Eq. 7 and 8).

    Args:
        x0: generated video [B F C H W], with gradient.
        prompt_embeds, negative_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        real_guidance_scale: g of ``c + g (c - u)`` for the real score: 0 is no guidance, 3 is CFG 4 in the usual
            convention.
        fake_guidance_scale: the same g for the fake score.
        counted: frames [F] bool that the loss is taken over, for example all but a given first one. None takes all.

    Returns:
        loss and gradient norm. Both are not finite if a score is not finite, so that the caller can skip the update.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])
    with torch.no_grad():
        noisy = add_noise(x0, noise, timesteps)
        fake = guided_x0(fake_score, noisy, timesteps, prompt_embeds, negative_embeds, fake_guidance_scale).float()
        real = guided_x0(real_score, noisy, timesteps, prompt_embeds, negative_embeds, real_guidance_scale).float()
        scale = (x0.float() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        gradient = (fake - real) / scale
        target = x0.float() - gradient
    loss = 0.5 * frame_mean((x0.float() - target).square(), counted)
    return GeneratorLoss(loss, frame_mean(gradient.abs(), counted))


def critic_loss(
    x0: Tensor,
    fake_score: Denoiser,
    prompt_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    sigma_floor: float = 0.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Train the fake score by flow matching on generated videos.

    Args:
        x0: generated videos [B F C H W]; they get no gradient.
        prompt_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        sigma_floor: see :func:`flow_matching_loss`.
        counted: frames [F] bool that the loss is taken over; None takes all.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])
    x0 = x0.detach()
    prediction = fake_score(add_noise(x0, noise, timesteps), timesteps, prompt_embeds)
    return flow_matching_loss(prediction, x0, timesteps, sigma_floor=sigma_floor, counted=counted)
