"""Causal consistency distillation (Causal Forcing++): a few-step student learns from a many-step causal teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from model.attention import teacher_forcing_mask
from model.flow_matching import add_noise
from pipeline.loading import load_codec
from trainer.config import Config
from trainer.data import Contents, text_source, training_data
from trainer.micro_batch import MicroBatch
from trainer.objectives.consistency import consistency_target, in_context_loss, sample_step_pairs
from trainer.trainer import RunContext, Trainer
from trainer.update import Loss, Updated


class ConsistencyTrainer(Trainer):
    """Makes one regression update a step. The target is the student's average, one teacher step further."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.denoiser = self.load_trained(config.student)
        self.teacher = self.load_frozen(config.real_score)
        self.text_encoder = text_source(config.data, config.text_encoder, self.device)
        self.codec = load_codec(config.codec, device=self.device)
        self.data = training_data(
            config.data, Contents.clips, seed=self.seed("data"), video=config.video, codec=self.codec
        )
        frames = config.video.num_frames
        chunks = self.chunks_of(frames)
        self.chunks = chunks if config.consistency.per_chunk else [(0, frames)]
        self.mask = config.rollout.mask(frames, teacher_forcing_mask)
        self.track(generator=self.denoiser.transformer)
        self.updater = self.optimize("generator", self.denoiser, config.optimizer, config.trainer.steps)

    def updates(self) -> list[Updated]:
        return [self.update(self.updater, self.loss, self.micro_batches())]

    def loss(self, batch: MicroBatch) -> Loss:
        """Return the distance to the prediction of the average one step further."""
        config = self.config
        samples = self.data.read(batch.indices)
        clean = samples.encode(self.codec, self.device)
        embeds = self.text_encoder.encode(samples.prompts)
        grid = self.denoiser.schedule.grid(config.consistency.solver_steps)
        pairs = sample_step_pairs(batch.total, self.chunks, grid, batch.generator("timesteps"))
        timesteps, following = (batch.of(drawn).to(self.device) for drawn in pairs)
        noisy = add_noise(clean, batch.randn("noise", clean), timesteps)
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
        return Loss(loss, {"loss": loss.detach()})

    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        embeds = self.sample_embeds(self.text_encoder, indices)
        return self.sample_rollout(indices, self.denoiser, embeds, self.codec)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
