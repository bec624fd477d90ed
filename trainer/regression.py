"""ODE regression: initialise a causal few-step student from trajectories of a bidirectional teacher."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model.text_encoder import PromptCache
from pipeline.loading import load_codec, load_denoiser, load_text_encoder
from trainer.config import Config
from trainer.data import Deck, read_ode_pairs
from trainer.objectives.ode import ode_regression_loss, pick_states
from trainer.optimizer import Optimizer
from trainer.trainer import RunContext, Trainer


class RegressionTrainer(Trainer):
    """One regression update a step on stored trajectories."""

    def __init__(self, config: Config, context: RunContext) -> None:
        super().__init__(config, context)
        self.pairs = read_ode_pairs(config.ode.pairs)
        self.denoiser = load_denoiser(config.generator, device=self.device, generator=self.stream("weights"))
        self.text_encoder = PromptCache(load_text_encoder(config.text_encoder, device=self.device), 4096)
        self.codec = load_codec(config.codec, device=self.device)
        self.deck = Deck(list(range(len(self.pairs.prompts))), self.generator)
        frames = self.pairs.trajectories.shape[2]
        self.chunks = self.chunks_of(frames)
        self.mask = config.rollout.mask(frames)
        self.track(generator=self.denoiser.transformer)
        self.updater = Optimizer(self.denoiser, config.optimizer, config.trainer.steps)

    def train_step(self) -> dict[str, float]:
        chosen = self.deck.next(self.config.trainer.batch_size)
        trajectory = self.pairs.trajectories[chosen].float()
        noisy, timesteps = pick_states(trajectory, self.pairs.timesteps, self.chunks, self.generator)
        loss = ode_regression_loss(
            self.denoiser,
            noisy.to(self.device),
            timesteps.to(self.device),
            trajectory[:, -1].to(self.device),
            self.text_encoder.encode([self.pairs.prompts[index] for index in chosen]),
            self.mask,
        )
        loss.backward()
        lr = self.updater.lr
        return {"loss": loss.item(), "gradient_norm": self.updater.step(), "lr": lr}

    def sample_frames(self, prompts: list[str]) -> Tensor:
        return self.sample_rollout(self.denoiser, self.text_encoder.encode(prompts), self.codec)

    def export(self, folder: Path) -> None:
        self.export_transformer(folder)
