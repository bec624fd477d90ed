"""Score identity distillation (SiD, arXiv 2404.04057) on self-generated videos (Self Forcing, Section 3.3).

Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from torch import Tensor

from model.denoiser import Denoiser
from model.flow_matching import add_noise
from trainer.objectives.diffusion import frame_mean
from trainer.objectives.dmd import GeneratorLoss, guided_x0
from trainer.objectives.frozen import through_frozen


def sid_loss(
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
    alpha: float = 1.0,
    counted: Tensor | None = None,
) -> GeneratorLoss:
    """Return ``mean((real - fake) ((real - x) - alpha (real - fake)) / mean|x - real|)``.

    ``mean|x - real|`` counts as a constant. Unlike DMD, SiD follows the gradient of the scores: it goes through the
    inputs of both networks to ``x0``, and never to their parameters. With alpha = 1 the numerator is
    ``(real - fake) (fake - x)``.

    Args:
        x0: generated video [B F C H W], with gradient.
        prompt_embeds, negative_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        real_guidance_scale: g of ``c + g (c - u)`` for the real score: 0 is no guidance, 3 is CFG 4 in the usual
            convention.
        fake_guidance_scale: the same g for the fake score.
        alpha: weight of the squared score difference that is subtracted.
        counted: frames [F] bool that the loss is taken over, for example all but a given first one. None takes all.

    Returns:
        loss and gradient norm. Both are not finite if a score is not finite, so that the caller can skip the update.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])

    def loss(x: Tensor) -> Tensor:
        noisy = add_noise(x, noise, timesteps)
        fake = guided_x0(fake_score, noisy, timesteps, prompt_embeds, negative_embeds, fake_guidance_scale).float()
        real = guided_x0(real_score, noisy, timesteps, prompt_embeds, negative_embeds, real_guidance_scale).float()
        scale = (x.float() - real).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        difference = real - fake
        return frame_mean(difference * ((real - x.float()) - alpha * difference) / scale, counted)

    return through_frozen(loss, x0)
