"""Distillation that also looks at real videos: self-forcing with a GAN term, and CausVid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.discriminator import Discriminator
from trainer.data import Contents
from trainer.micro_batch import MicroBatch
from trainer.objectives.causvid import denoise_chunks, sample_step_timesteps
from trainer.objectives.dmd import GeneratorLoss
from trainer.objectives.gan import gan_discriminator_loss, gan_generator_loss
from trainer.self_forcing import Batch, SelfForcingTrainer


class VideoTrainer(SelfForcingTrainer):
    """A :class:`SelfForcingTrainer` whose batches hold real videos of the same prompts."""

    contents = Contents.clips

    def batch(self, micro_batch: MicroBatch) -> Batch:
        samples = self.data.read(micro_batch.indices)
        return Batch(self.text_encoder.encode(samples.prompts), samples.encode(self.codec, self.device))


class CausVidTrainer(VideoTrainer):
    """DMD on real videos whose chunks are noised independently and denoised in one step, instead of on a rollout."""

    def generate(self, micro_batch: MicroBatch, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        config = self.config.rollout
        steps = config.timesteps(self.denoiser)
        timesteps = sample_step_timesteps(micro_batch.total, self.chunks, steps, micro_batch.generator("steps"))
        with torch.set_grad_enabled(grad_start_frame is not None):
            return denoise_chunks(
                self.denoiser,
                batch.real,
                batch.embeds,
                timesteps=micro_batch.of(timesteps).to(self.device),
                noise=micro_batch.randn("start noise", batch.real),
                block_mask=config.mask(batch.real.shape[1]),
            )


class AdversarialTrainer(VideoTrainer):
    """DMD plus an adversarial term; the discriminator reads the critic's features and is trained with it."""

    def critic(self) -> nn.Module:
        transformer = self.fake_score.transformer
        self.discriminator = Discriminator(transformer, self.config.gan.heads, generator=self.stream("heads"))
        self.discriminator.heads.to(self.device)
        self.keep(discriminator_heads=self.discriminator.heads)
        return self.discriminator

    def generator_loss(self, micro_batch: MicroBatch, video: Tensor, batch: Batch) -> GeneratorLoss:
        matched = super().generator_loss(micro_batch, video, batch)
        adversarial = gan_generator_loss(
            video,
            batch.real,
            self.discriminator,
            batch.embeds,
            **self.score_noise(micro_batch, "adversarial", video),
            kind=self.config.gan.kind,
        )
        return GeneratorLoss(matched.loss + self.config.gan.generator_weight * adversarial.loss, matched.gradient_norm)

    def critic_loss(self, micro_batch: MicroBatch, video: Tensor, batch: Batch) -> Tensor:
        gan = self.config.gan
        told_apart = gan_discriminator_loss(
            video,
            batch.real,
            self.discriminator,
            batch.embeds,
            **self.score_noise(micro_batch, "discriminator", video),
            perturbation=micro_batch.randn("perturbation", video),
            kind=gan.kind,
            perturbation_sigma=gan.perturbation_sigma,
            r1_weight=gan.r1_weight,
            r2_weight=gan.r2_weight,
        )
        return super().critic_loss(micro_batch, video, batch) + gan.discriminator_weight * told_apart.loss
