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
    """Return ``mean((real - fake) ((real - x) - alpha (real - fake)) / mean|x - real|)``; the divisor is a constant.

    Unlike DMD, SiD follows the gradient of the scores: it goes through the
    inputs of both networks to ``x0``, and never to their parameters.

    Args:
        x0: generated video [B F C H W], with gradient.
        prompt_embeds, negative_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        real_guidance_scale, fake_guidance_scale, counted: see :func:`dmd_loss`.
        alpha: weight of the squared score difference that is subtracted.

    Returns the loss and the gradient norm; both are not finite if a score is not finite.
    """
    told = timesteps.expand(-1, x0.shape[1]), prompt_embeds, negative_embeds

    def loss(x: Tensor) -> Tensor:
        noisy = add_noise(x, noise, told[0])
        fake = guided_x0(fake_score, noisy, *told, fake_guidance_scale).float()
        real = guided_x0(real_score, noisy, *told, real_guidance_scale).float()
        scale = (x.float() - real).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        difference = real - fake
        return frame_mean(difference * ((real - x.float()) - alpha * difference) / scale, counted)

    return through_frozen(loss, x0)
