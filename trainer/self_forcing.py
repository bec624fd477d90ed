"""Self-forcing training: roll out as at inference, score whole videos, follow the distribution-matching gradient."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.kv_cache import KVCache
from model.text_encoder import PromptCache
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.rollout import rollout
from trainer.config import Config, Objective
from trainer.data import training_prompts
from trainer.objectives.dmd import GeneratorLoss, critic_loss, dmd_loss, sample_score_timesteps
from trainer.objectives.sid import sid_loss
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer


class Batch(NamedTuple):
    """What one update is about."""

    embeds: Tensor
    """Prompt embeddings [B L E]."""
    real: Tensor | None
    """Latents of real videos of these prompts [B F C H W], for objectives that look at any."""


class SelfForcingTrainer(Trainer):
    """One generator update and several critic updates a step (Self Forcing, Algorithm 1), with DMD or SiD."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.denoiser = load_denoiser(config.student, device=self.device, generator=self.stream("weights"))
        self.real_score = load_denoiser(config.real_score, device=self.device).requires_grad_(False)
        self.fake_score = load_denoiser(config.real_score, device=self.device)
        self.text_encoder = PromptCache(load_text_encoder(config.text_encoder, device=self.device), 4096)
        self.codec = load_codec(config.codec, device=self.device)
        self.prompts = training_prompts(config.data, self.generator)
        self.noise = self.stream("noise")
        self.chunks = self.chunks_of(config.video.num_frames)
        self.replay: deque[tuple[Tensor, Batch]] = deque(maxlen=max(1, config.dmd.replay_rollouts))
        self.track(generator=self.denoiser.transformer)
        steps = config.trainer.steps
        self.updater = Optimizer(self.denoiser, config.optimizer, steps)
        self.critic_updater = Optimizer(self.critic(), config.critic_optimizer, steps * config.dmd.critic_updates)

    def next_batch(self) -> Batch:
        """The next prompts."""
        return Batch(self.text_encoder.encode(self.prompts.next(self.config.trainer.batch_size)), None)

    def critic(self) -> nn.Module:
        """What the critic's optimizer trains."""
        return self.fake_score

    def train_step(self) -> dict[str, float]:
        leads = self.step < self.config.dmd.critic_head_start
        metrics = self.keep_rollout() if leads else self.update_generator()
        losses = [self.update_critic(fresh=index == 0) for index in range(self.config.dmd.critic_updates)]
        return metrics | {"critic_loss": sum(losses) / len(losses)}

    def update_generator(self) -> dict[str, float]:
        """One rollout with gradient, scored as a whole, and one step."""
        batch = self.next_batch()
        video = self.generate(batch, grad_start_frame=self.config.dmd.grad_start_frame)
        loss, score_gradient = self.generator_loss(video, batch)
        loss.backward()
        self.replay.append((video.detach(), batch))
        return {
            "generator_loss": loss.item(),
            "score_gradient": score_gradient.item(),
            "gradient_norm": self.updater.step(),
        }

    def keep_rollout(self) -> dict[str, float]:
        """A rollout for the critic alone."""
        batch = self.next_batch()
        self.replay.append((self.generate(batch, grad_start_frame=None), batch))
        return {}

    def generator_loss(self, video: Tensor, batch: Batch) -> GeneratorLoss:
        """Distribution matching of generated videos [B F C H W]."""
        config = self.config
        match = dmd_loss
        if config.objective is Objective.self_forcing_sid:
            match = partial(sid_loss, alpha=config.sid.alpha)
        negative = self.text_encoder.encode([config.sampling.negative_prompt] * len(batch.embeds))
        return match(
            video,
            self.real_score,
            self.fake_score,
            batch.embeds,
            negative,
            **self.score_noise(video),
            real_guidance_scale=config.dmd.real_guidance_scale,
        )

    def update_critic(self, *, fresh: bool) -> float:
        """One critic step on generated videos; ``fresh`` takes the newest replayed ones."""
        if self.config.dmd.replay_rollouts == 0:
            batch = self.next_batch()
            video = self.generate(batch, grad_start_frame=None)
        else:
            index = -1 if fresh else int(torch.randint(len(self.replay), (), generator=self.generator))
            video, batch = self.replay[index]
        loss = self.critic_loss(video, batch)
        loss.backward()
        self.critic_updater.step()
        return loss.item()

    def critic_loss(self, video: Tensor, batch: Batch) -> Tensor:
        """Flow matching of the fake score on generated videos [B F C H W]."""
        return critic_loss(
            video,
            self.fake_score,
            batch.embeds,
            **self.score_noise(video),
            sigma_floor=self.config.dmd.sigma_floor,
        )

    def generate(self, batch: Batch, *, grad_start_frame: int | None) -> Tensor:
        """Roll out whole videos [B F C H W]; every chunk stops at one random step."""
        config = self.config.rollout
        shape = (len(batch.embeds), *self.config.video.latent_shape(self.codec))
        noise = torch.randn(shape, generator=self.noise).to(self.device)
        exit_step = int(torch.randint(len(config.denoising_steps), (), generator=self.generator))
        cache = KVCache(self.denoiser.transformer.config.num_layers, append_only=True)
        blocks = rollout(
            self.denoiser,
            noise,
            batch.embeds,
            cache,
            config,
            exit_steps=[exit_step] * len(self.chunks),
            grad_start_frame=grad_start_frame,
            generator=self.noise,
        )
        return torch.cat([block.latents for block in blocks], dim=1)

    def score_noise(self, video: Tensor) -> dict[str, Tensor]:
        """A noise level a video and the noise, for either loss."""
        timesteps = sample_score_timesteps(video.shape[0], self.denoiser.schedule, self.generator)
        noise = torch.randn(video.shape, generator=self.noise)
        return {"timesteps": timesteps.to(self.device), "noise": noise.to(video)}

    def sample_frames(self, prompts: list[str]) -> Tensor:
        return self.sample_rollout(self.denoiser, self.text_encoder.encode(prompts), self.codec)

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        return super().checkpoint() | {"critic": self.fake_score.transformer.state_dict()}

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
