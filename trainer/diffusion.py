"""Training of many-step denoisers on real videos: bidirectional teacher, diffusion forcing, teacher forcing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.attention import BlockMask, block_causal_mask, teacher_forcing_mask
from model.flow_matching import FlowMatching
from model.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from pipeline.sampling import sample
from trainer.config import Config, Forcing
from trainer.data import training_clips
from trainer.objectives.diffusion import forcing_loss, sample_timesteps
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer
from utils.shapes import all_scenes


class DiffusionTrainer(Trainer):
    """One flow-matching update a step on rendered clips."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.codec = load_codec(config.codec, device=self.device)
        self.denoiser = load_denoiser(config.generator, device=self.device, generator=self.stream("weights"))
        self.text_encoder = self._text_encoder()
        self.clips = training_clips(config.data, self.generator)
        self.chunks = self._chunks()
        self.mask = self._mask()
        self.levels = FlowMatching(config.diffusion.timestep_shift or config.generator.shift)
        modules = {"generator": self.denoiser.transformer}
        if config.diffusion.train_text_encoder:
            modules["text_encoder"] = self.text_encoder
        self.track(**modules)
        self.updater = Optimizer(self.trained, config.optimizer, config.trainer.steps)

    def train_step(self) -> dict[str, float]:
        config = self.config
        clips = self.clips.next(config.trainer.batch_size, self.codec.num_frames(config.video.num_frames))
        x0 = self.codec.encode(clips.frames.to(self.device))
        timesteps = sample_timesteps(x0.shape[0], self.chunks, self.levels, self.generator)
        loss = forcing_loss(
            self.denoiser,
            x0,
            self.text_encoder.encode(self._drop(clips.prompts)),
            timesteps=timesteps.to(self.device),
            noise=torch.randn(x0.shape, generator=self.generator).to(x0),
            block_mask=self.mask,
            teacher_forcing=config.diffusion.forcing is Forcing.teacher_forcing,
            sigma_floor=config.diffusion.sigma_floor,
            bell_weights=config.diffusion.bell_weights,
        )
        loss.backward()
        lr = self.updater.lr
        return {"loss": loss.item(), "gradient_norm": self.updater.step(), "lr": lr}

    def sample_frames(self, prompts: list[str]) -> Tensor:
        embeds = self.text_encoder.encode(prompts)
        if self.config.diffusion.forcing is not Forcing.bidirectional:
            return self.sample_rollout(self.denoiser, embeds, self.codec)
        negative = self.text_encoder.encode([self.config.sampling.negative_prompt] * len(prompts))
        shape = (len(prompts), *self.config.video.latent_shape(self.codec))
        noise = torch.randn(shape, generator=self.stream("samples")).to(self.device)
        return self.codec.decode(sample(self.denoiser, noise, embeds, negative, self.config.sampling))

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
        if self.config.diffusion.train_text_encoder:
            with self.ema.applied():
                self.text_encoder.save_pretrained(folder / "text_encoder")

    def _text_encoder(self) -> TextEncoder:
        config = self.config
        if config.text_encoder.weights is not None:
            encoder = load_text_encoder(config.text_encoder, device=self.device)
            return encoder.requires_grad_(config.diffusion.train_text_encoder)
        sizes = self.denoiser.transformer.config
        encoder = build_text_encoder(
            [scene.prompt for scene in all_scenes()],
            TextEncoderConfig(dim=sizes.text_dim, text_len=sizes.text_len),
            seed=config.trainer.seed,
        )
        return encoder.to(self.device)

    def _chunks(self) -> list[tuple[int, int]]:
        frames = self.config.video.num_frames
        if self.config.diffusion.forcing is Forcing.bidirectional:
            return [(0, frames)]
        return self.chunks_of(frames)

    def _mask(self) -> BlockMask | None:
        forcing = self.config.diffusion.forcing
        if forcing is Forcing.bidirectional:
            return None
        build = teacher_forcing_mask if forcing is Forcing.teacher_forcing else block_causal_mask
        return self.config.rollout.mask(self.config.video.num_frames, build)

    def _drop(self, prompts: list[str]) -> list[str]:
        dropped = torch.rand(len(prompts), generator=self.generator) < self.config.diffusion.guidance_dropout
        return [
            self.config.sampling.negative_prompt if drop else prompt
            for prompt, drop in zip(prompts, dropped.tolist(), strict=True)
        ]
