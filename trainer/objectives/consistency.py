"""Few-step causal students of a many-step causal teacher, both given the ground truth of earlier chunks.

Causal ODE distillation (Causal Forcing, arXiv 2602.02214) regresses stored states of the teacher's trajectories to
their endpoints. Causal consistency distillation (Causal Forcing++, arXiv 2605.15141) regresses to the average of the
student itself, one teacher step further, and needs no trajectories. Both learn the map from a point on the teacher's
ODE to its end.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text, S solver steps.
Every ``block_mask`` here is the teacher-forcing mask over ``[clean | noisy]``, 2 F frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BlockMask
from model.denoiser import Denoiser
from model.flow_matching import expand_sigma
from pipeline.sampling import SamplingConfig, integrate
from trainer.objectives.diffusion import frame_mean, predict_in_context


def sample_step_pairs(
    batch: int, chunks: Sequence[tuple[int, int]], grid: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one pair of neighbours t, t' of the grid for each chunk, repeated over its frames: both [B F].

    Args:
        chunks: frame ranges; a single one gives one pair a video.
        grid: descending timesteps [S], which have S - 1 pairs. The official code does not append 0 either.
    """
    drawn = torch.randint(len(grid) - 1, (batch, len(chunks)), generator=generator)
    index = drawn.repeat_interleave(torch.tensor([end - start for start, end in chunks]), dim=1)
    return grid[index], grid[index + 1]


@torch.no_grad()
def consistency_target(
    average: Denoiser,
    teacher: Denoiser,
    noisy: Tensor,
    clean: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    timesteps: Tensor,
    following: Tensor,
    guidance_scale: float,
    block_mask: BlockMask,
) -> Tensor:
    """Return ``G_average(x_t', t')``; ``x_t' = x_t - (t - t') / 1000 v`` is one guided Euler step of the teacher.

    At t' = 0 a consistency function is the identity, so the target is x_t' itself, whatever the network predicts.

    Args:
        average: the student with averaged weights.
        noisy: clean latents noised to t [B F C H W].
        clean: [B F C H W].
        prompt_embeds, negative_embeds: [B L E].
        timesteps, following: t and t' [B F], of :func:`sample_step_pairs`.
        guidance_scale: g of ``u + g (c - u)``; 1 is no guidance.

    Returns:
        target x0 [B F C H W], without gradient.
    """
    flow = _guided_flow(teacher, noisy, timesteps, clean, prompt_embeds, negative_embeds, guidance_scale, block_mask)
    step = expand_sigma(timesteps - following).to(noisy.device)
    closer = (noisy.float() - step * flow.float()).to(noisy.dtype)
    predicted = predict_in_context(average, closer, following, clean, prompt_embeds, block_mask).x0
    return torch.where(expand_sigma(following).to(noisy.device) > 0, predicted, closer)


def in_context_loss(
    denoiser: Denoiser,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    clean: Tensor,
    prompt_embeds: Tensor,
    block_mask: BlockMask,
) -> Tensor:
    """Return the MSE between the x0 prediction and a target, over the frames whose timestep is not 0.

    Both distillations use it: the target is :func:`consistency_target`, or the endpoint of a trajectory.

    Args:
        noisy, target, clean: [B F C H W].
        timesteps: [B F].
        prompt_embeds: [B L E].
    """
    x0 = predict_in_context(denoiser, noisy, timesteps, clean, prompt_embeds, block_mask).x0
    return frame_mean((x0.float() - target.float()).square(), timesteps != 0)


@torch.no_grad()
def causal_trajectory(
    teacher: Denoiser,
    noise: Tensor,
    clean: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    config: SamplingConfig,
    block_mask: BlockMask,
) -> list[Tensor]:
    """Return all S + 1 states of the teacher's ODE from noise [B F C H W], each chunk given the clean ones before it.

    The context is given, not generated. So all chunks are solved at once, at one timestep for all frames.
    """

    def flow(latents: Tensor, timestep: float) -> Tensor:
        timesteps = torch.full(latents.shape[:2], timestep, device=latents.device)
        return _guided_flow(
            teacher, latents, timesteps, clean, prompt_embeds, negative_embeds, config.guidance_scale, block_mask
        )

    return [noise, *integrate(flow, noise, config.timesteps(teacher.schedule), config.solver)]


def _guided_flow(
    teacher: Denoiser,
    noisy: Tensor,
    timesteps: Tensor,
    clean: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    guidance_scale: float,
    block_mask: BlockMask,
) -> Tensor:
    """Return the flow ``u + g (c - u)`` [B F C H W]; both halves run in one batch."""
    if guidance_scale == 1:
        return predict_in_context(teacher, noisy, timesteps, clean, prompt_embeds, block_mask).flow
    noisy, clean = (latents.repeat(2, 1, 1, 1, 1) for latents in (noisy, clean))
    embeds = torch.cat([prompt_embeds, negative_embeds])
    both = predict_in_context(teacher, noisy, timesteps.repeat(2, 1), clean, embeds, block_mask).flow
    conditional, unconditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, guidance_scale)
