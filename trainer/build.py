"""The trainer of each objective."""

from __future__ import annotations

from trainer.autoencoder import AutoencoderTrainer
from trainer.config import Config, Objective
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.long_rollout import ContinuedTrainer, ImageTrainer, LongTrainer
from trainer.regression import RegressionTrainer
from trainer.self_forcing import SelfForcingTrainer
from trainer.trainer import RunContext, Trainer
from trainer.video_distillation import AdversarialTrainer, CausVidTrainer

TRAINERS: dict[Objective, type[Trainer]] = {
    Objective.autoencoder: AutoencoderTrainer,
    Objective.diffusion: DiffusionTrainer,
    Objective.ode_regression: RegressionTrainer,
    Objective.self_forcing_dmd: SelfForcingTrainer,
    Objective.self_forcing_sid: SelfForcingTrainer,
    Objective.self_forcing_gan: AdversarialTrainer,
    Objective.self_forcing_long: LongTrainer,
    Objective.self_forcing_continued: ContinuedTrainer,
    Objective.self_forcing_image: ImageTrainer,
    Objective.causvid: CausVidTrainer,
    Objective.causal_consistency: ConsistencyTrainer,
}


def build_trainer(config: Config, context: RunContext) -> Trainer:
    """Build the trainer ``config.objective`` names; loads its weights."""
    return TRAINERS[config.objective](config, context)
