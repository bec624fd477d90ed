"""Training of many-step denoisers on real videos: bidirectional teacher, diffusion forcing, teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.attention import BlockMask, block_causal_mask, teacher_forcing_mask
from model.flow_matching import FlowMatching
from model.prompt_cache import PromptCache
from model.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from pipeline.loading import load_codec, load_text_encoder
from pipeline.sampling import sample
from trainer.config import Config, Forcing
from trainer.data import Contents, text_source, training_data
from trainer.micro_batch import MicroBatch
from trainer.objectives.diffusion import forcing_loss, sample_timesteps
from trainer.stored_data import StoredEmbeddings
from trainer.trainer import RunContext, Trainer
from trainer.update import Loss, Updated
from utils.errors import UserError
from utils.shapes import all_scenes


class DiffusionTrainer(Trainer):
    """Makes one flow-matching update a step on real clips."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.codec = load_codec(config.codec, device=self.device)
        self.denoiser = self.load_trained(config.generator)
        self.text_encoder = self._text_encoder()
        self.data = training_data(
            config.data, Contents.clips, seed=self.seed("data"), video=config.video, codec=self.codec
        )
        self.chunks = self._chunks()
        self.mask = self._mask()
        self.levels = FlowMatching(config.diffusion.timestep_shift or config.generator.shift)
        modules = {"generator": self.denoiser.transformer}
        if config.diffusion.train_text_encoder:
            modules["text_encoder"] = self.text_encoder
        self.track(**modules)
        self.updater = self.optimize("generator", nn.ModuleDict(modules), config.optimizer, config.trainer.steps)

    def updates(self) -> list[Updated]:
        return [self.update(self.updater, self.loss, self.micro_batches())]

    def loss(self, batch: MicroBatch) -> Loss:
        """Return the flow matching loss of the clips of a micro-batch."""
        config = self.config
        samples = self.data.read(batch.indices)
        x0 = samples.encode(self.codec, self.device)
        timesteps = sample_timesteps(batch.total, self.chunks, self.levels, batch.generator("timesteps"))
        loss = forcing_loss(
            self.denoiser,
            x0,
            self.text_encoder.encode(self._drop(samples.prompts, batch)),
            timesteps=batch.of(timesteps).to(self.device),
            noise=batch.randn("noise", x0),
            block_mask=self.mask,
            teacher_forcing=config.diffusion.forcing is Forcing.teacher_forcing,
            context_timesteps=self._context_timesteps(batch),
            sigma_floor=config.diffusion.sigma_floor,
            bell_weights=config.diffusion.bell_weights,
        )
        return Loss(loss, {"loss": loss.detach()})

    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        embeds = self.sample_embeds(self.text_encoder, indices)
        if self.config.diffusion.forcing is not Forcing.bidirectional:
            return self.sample_rollout(indices, self.denoiser, embeds, self.codec)
        negative = self.text_encoder.encode([self.config.sampling.negative_prompt] * len(indices))
        noise = self.sample_noise(indices, self.config.video.latent_shape(self.codec))
        return self.codec.decode(sample(self.denoiser, noise, embeds, negative, self.config.sampling))

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
        if self.config.diffusion.train_text_encoder and self.is_main:
            with self.ema.applied():
                self.text_encoder.save_pretrained(folder / "text_encoder")

    def _text_encoder(self) -> TextEncoder | PromptCache | StoredEmbeddings:
        config = self.config
        if not config.diffusion.train_text_encoder:
            return text_source(config.data, config.text_encoder, self.device)
        if config.data.embeddings is not None:
            raise UserError(
                f"data.embeddings={config.data.embeddings}: stored embeddings do not work with a training encoder; "
                "set diffusion.train_text_encoder=false or data.embeddings=null"
            )
        if config.text_encoder.weights is not None:
            return load_text_encoder(config.text_encoder, device=self.device).requires_grad_(True)
        sizes = self.denoiser.transformer.config
        encoder = build_text_encoder(
            [scene.prompt for scene in all_scenes(self.config.data.shapes.world)],
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

    def _context_timesteps(self, batch: MicroBatch) -> Tensor | None:
        """Return the timesteps [B F] of the context in teacher forcing. None: the context is clean."""
        highest = self.config.diffusion.noise_augmentation_max_timestep
        if highest == 0:
            return None
        generator = batch.generator("context timesteps")
        drawn = sample_timesteps(batch.total, self.chunks, self.levels, generator, highest=highest)
        return batch.of(drawn).to(self.device)

    def _drop(self, prompts: list[str], batch: MicroBatch) -> list[str]:
        drawn = torch.rand(batch.total, generator=batch.generator("guidance dropout"))
        dropped = batch.of(drawn < self.config.diffusion.guidance_dropout)
        return [
            self.config.sampling.negative_prompt if drop else prompt
            for prompt, drop in zip(prompts, dropped.tolist(), strict=True)
        ]
