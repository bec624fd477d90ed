"""Self-forcing training: roll out as at inference, score whole videos, follow the distribution-matching gradient."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.text_encoder import PromptCache
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.rollout import rollout
from trainer.config import Config
from trainer.data import training_prompts
from trainer.objectives.dmd import critic_loss, dmd_loss, sample_score_timesteps
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer


class SelfForcingTrainer(Trainer):
    """One generator update and several critic updates a step (Self Forcing, Algorithm 1, with DMD)."""

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
        self.replay: deque[tuple[Tensor, Tensor]] = deque(maxlen=max(1, config.dmd.replay_rollouts))
        self.track(generator=self.denoiser.transformer)
        steps = config.trainer.steps
        self.updater = Optimizer(self.denoiser, config.optimizer, steps)
        self.critic_updater = Optimizer(self.fake_score, config.critic_optimizer, steps * config.dmd.critic_updates)

    def train_step(self) -> dict[str, float]:
        metrics = self.update_generator()
        losses = [self.update_critic(fresh=index == 0) for index in range(self.config.dmd.critic_updates)]
        return metrics | {"critic_loss": sum(losses) / len(losses)}

    def update_generator(self) -> dict[str, float]:
        """One self-forcing rollout with gradient and one step along the distribution-matching gradient."""
        embeds = self.embed_prompts()
        video = self.generate(embeds, grad_start_frame=self.config.dmd.grad_start_frame)
        negative = self.text_encoder.encode([self.config.sampling.negative_prompt] * len(embeds))
        loss, gradient_norm = dmd_loss(
            video,
            self.real_score,
            self.fake_score,
            embeds,
            negative,
            **self.score_noise(video),
            real_guidance_scale=self.config.dmd.real_guidance_scale,
        )
        loss.backward()
        self.replay.append((video.detach(), embeds))
        return {
            "generator_loss": loss.item(),
            "dmd_gradient": gradient_norm.item(),
            "gradient_norm": self.updater.step(),
        }

    def update_critic(self, *, fresh: bool) -> float:
        """One flow-matching step of the fake score on generated videos; ``fresh`` takes the newest replayed ones."""
        if self.config.dmd.replay_rollouts == 0:
            embeds = self.embed_prompts()
            video = self.generate(embeds, grad_start_frame=None)
        else:
            index = -1 if fresh else int(torch.randint(len(self.replay), (), generator=self.generator))
            video, embeds = self.replay[index]
        loss = critic_loss(
            video,
            self.fake_score,
            embeds,
            **self.score_noise(video),
            sigma_floor=self.config.dmd.sigma_floor,
        )
        loss.backward()
        self.critic_updater.step()
        return loss.item()

    def generate(self, embeds: Tensor, *, grad_start_frame: int | None) -> Tensor:
        """Roll out whole videos [B F C H W]; every chunk stops at one random step."""
        config = self.config.rollout
        shape = (len(embeds), *self.config.video.latent_shape(self.codec))
        noise = torch.randn(shape, generator=self.noise).to(self.device)
        exit_step = int(torch.randint(len(config.denoising_steps), (), generator=self.generator))
        cache = KVCache(self.denoiser.transformer.config.num_layers, append_only=True)
        blocks = rollout(
            self.denoiser,
            noise,
            embeds,
            cache,
            config,
            exit_steps=[exit_step] * len(self.chunks),
            grad_start_frame=grad_start_frame,
            generator=self.noise,
        )
        return torch.cat([block.latents for block in blocks], dim=1)

    def embed_prompts(self) -> Tensor:
        """Embeddings [B L E] of the next training prompts."""
        return self.text_encoder.encode(self.prompts.next(self.config.trainer.batch_size))

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
