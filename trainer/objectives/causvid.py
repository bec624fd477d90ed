"""CausVid (arXiv 2412.07772, Section 4.2): the generator denoises real videos. Each chunk has its own noise level.

One block-causal pass replaces the rollout of Self Forcing. Its x0 goes to the same losses (``dmd_loss``,
``critic_loss``). The generator sees noised real context, never its own output.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BlockMask
from model.denoiser import Denoiser
from model.flow_matching import add_noise
from trainer.objectives.diffusion import predict_in_context


def sample_step_timesteps(
    batch: int, chunks: Sequence[tuple[int, int]], steps: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Draw one of the few-step denoiser's timesteps for every chunk of every clip, repeated over its frames: [B F]."""
    drawn = torch.randint(len(steps), (batch, len(chunks)), generator=generator)
    sizes = torch.tensor([end - start for start, end in chunks])
    return torch.tensor(list(steps))[drawn].repeat_interleave(sizes, dim=1)


def denoise_chunks(
    denoiser: Denoiser,
    clean: Tensor,
    prompt_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    block_mask: BlockMask,
    clean_context: bool = False,
) -> Tensor:
    """Predict x0 [B F C H W] in one step from real latents that are noised chunk by chunk.

    Args:
        clean: real latents [B F C H W].
        prompt_embeds: [B L E].
        timesteps: [B F], from :func:`sample_step_timesteps`. A frame at timestep 0 is returned unchanged.
        noise: [B F C H W].
        block_mask: block-causal over F frames; the teacher-forcing mask over 2 F frames for ``clean_context``.
        clean_context: every chunk sees the clean chunks before it, as in teacher forcing.
    """
    if clean_context:
        noisy = add_noise(clean, noise, timesteps)
        return predict_in_context(denoiser, noisy, timesteps, clean, prompt_embeds, block_mask).x0
    return denoiser(add_noise(clean, noise, timesteps), timesteps, prompt_embeds, block_mask=block_mask).x0
