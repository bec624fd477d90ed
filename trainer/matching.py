"""The losses of generator and critic on generated videos: distribution matching, a GAN, a regression.

Each part computes one term of a loss. A method is a sum of such terms (see :data:`trainer.self_forcing.METHODS`).
Shapes: B batch, F latent frames, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.denoiser import Denoiser
from model.discriminator import Discriminator
from model.prompt_cache import PromptCache
from trainer.config import Config
from trainer.generation import Batch, Video
from trainer.micro_batch import MicroBatch
from trainer.objectives.dmd import critic_loss, dmd_loss, sample_score_timesteps
from trainer.objectives.gan import gan_discriminator_loss, gan_generator_loss
from trainer.objectives.long import later_frames
from trainer.objectives.sid import sid_loss
from trainer.regression import PairRegression
from trainer.stored_data import StoredEmbeddings


class Term(NamedTuple):
    """One term of a loss."""

    loss: Tensor
    """A weighted scalar with gradient."""
    metrics: dict[str, Tensor]
    """Detached scalars to log."""


class LossTerm(Protocol):
    """Computes one term of the loss of generated videos."""

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        """Return the term for the videos of a micro-batch."""
        ...


@dataclass(frozen=True)
class Networks:
    """The networks and settings that the terms use."""

    config: Config
    denoiser: Denoiser
    fake_score: Denoiser
    real_score: Denoiser | None
    """None for a method that has no teacher."""
    discriminator: Discriminator | None
    """None for a method without a GAN."""
    text: PromptCache | StoredEmbeddings
    device: torch.device
    seed: Callable[[str], int]
    """Makes a seed for a purpose, the same on every process."""

    def score_noise(self, micro_batch: MicroBatch, purpose: str, video: Video) -> dict[str, Tensor]:
        """Draw a noise level for each video [B 1] and the noise [B F C H W]. Every loss takes these arguments."""
        dmd = self.config.dmd
        drawn = sample_score_timesteps(
            micro_batch.total,
            self.denoiser.schedule,
            micro_batch.generator(f"{purpose} timesteps"),
            lowest=max(dmd.min_timestep, video.facts.next_level if dmd.ts_schedule else 0.0),
            highest=video.facts.exit_level if dmd.ts_schedule_max else 1000.0,
        )
        return {
            "timesteps": micro_batch.of(drawn).to(self.device),
            "noise": micro_batch.randn(f"{purpose} noise", video.latents),
        }


def counted(video: Video, uncounted: int) -> Tensor | None:
    """Return which frames count in a loss, [F] bool. None: all of them."""
    return later_frames(video.latents.shape[1], video.latents.device, uncounted=uncounted) if uncounted else None


class DistributionMatching:
    """The generator's loss by DMD or SiD."""

    def __init__(self, networks: Networks, *, sid: bool = False) -> None:
        self.networks = networks
        self.match = partial(sid_loss, alpha=networks.config.sid.alpha) if sid else dmd_loss

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        networks, config = self.networks, self.networks.config
        loss, gradient = self.match(
            video.latents,
            networks.real_score,
            networks.fake_score,
            batch.embeds,
            networks.text.encode([config.sampling.negative_prompt] * len(batch.embeds)),
            **networks.score_noise(micro_batch, "score", video),
            real_guidance_scale=config.dmd.real_guidance_scale,
            fake_guidance_scale=config.dmd.fake_guidance_scale,
            counted=counted(video, video.facts.uncounted),
        )
        return Term(loss, {"score_gradient": gradient})


class AdversarialMatching:
    """The generator's loss by a discriminator, weighted with ``gan.generator_weight``."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        gan = self.networks.config.gan
        loss, gradient = gan_generator_loss(
            video.latents,
            batch.real,
            self.networks.discriminator,
            batch.embeds,
            **self.networks.score_noise(micro_batch, "adversarial", video),
            kind=gan.kind,
        )
        return Term(
            gan.generator_weight * loss, {"adversarial_loss": loss.detach(), "adversarial_gradient": gradient.detach()}
        )


class TrajectoryRegression:
    """A regression to stored trajectories, weighted with ``dmd.regression_weight``. It does not use the videos."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self.regression = PairRegression(networks.config, networks.seed("regression"))

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        loss = self.regression.loss(self.networks.denoiser, micro_batch, self.networks.text)
        return Term(self.networks.config.dmd.regression_weight * loss, {"regression_loss": loss.detach()})


class CriticDenoising:
    """The critic's loss: flow matching of the fake score on generated videos."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        loss = critic_loss(
            video.latents,
            self.networks.fake_score,
            batch.embeds,
            **self.networks.score_noise(micro_batch, "critic", video),
            sigma_floor=self.networks.config.dmd.sigma_floor,
            counted=counted(video, video.facts.uncounted_by_critic),
        )
        return Term(loss, {})


class Discrimination:
    """The discriminator's loss: ``discriminator_weight`` times the logit loss, plus half of both penalties."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def __call__(self, micro_batch: MicroBatch, video: Video, batch: Batch) -> Term:
        gan = self.networks.config.gan
        told = gan_discriminator_loss(
            video.latents,
            batch.real,
            self.networks.discriminator,
            batch.embeds,
            **self.networks.score_noise(micro_batch, "discriminator", video),
            perturbation=micro_batch.randn("perturbation", video.latents),
            kind=gan.kind,
            perturbation_sigma=gan.perturbation_sigma,
            logit_weight=gan.discriminator_weight,
            r1_weight=gan.r1_weight / 2,
            r2_weight=gan.r2_weight / 2,
        )
        metrics = {"real_logit": told.real_logit, "fake_logit": told.fake_logit, "penalty": told.penalty}
        return Term(told.loss, metrics | {"discriminator_loss": told.loss.detach()})


def discriminator_on(
    fake_score: Denoiser, config: Config, generator: torch.Generator, device: torch.device
) -> Discriminator:
    """Build a discriminator that reads the features of the fake score, and shares its weights."""
    discriminator = Discriminator(fake_score.transformer, config.gan.heads, generator=generator)
    discriminator.heads.to(device)
    return discriminator


def critic_module(networks: Networks) -> nn.Module:
    """Return the module that the critic's optimizer trains: the fake score, and any heads of the discriminator."""
    return networks.fake_score if networks.discriminator is None else networks.discriminator
