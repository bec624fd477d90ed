"""Distillation that also looks at real videos: self-forcing with a GAN term, and CausVid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.discriminator import Discriminator
from trainer.config import Config
from trainer.data import ShapesClips, training_clips
from trainer.objectives.causvid import denoise_chunks, sample_step_timesteps
from trainer.objectives.dmd import GeneratorLoss
from trainer.objectives.gan import gan_discriminator_loss, gan_generator_loss
from trainer.self_forcing import Batch, SelfForcingTrainer
from trainer.trainer import RunContext


class VideoTrainer(SelfForcingTrainer):
    """A :class:`SelfForcingTrainer` whose batches hold real videos of the same prompts."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.clips: ShapesClips = training_clips(config.data, self.generator)

    def next_batch(self) -> Batch:
        frames = self.codec.num_frames(self.config.video.num_frames)
        clips = self.clips.next(self.config.trainer.batch_size, frames)
        return Batch(self.text_encoder.encode(clips.prompts), self.codec.encode(clips.frames.to(self.device)))


class CausVidTrainer(VideoTrainer):
    """DMD on real videos whose chunks are noised independently and denoised in one step, instead of on a rollout."""

    def generate(self, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        config = self.config.rollout
        real, steps = batch.real, config.timesteps(self.denoiser)
        timesteps = sample_step_timesteps(len(real), self.chunks, steps, self.generator)
        with torch.set_grad_enabled(grad_start_frame is not None):
            return denoise_chunks(
                self.denoiser,
                real,
                batch.embeds,
                timesteps=timesteps.to(self.device),
                noise=torch.randn(real.shape, generator=self.noise).to(real),
                block_mask=config.mask(real.shape[1]),
            )


class AdversarialTrainer(VideoTrainer):
    """DMD plus an adversarial term; the discriminator reads the critic's features and is trained with it."""

    def critic(self) -> nn.Module:
        self.discriminator = Discriminator(
            self.fake_score.transformer, self.config.gan.heads, generator=self.stream("heads")
        ).to(self.device)
        return self.discriminator

    def generator_loss(self, video: Tensor, batch: Batch) -> GeneratorLoss:
        matched = super().generator_loss(video, batch)
        adversarial = gan_generator_loss(
            video,
            batch.real,
            self.discriminator,
            batch.embeds,
            **self.score_noise(video),
            kind=self.config.gan.kind,
        )
        return GeneratorLoss(matched.loss + self.config.gan.generator_weight * adversarial.loss, matched.gradient_norm)

    def critic_loss(self, video: Tensor, batch: Batch) -> Tensor:
        gan = self.config.gan
        told_apart = gan_discriminator_loss(
            video,
            batch.real,
            self.discriminator,
            batch.embeds,
            **self.score_noise(video),
            perturbation=torch.randn(video.shape, generator=self.noise).to(video),
            kind=gan.kind,
            perturbation_sigma=gan.perturbation_sigma,
            r1_weight=gan.r1_weight,
            r2_weight=gan.r2_weight,
        )
        return super().critic_loss(video, batch) + gan.discriminator_weight * told_apart.loss

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        return super().checkpoint() | {"discriminator_heads": self.discriminator.heads.state_dict()}
