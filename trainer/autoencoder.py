"""Training of the TinyVAE codec: a linear encoder fitted to clips, then a decoder trained on its latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.tiny_vae import TINY_VAE_PRESETS, TinyVAE
from trainer.config import Config
from trainer.data import training_clips
from trainer.objectives.codec import decoder_loss, disturb, fit_linear_code, psnr, random_window
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer
from utils.errors import UserError
from utils.shapes import Scene, render_clips


class AutoencoderTrainer(Trainer):
    """Trains the decoder; the encoder is exact from the start."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        preset = config.autoencoder.preset
        if preset not in TINY_VAE_PRESETS:
            raise UserError(f"autoencoder.preset={preset!r} is none of {', '.join(TINY_VAE_PRESETS)}")
        for prompt in self.sample_prompts:
            Scene.from_prompt(prompt)  # refuses a prompt that is not of this world now, not after the training
        torch.manual_seed(config.trainer.seed)
        self.codec = TinyVAE(TINY_VAE_PRESETS[preset]).to(self.device)
        self.num_frames = self.codec.num_frames(config.video.num_frames)
        self.clips = training_clips(config.data, self.generator)
        fitted = self.clips.next(config.autoencoder.fit_clips, self.num_frames).frames
        fit_linear_code(fitted, self.codec.config).write_to(self.codec)
        self.codec.encoder.requires_grad_(False)
        self.track(codec=self.codec)
        self.updater = Optimizer(self.codec, config.optimizer, config.trainer.steps)

    def train_step(self) -> dict[str, float]:
        config = self.config.autoencoder
        clips = self.clips.next(self.config.trainer.batch_size, self.num_frames)
        frames = random_window(clips.frames, config.crop_frames, self.generator).to(self.device)
        latents = disturb(self.codec.encode(frames), config.latent_noise, self.generator)
        decoded = self.codec.decode(latents, clamp=False)
        loss = decoder_loss(decoded, frames, motion_weight=config.motion_weight)
        loss.backward()
        lr = self.updater.lr
        quality = psnr(decoded.detach().clamp(-1, 1), frames).item()
        return {"loss": loss.item(), "psnr": quality, "gradient_norm": self.updater.step(), "lr": lr}

    def sample_frames(self, prompts: list[str]) -> Tensor:
        scenes = [Scene.from_prompt(prompt) for prompt in prompts]
        frames = render_clips(scenes, self.num_frames, torch.Generator().manual_seed(0), self.config.data.shapes)
        return self.codec.decode(self.codec.encode(frames.to(self.device)))

    def export(self, folder: Path) -> None:
        with self.ema.applied():
            self.codec.save_pretrained(folder / "codec")
