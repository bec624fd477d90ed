"""Flow-matching training of a denoiser on real videos: bidirectional, diffusion forcing, teacher forcing.

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BlockMask
from model.denoiser import Denoiser, Prediction
from model.flow_matching import FlowMatching, add_noise, expand_sigma


def sample_levels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform levels in (0, 1) of the given shape, stratified: one draw in each of N equal intervals, shuffled."""
    count = torch.Size(shape).numel()
    levels = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return levels[torch.randperm(count, generator=generator)].view(*shape)


def sample_timesteps(
    batch: int, chunks: Sequence[tuple[int, int]], schedule: FlowMatching, generator: torch.Generator
) -> Tensor:
    """One shifted timestep a chunk, repeated over its frames: [B F]. A single chunk gives one timestep a video."""
    levels = sample_levels((batch, len(chunks)), generator)
    sizes = torch.tensor([end - start for start, end in chunks])
    return schedule.timestep(levels).repeat_interleave(sizes, dim=1)


def flow_matching_loss(
    prediction: Prediction,
    x0: Tensor,
    timesteps: Tensor,
    *,
    sigma_floor: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """``mean(w ((x0_pred - x0) / max(sigma, floor))^2)``; without a floor this is the MSE of the flow.

    The floor bounds the weight ``1 / sigma^2`` that the flow error gives x0 predictions at low noise.

    Args:
        prediction: of the latents noised to ``timesteps``.
        x0: clean latents [B F C H W].
        timesteps: [B F].
        weights: per-frame weights [B F].
    """
    sigma = expand_sigma(timesteps).to(x0.device).clamp_min(max(sigma_floor, 1e-6))
    error = ((prediction.x0.float() - x0.float()) / sigma).square()
    if weights is not None:
        error = error * weights.to(error.device)[..., None, None, None]
    return error.mean()


def frame_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of [B F C H W] over the frames that count, bool [B F] or [F]; None counts all, and none at all gives 0."""
    if counted is None:
        return values.mean()
    weights = counted.to(values).expand(values.shape[:2])
    sums = (values.mean(dim=(2, 3, 4)) * weights).sum()
    return sums / weights.sum().clamp_min(1)


def predict_in_context(
    denoiser: Denoiser, noisy: Tensor, timesteps: Tensor, clean: Tensor, prompt_embeds: Tensor, block_mask: BlockMask
) -> Prediction:
    """Denoise every chunk after the clean chunks before it, in one pass over ``[clean | noisy]``.

    Args:
        noisy, clean: [B F C H W].
        timesteps: of the noisy frames [B F]; clean frames carry 0.
        prompt_embeds: [B L E].
    """
    prediction = denoiser(
        torch.cat([clean, noisy], dim=1),
        torch.cat([torch.zeros_like(timesteps), timesteps], dim=1),
        prompt_embeds,
        block_mask=block_mask,
    )
    return Prediction(*(part[:, clean.shape[1] :] for part in prediction))


def forcing_loss(
    denoiser: Denoiser,
    x0: Tensor,
    prompt_embeds: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    block_mask: BlockMask | None,
    teacher_forcing: bool = False,
    sigma_floor: float = 0.0,
    bell_weights: bool = False,
) -> Tensor:
    """Denoise real clips: bidirectional (no mask), diffusion forcing (noisy context), teacher forcing (clean context).

    Args:
        x0: clean latents [B F C H W].
        prompt_embeds: [B L E].
        timesteps: [B F].
        noise: [B F C H W].
        block_mask: block-causal over F frames, or the teacher-forcing mask over ``[clean | noisy]``.
        teacher_forcing: put the clean clip before the noisy one, at timestep 0.
        sigma_floor: see :func:`flow_matching_loss`.
        bell_weights: weight frames with :meth:`FlowMatching.training_weight`.
    """
    noisy = add_noise(x0, noise, timesteps)
    if teacher_forcing:
        prediction = predict_in_context(denoiser, noisy, timesteps, x0, prompt_embeds, block_mask)
    else:
        prediction = denoiser(noisy, timesteps, prompt_embeds, block_mask=block_mask)
    weights = denoiser.schedule.training_weight(timesteps) if bell_weights else None
    return flow_matching_loss(prediction, x0, timesteps, sigma_floor=sigma_floor, weights=weights)
