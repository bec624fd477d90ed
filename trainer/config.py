"""The configuration every entry point reads: one schema for training and inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from model.discriminator import DiscriminatorConfig
from pipeline.loading import DenoiserConfig, PartsConfig
from pipeline.sampling import SamplingConfig
from trainer.data import DataConfig
from trainer.objectives.gan import AdversarialLoss
from trainer.optimizer import OptimizerConfig


class Objective(Enum):
    """What train.py trains."""

    autoencoder = "autoencoder"
    diffusion = "diffusion"
    ode_regression = "ode_regression"
    self_forcing_dmd = "self_forcing_dmd"
    self_forcing_sid = "self_forcing_sid"
    self_forcing_gan = "self_forcing_gan"
    causvid = "causvid"
    causal_consistency = "causal_consistency"


class Forcing(Enum):
    """What context a diffusion denoiser is trained with."""

    bidirectional = "bidirectional"
    diffusion_forcing = "diffusion_forcing"
    teacher_forcing = "teacher_forcing"


@dataclass
class AutoencoderConfig:
    """Training a TinyVAE."""

    preset: str = "shapes"
    """Sizes: a key of model.tiny_vae.TINY_VAE_PRESETS."""
    fit_clips: int = 192
    """Clips the linear encoder is fitted to."""
    crop_frames: int = 9
    """Consecutive pixel frames of a clip the decoder is trained on."""
    latent_noise: float = 0.1
    """Up to this much noise is added to latents, so that the decoder forgives a denoiser's small errors."""
    motion_weight: float = 0.5
    """Weight of the error of the change between frames."""


@dataclass
class DiffusionConfig:
    """Training a many-step denoiser on real videos."""

    forcing: Forcing = Forcing.bidirectional
    """bidirectional (a teacher), diffusion_forcing or teacher_forcing (causal)."""
    guidance_dropout: float = 0.1
    """Share of prompts replaced by the negative prompt."""
    timestep_shift: float | None = None
    """Shift of the timesteps drawn in training; null is the generator's own. A smaller one trains fine detail."""
    sigma_floor: float = 0.0
    """Noise level under which the flow error's weight stops growing; for x0 predictions."""
    bell_weights: bool = False
    """Weight timesteps by Wan's bell curve."""
    train_text_encoder: bool = False
    """Train the text encoder along; without weights it starts from nothing."""


@dataclass
class ODEConfig:
    """Regression of a causal student to a teacher's ODE trajectories."""

    pairs: str = "logs/ode_pairs"
    """Folder written by scripts/make_ode_pairs.py."""


@dataclass
class DMDConfig:
    """Distribution matching distillation on self-generated videos."""

    real_guidance_scale: float = 3.0
    """g of ``c + g (c - u)``; 3 is CFG 4 in the usual convention."""
    critic_updates: int = 5
    """Critic updates for each generator update."""
    critic_head_start: int = 0
    """First steps in which only the critic learns, from rollouts of the untrained student."""
    replay_rollouts: int = 0
    """Latest generator rollouts critic updates draw from; 0 makes a new rollout for each update."""
    sigma_floor: float = 0.0
    """See diffusion.sigma_floor; of the critic's loss."""
    grad_start_frame: int = 0
    """First latent frame that carries gradient."""

    def __post_init__(self) -> None:
        if self.critic_updates < 1:
            raise ValueError(f"critic_updates={self.critic_updates} must be at least 1")
        for name in ("critic_head_start", "replay_rollouts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass
class SiDConfig:
    """Score identity distillation in place of DMD; guidance and critic are those of the dmd section."""

    alpha: float = 1.0
    """Weight of the squared score difference that is taken off."""


@dataclass
class GANConfig:
    """An adversarial term beside DMD, its discriminator on the critic's features."""

    kind: AdversarialLoss = AdversarialLoss.relativistic
    """relativistic or non_saturating."""
    generator_weight: float = 0.01
    """Of the generator's adversarial loss, added to DMD's."""
    discriminator_weight: float = 0.01
    """Of the discriminator's loss, penalties included, added to the critic's."""
    r1_weight: float = 0.0
    """Of the squared slope at real videos."""
    r2_weight: float = 0.0
    """Of the squared slope at generated videos."""
    perturbation_sigma: float = 0.01
    """Size of the finite difference behind the penalties."""
    heads: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation of a causal many-step teacher (real_score) into student."""

    solver_steps: int = 48
    """Steps of the teacher's grid."""
    guidance_scale: float = 3.0
    """Of the teacher, ``u + g (c - u)``; 1 is none."""
    per_chunk: bool = False
    """One timestep a chunk instead of one a video."""


@dataclass
class LoopConfig:
    """The loop every trainer shares."""

    steps: int = 1000
    """Updates of the trained network."""
    batch_size: int = 1
    """Clips an update."""
    seed: int = 0
    """Of every random stream."""
    ema_decay: float = 0.99
    """Of the averaged weights; 0 keeps none but the last."""
    ema_start_step: int = 0
    """Until then the average copies the weights."""
    log_every: int = 10
    """Steps between log lines."""
    sample_every: int = 0
    """Steps between sample videos; 0 makes them at the end only."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    export_dtype: str = "float32"
    """Of the final model's files: float32, float16 or bfloat16."""
    wandb: bool = False
    """Report to Weights & Biases too."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.export_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"export_dtype={self.export_dtype!r} must be float32, float16 or bfloat16")


@dataclass
class Config(PartsConfig):
    """Everything. A YAML file sets what differs from these defaults."""

    objective: Objective = Objective.self_forcing_dmd
    """What train.py trains."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    student: DenoiserConfig = field(default_factory=DenoiserConfig)
    """What self-forcing starts from; generator is what it leaves for inference."""
    real_score: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The frozen teacher, and the critic's starting point."""
    data: DataConfig = field(default_factory=DataConfig)
    trainer: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    dmd: DMDConfig = field(default_factory=DMDConfig)
    sid: SiDConfig = field(default_factory=SiDConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
