"""The trainer of each objective."""

from __future__ import annotations

from trainer.autoencoder import AutoencoderTrainer
from trainer.config import Config, Objective
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.regression import RegressionTrainer
from trainer.self_forcing import METHODS, SelfForcingTrainer
from trainer.trainer import RunContext, Trainer

TRAINERS: dict[Objective, type[Trainer]] = {
    Objective.autoencoder: AutoencoderTrainer,
    Objective.diffusion: DiffusionTrainer,
    Objective.ode_regression: RegressionTrainer,
    Objective.causal_consistency: ConsistencyTrainer,
    **dict.fromkeys(METHODS, SelfForcingTrainer),
}


def build_trainer(config: Config, context: RunContext) -> Trainer:
    """Build the trainer that ``config.objective`` names, and load its weights."""
    return TRAINERS[config.objective](config, context)
