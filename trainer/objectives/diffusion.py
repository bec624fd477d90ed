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
    """Draw uniform levels in (0, 1) of a given shape, stratified: one in each of N equal intervals, then shuffled."""
    count = torch.Size(shape).numel()
    levels = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return levels[torch.randperm(count, generator=generator)].view(*shape)


def sample_timesteps(
    batch: int,
    chunks: Sequence[tuple[int, int]],
    schedule: FlowMatching,
    generator: torch.Generator,
    *,
    highest: float = 1000.0,
) -> Tensor:
    """Draw one shifted timestep a chunk, repeated over its frames: [B F]. A single chunk gives one timestep a video.

    Args:
        chunks: frame ranges.
        highest: upper bound of the timesteps after the shift, in (0, 1000].
    """
    levels = schedule.level(highest) * sample_levels((batch, len(chunks)), generator)
    sizes = torch.tensor([end - start for start, end in chunks])
    return schedule.timestep(levels).repeat_interleave(sizes, dim=1)


def flow_matching_loss(
    prediction: Prediction,
    x0: Tensor,
    timesteps: Tensor,
    *,
    sigma_floor: float = 0.0,
    weights: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Return ``mean(w ((x0_pred - x0) / max(sigma, floor))^2)``. Without a floor this is the MSE of the flow.

    The MSE of the flow weights the error of x0 by ``1 / sigma^2``. The floor bounds that weight at low noise.

    Args:
        prediction: the denoiser's prediction for the latents noised to ``timesteps``.
        x0: clean latents [B F C H W].
        timesteps: [B F].
        weights: a weight for each frame [B F].
        counted: frames [B F] or [F] bool that the mean is taken over; None takes all.
    """
    sigma = expand_sigma(timesteps).to(x0.device).clamp_min(max(sigma_floor, 1e-6))
    error = ((prediction.x0.float() - x0.float()) / sigma).square()
    if weights is not None:
        error = error * weights.to(error.device)[..., None, None, None]
    return frame_mean(error, counted)


def frame_mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean of [B F C H W] over counted frames, bool [B F] or [F]. None counts all; if none counts, 0."""
    if counted is None:
        return values.mean()
    weights = counted.to(values).expand(values.shape[:2])
    sums = (values.mean(dim=(2, 3, 4)) * weights).sum()
    return sums / weights.sum().clamp_min(1)


def predict_in_context(
    denoiser: Denoiser,
    noisy: Tensor,
    timesteps: Tensor,
    clean: Tensor,
    prompt_embeds: Tensor,
    block_mask: BlockMask,
    *,
    context_timesteps: Tensor | None = None,
) -> Prediction:
    """Denoise every chunk, given the clean chunks before it, in one pass over ``[clean | noisy]``.

    Args:
        noisy, clean: [B F C H W].
        timesteps: timesteps of the noisy frames [B F].
        prompt_embeds: [B L E].
        block_mask: the teacher-forcing mask over 2 F frames.
        context_timesteps: timesteps that the network is told for the clean frames [B F]; None tells 0.
    """
    told = torch.zeros_like(timesteps) if context_timesteps is None else context_timesteps
    prediction = denoiser(
        torch.cat([clean, noisy], dim=1),
        torch.cat([told, timesteps], dim=1),
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
    context_timesteps: Tensor | None = None,
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
        teacher_forcing: put the clean clip before the noisy one.
        context_timesteps: noise augmentation of teacher forcing's clean clip [B F]: it gets this much of ``noise``,
            and the network is told so. No chunk sees its own clean copy, so using the same noise twice gives nothing
            away. None leaves the clip clean, at timestep 0.
        sigma_floor: see :func:`flow_matching_loss`.
        bell_weights: weight frames with :meth:`FlowMatching.training_weight`.
    """
    noisy = add_noise(x0, noise, timesteps)
    if teacher_forcing:
        clean = x0 if context_timesteps is None else add_noise(x0, noise, context_timesteps)
        prediction = predict_in_context(
            denoiser, noisy, timesteps, clean, prompt_embeds, block_mask, context_timesteps=context_timesteps
        )
    else:
        prediction = denoiser(noisy, timesteps, prompt_embeds, block_mask=block_mask)
    weights = denoiser.schedule.training_weight(timesteps) if bell_weights else None
    return flow_matching_loss(prediction, x0, timesteps, sigma_floor=sigma_floor, weights=weights)
