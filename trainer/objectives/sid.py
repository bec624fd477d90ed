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
    alpha: float = 1.0,
    counted: Tensor | None = None,
) -> GeneratorLoss:
    """``mean((real - fake) ((real - x) - alpha (real - fake)) / mean|x - real|)``, the mean of |x - real| a constant.

    Unlike DMD it follows the gradient of the scores: through both networks' inputs to ``x0``, never to their
    parameters. With alpha = 1 the numerator is ``(real - fake) (fake - x)``.

    Args:
        x0: generated video [B F C H W], with gradient.
        prompt_embeds, negative_embeds: [B L E].
        timesteps: [B 1], one noise level a video.
        noise: [B F C H W].
        real_guidance_scale: g of ``c + g (c - u)``: 0 is no guidance, 3 is CFG 4 in the usual convention.
        alpha: weight of the squared score difference that is taken off.
        counted: frames [F] bool the loss is taken over, such as all but a given first one; None takes all.

    Returns:
        loss and gradient norm; both are non-finite where a score is, so that the caller can skip the step.
    """
    timesteps = timesteps.expand(-1, x0.shape[1])

    def loss(x: Tensor) -> Tensor:
        noisy = add_noise(x, noise, timesteps)
        fake = fake_score(noisy, timesteps, prompt_embeds).x0.float()
        real = guided_x0(real_score, noisy, timesteps, prompt_embeds, negative_embeds, real_guidance_scale).float()
        scale = (x.float() - real).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        difference = real - fake
        return frame_mean(difference * ((real - x.float()) - alpha * difference) / scale, counted)

    return through_frozen(loss, x0)
