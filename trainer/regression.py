"""Regression to the ODE trajectories of a teacher: an objective that makes a causal student, and a term beside DMD.

Trajectories of a bidirectional teacher train whole clips with one timestep a chunk (CausVid). Trajectories of a causal
teacher are stored with the clean clips that were their context; they train every chunk given the clean chunks before
it, at one timestep for all (Causal Forcing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.attention import teacher_forcing_mask
from model.denoiser import Denoiser
from model.prompt_cache import PromptCache
from pipeline.loading import load_codec
from trainer.config import Config
from trainer.data import TrainingOrder, text_source
from trainer.micro_batch import MicroBatch
from trainer.objectives.consistency import in_context_loss
from trainer.objectives.ode import ode_regression_loss, pick_states
from trainer.stored_data import ODEData, StoredEmbeddings
from trainer.trainer import RunContext, Trainer
from trainer.update import Loss, Updated
from utils.errors import UserError


class PairRegression:
    """The regression loss on stored trajectories. The indices of a micro-batch choose the trajectories.

    A state at timestep 0 carries no loss. CausVid draws it too, Causal Forcing does not.

    Raises:
        UserError: there are no trajectories, or they do not fill whole chunks.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.pairs = ODEData(config.ode.pairs)
        self.data = TrainingOrder(self.pairs, seed)
        frames = self.pairs.num_frames
        try:
            chunks = config.rollout.chunks(frames)
        except ValueError as error:
            raise UserError(f"ode.pairs={config.ode.pairs}: {error}") from None
        self.chunks = [(0, frames)] if self.pairs.causal else chunks
        self.mask = (
            config.rollout.mask(frames, teacher_forcing_mask) if self.pairs.causal else config.rollout.mask(frames)
        )

    def loss(self, denoiser: Denoiser, batch: MicroBatch, text: PromptCache | StoredEmbeddings) -> Tensor:
        """Return the error of the predicted endpoints, given one noisy state of each chunk."""
        samples = self.data.read(batch.indices)
        frames = torch.arange(self.pairs.num_frames)
        drawn = self.pairs.timesteps[:-1] if self.pairs.causal else self.pairs.timesteps
        numbers = torch.arange(len(drawn))[None, :, None].expand(batch.total, -1, len(frames))
        chosen, timesteps = pick_states(numbers, drawn, self.chunks, batch.generator("states"))
        noisy = samples.states[torch.arange(batch.size)[:, None], batch.of(chosen), frames]
        embeds = text.encode(samples.prompts)
        noisy, told, target = (x.to(embeds.device) for x in (noisy, batch.of(timesteps), samples.states[:, -1]))
        if self.pairs.causal:
            clean = samples.latents.to(embeds.device)
            loss = in_context_loss(denoiser, noisy, told, target, clean, embeds, self.mask)
        else:
            loss = ode_regression_loss(denoiser, noisy, told, target, embeds, self.mask)
        return batch.weight(timesteps != 0) * loss


class RegressionTrainer(Trainer):
    """Makes one regression update a step on stored trajectories."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.regression = PairRegression(config, self.seed("data"))
        self.data = self.regression.data
        self.denoiser = self.load_trained(config.generator)
        self.text_encoder = text_source(config.data, config.text_encoder, self.device)
        self.codec = load_codec(config.codec, device=self.device)
        self.track(generator=self.denoiser.transformer)
        self.updater = self.optimize("generator", self.denoiser, config.optimizer, config.trainer.steps)

    def updates(self) -> list[Updated]:
        return [self.update(self.updater, self.loss, self.micro_batches())]

    def loss(self, batch: MicroBatch) -> Loss:
        """Return the regression loss of a micro-batch."""
        loss = self.regression.loss(self.denoiser, batch, self.text_encoder)
        return Loss(loss, {"loss": loss.detach()})

    def sample_frames(self, indices: Sequence[int]) -> Tensor:
        embeds = self.sample_embeds(self.text_encoder, indices)
        return self.sample_rollout(indices, self.denoiser, embeds, self.codec)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
