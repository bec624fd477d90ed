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
    """A scalar loss and the mean size of the distribution-matching gradient behind it."""

    loss: Tensor
    gradient_norm: Tensor


def sample_score_timesteps(batch: int, schedule: FlowMatching, generator: torch.Generator) -> Tensor:
    """One timestep a video, [B 1]: integer uniform in [0, 1000), stratified over the batch, shifted, in [20, 980]."""
    drawn = (1000 * sample_levels((batch, 1), generator)).floor()
    return schedule.timestep(drawn / 1000).clamp(MIN_TIMESTEP, MAX_TIMESTEP)


def guided_x0(
    score: Denoiser,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    guidance_scale: float,
) -> Tensor:
    """``c + g (c - u)``, conditional and unconditional in one batch; g = 0 skips the unconditional half."""
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
    counted: Tensor | None = None,
) -> GeneratorLoss:
    """Push generated videos along ``fake - real``, normalised per sample by ``mean|x - real|`` (DMD, Eq. 7, 8).

    Args:
        x0: generated video [B F C H W], with gradient.
        prompt_embeds, negative_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        real_guidance_scale: g of ``c + g (c - u)``: 0 is no guidance, 3 is CFG 4 in the usual convention.
        counted: frames [F] bool the loss is taken over, such as all but a given first one; None takes all.

    Returns:
        loss and gradient norm; both are non-finite where a score is, so that the caller can skip the step.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])
    with torch.no_grad():
        noisy = add_noise(x0, noise, timesteps)
        fake = fake_score(noisy, timesteps, prompt_embeds).x0.float()
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
) -> Tensor:
    """Flow matching of the fake score on generated videos ``x0`` [B F C H W], ``timesteps`` [B 1]."""
    timesteps = timesteps.expand(-1, x0.shape[1])
    x0 = x0.detach()
    prediction = fake_score(add_noise(x0, noise, timesteps), timesteps, prompt_embeds)
    return flow_matching_loss(prediction, x0, timesteps, sigma_floor=sigma_floor)
