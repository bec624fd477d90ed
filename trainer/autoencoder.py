"""Training of the TinyVAE codec: a linear encoder fitted to clips, then a decoder trained on its latents.

The decoder can also see latents that a finished generator has denoised. It then learns to mend the generator's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.attention import BlockMask, teacher_forcing_mask
from model.denoiser import Denoiser
from model.flow_matching import add_noise
from model.prompt_cache import PromptCache
from model.tiny_vae import TinyVAE
from model.tiny_vae_config import TINY_VAE_PRESETS
from trainer.config import Config
from trainer.data import Contents, DataKind, text_source, training_data
from trainer.micro_batch import MicroBatch
from trainer.objectives.codec import decoder_loss, disturb, fit_linear_code, psnr, random_window
from trainer.objectives.diffusion import predict_in_context
from trainer.stored_data import StoredEmbeddings
from trainer.trainer import RunContext, Trainer
from trainer.update import Loss, Updated
from utils.errors import UserError
from utils.shapes import Scene, World, is_shapes_prompt, render_clips


def check_prompt(prompt: str, world: World) -> None:
    """Raise UserError unless a prompt describes a scene of the world."""
    Scene.from_prompt(prompt)  # names what is unknown
    if not is_shapes_prompt(prompt, world):
        raise UserError(f"{prompt!r} is a scene of the rich world: set data.shapes.world=rich, or use another prompt")


LEAST_ERROR = 1e-8  # 86 dB; the logarithm of a smaller error, such as that of a black clip, says nothing


@dataclass(frozen=True)
class LastPass:
    """The generator's last denoising pass over each chunk of a real clip, after the clip's own earlier chunks."""

    generator: Denoiser
    text: PromptCache | StoredEmbeddings
    mask: BlockMask
    """The teacher-forcing mask over twice the frames of a clip."""
    timestep: float

    @torch.no_grad()
    def __call__(self, exact: Tensor, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Noise latents [B f C h w] and denoise them."""
        timesteps = torch.full(exact.shape[:2], self.timestep, device=exact.device)
        noisy, embeds = add_noise(exact, noise, timesteps), self.text.encode(list(prompts))
        return predict_in_context(self.generator, noisy, timesteps, exact, embeds, self.mask).x0.to(exact)


class AutoencoderTrainer(Trainer):
    """Trains the decoder. The encoder is fitted before the first step, or given, and does not change afterwards."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        for prompt in self.sample_prompts:
            check_prompt(prompt, config.data.shapes.world)  # now, not after the training
        torch.manual_seed(config.trainer.seed)
        self.codec = self._first_codec().to(self.device)
        block, side = self.codec.spatial_scale, config.data.shapes.resolution
        if config.data.kind is DataKind.shapes and side % block:
            raise UserError(
                f"data.shapes.resolution={side} is not a multiple of {block}, the side of the codec's blocks"
            )
        self.data = training_data(
            config.data, Contents.clips, seed=self.seed("data"), video=config.video, codec=self.codec
        )
        if config.autoencoder.weights is None:
            fitted = self.data.next(config.autoencoder.fit_clips).frames
            fit_linear_code(fitted, self.codec.config).write_to(self.codec)
        self.last_pass = self._last_pass() if config.autoencoder.denoised_share else None
        self.codec.encoder.requires_grad_(False)
        self.track(codec=self.codec)
        self.updater = self.optimize("codec", self.codec, config.optimizer, config.trainer.steps)

    def _first_codec(self) -> TinyVAE:
        """Return the codec to go on from, or one of the preset's sizes."""
        config = self.config.autoencoder
        if config.weights is not None:
            return TinyVAE.from_pretrained(config.weights).train()
        if config.preset not in TINY_VAE_PRESETS:
            raise UserError(f"autoencoder.preset={config.preset!r} is not one of {', '.join(TINY_VAE_PRESETS)}")
        return TinyVAE(TINY_VAE_PRESETS[config.preset])

    def _last_pass(self) -> LastPass:
        config = self.config
        generator, channels = self.load_frozen(config.generator), self.codec.config.latent_channels
        if generator.transformer.config.in_dim != channels:
            raise UserError(
                f"generator.weights={config.generator.weights} has latents of {generator.transformer.config.in_dim} "
                f"channels, but the codec of {channels}: name the codec that it was trained with in autoencoder.weights"
            )
        return LastPass(
            generator,
            text_source(config.data, config.text_encoder, self.device),
            config.rollout.mask(config.video.num_frames, teacher_forcing_mask),
            generator.schedule.warp(config.rollout.denoising_steps)[-1],
        )

    def updates(self) -> list[Updated]:
        return [self.update(self.updater, self.loss, self.micro_batches())]

    def loss(self, batch: MicroBatch) -> Loss:
        """Return the error between decoded latents and the original pixels."""
        config = self.config.autoencoder
        samples = self.data.read(batch.indices)
        frames = samples.frames
        if config.crop_frames is not None:
            frames = batch.each(lambda clip, g: random_window(clip, config.crop_frames, g), "window", frames)
        frames = frames.to(self.device)
        latents = self.codec.encode(frames)
        if self.last_pass is not None:
            # Also clips that are not chosen: if the generator is sharded, all processes have to make equal passes.
            denoised = self.last_pass(latents, samples.prompts, batch.randn("generator noise", latents))
            drawn = torch.rand(batch.total, generator=batch.generator("denoised"))
            chosen = batch.of(drawn < config.denoised_share).to(self.device)
            latents = torch.where(chosen[:, None, None, None, None], denoised, latents)
        latents = batch.each(lambda latent, g: disturb(latent, config.latent_noise, g), "noise", latents)
        decoded = self.codec.decode(latents, clamp=False)
        errors = decoder_loss(decoded, frames, motion_weight=config.motion_weight)
        # Denoised clips have errors ten times as large. Their logarithms let the exact ones count as much.
        loss = errors.mean() if self.last_pass is None else errors.clamp_min(LEAST_ERROR).log().mean()
        quality = psnr(decoded.detach().clamp(-1, 1), frames)
        return Loss(loss, {"loss": loss.detach(), "psnr": quality})

    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        scenes = [Scene.from_prompt(self.sample_prompts[index]) for index in indices]
        frames = self.codec.num_frames(self.config.video.num_frames)
        clips = render_clips(scenes, frames, torch.Generator().manual_seed(0), self.config.data.shapes)
        return self.codec.decode(self.codec.encode(clips.to(self.device)))

    def export(self, folder: Path) -> None:
        if self.is_main:
            with self.ema.applied():
                self.codec.save_pretrained(folder / "codec")
