"""Causal consistency distillation: a few-step causal student of a many-step causal teacher (Causal Forcing++)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.attention import teacher_forcing_mask
from model.flow_matching import add_noise
from model.text_encoder import PromptCache
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from trainer.config import Config
from trainer.data import training_clips
from trainer.objectives.consistency import consistency_target, in_context_loss, sample_step_pairs
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer


class ConsistencyTrainer(Trainer):
    """One regression a step to the student's own average, one teacher step further on."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.denoiser = load_denoiser(config.student, device=self.device, generator=self.stream("weights"))
        self.teacher = load_denoiser(config.real_score, device=self.device).requires_grad_(False)
        self.text_encoder = PromptCache(load_text_encoder(config.text_encoder, device=self.device), 4096)
        self.codec = load_codec(config.codec, device=self.device)
        self.clips = training_clips(config.data, self.generator)
        frames = config.video.num_frames
        chunks = self.chunks_of(frames)
        self.chunks = chunks if config.consistency.per_chunk else [(0, frames)]
        self.mask = config.rollout.mask(frames, teacher_forcing_mask)
        self.track(generator=self.denoiser.transformer)
        self.updater = Optimizer(self.denoiser, config.optimizer, config.trainer.steps)

    def train_step(self) -> dict[str, float]:
        config = self.config
        clips = self.clips.next(config.trainer.batch_size, self.codec.num_frames(config.video.num_frames))
        clean = self.codec.encode(clips.frames.to(self.device))
        embeds = self.text_encoder.encode(clips.prompts)
        grid = self.denoiser.schedule.grid(config.consistency.solver_steps)
        pairs = sample_step_pairs(len(clean), self.chunks, grid, self.generator)
        timesteps, following = (drawn.to(self.device) for drawn in pairs)
        noisy = add_noise(clean, torch.randn(clean.shape, generator=self.generator).to(clean), timesteps)
        with self.ema.applied():
            target = consistency_target(
                self.denoiser,
                self.teacher,
                noisy,
                clean,
                embeds,
                self.text_encoder.encode([config.sampling.negative_prompt] * len(embeds)),
                timesteps=timesteps,
                following=following,
                guidance_scale=config.consistency.guidance_scale,
                block_mask=self.mask,
            )
        loss = in_context_loss(self.denoiser, noisy, timesteps, target, clean, embeds, self.mask)
        loss.backward()
        lr = self.updater.lr
        return {"loss": loss.item(), "gradient_norm": self.updater.step(), "lr": lr}

    def sample_frames(self, prompts: list[str]) -> Tensor:
        return self.sample_rollout(self.denoiser, self.text_encoder.encode(prompts), self.codec)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
