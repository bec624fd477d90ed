"""ODE regression (CausVid, arXiv 2412.07772, Section 4.3): learn a teacher's endpoint from states on its trajectory.

Shapes: B batch, S stored states, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BlockMask
from model.denoiser import Denoiser
from trainer.objectives.diffusion import frame_mean


def pick_states(
    trajectory: Tensor, timesteps: Sequence[float], chunks: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose one stored state at random for every chunk of every clip.

    Args:
        trajectory: [B S F C H W], from noise to clean.
        timesteps: the timesteps of the S states.
        chunks: frame ranges.

    Returns:
        noisy latents [B F C H W] and their timesteps [B F].
    """
    batch, states = trajectory.shape[:2]
    drawn = torch.randint(states, (batch, len(chunks)), generator=generator)
    index = drawn.repeat_interleave(torch.tensor([end - start for start, end in chunks]), dim=1)
    rows, frames = torch.arange(batch)[:, None], torch.arange(index.shape[1])
    return trajectory[rows, index, frames], torch.tensor(list(timesteps))[index]


def ode_regression_loss(
    denoiser: Denoiser,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    prompt_embeds: Tensor,
    block_mask: BlockMask,
) -> Tensor:
    """Return the MSE between the x0 prediction and the endpoint, over the frames whose timestep is not 0.

    Args:
        noisy, target: [B F C H W].
        timesteps: [B F].
        prompt_embeds: [B L E].
        block_mask: block-causal over F frames.
    """
    x0 = denoiser(noisy, timesteps, prompt_embeds, block_mask=block_mask).x0
    return frame_mean((x0.float() - target.float()).square(), timesteps != 0)
