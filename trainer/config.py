"""The configuration that every entry point reads: one schema for training and inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from model.discriminator import DiscriminatorConfig
from pipeline.config import DenoiserConfig, PipelineConfig
from pipeline.steps import GradientSteps
from trainer.data import DataConfig
from trainer.health import HealthConfig
from trainer.lora import LoRAConfig
from trainer.objectives.gan import AdversarialLoss
from trainer.optimizer import OptimizerConfig
from trainer.parallelize import ParallelConfig
from utils.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_1, require


class Objective(Enum):
    """What train.py trains."""

    autoencoder = "autoencoder"
    diffusion = "diffusion"
    ode_regression = "ode_regression"
    self_forcing_dmd = "self_forcing_dmd"
    self_forcing_sid = "self_forcing_sid"
    self_forcing_gan = "self_forcing_gan"
    self_forcing_dmd_gan = "self_forcing_dmd_gan"
    self_forcing_long = "self_forcing_long"
    self_forcing_continued = "self_forcing_continued"
    self_forcing_image = "self_forcing_image"
    causvid = "causvid"
    causal_consistency = "causal_consistency"


class Forcing(Enum):
    """The context with which a diffusion denoiser is trained."""

    bidirectional = "bidirectional"
    diffusion_forcing = "diffusion_forcing"
    teacher_forcing = "teacher_forcing"


@dataclass
class AutoencoderConfig:
    """Training a TinyVAE."""

    preset: str = "shapes"
    """Sizes: a key of model.tiny_vae_config.TINY_VAE_PRESETS."""
    weights: str | None = None
    """Folder of a TinyVAE to go on from: its encoder stays as it is, so denoisers that were trained with it stay right.
    null fits a new encoder."""
    fit_clips: int = 192
    """The number of clips to which the linear encoder is fitted."""
    crop_frames: int | None = 9
    """The number of consecutive pixel frames in a training clip of the decoder. null takes whole clips."""
    latent_noise: float = 0.1
    """The most noise that is added to latents. The decoder then tolerates the small errors of a denoiser."""
    motion_weight: float = 0.5
    """Weight of the error of the change between frames."""
    denoised_share: float = 0.0
    """The share of clips, in [0, 1], whose latents are noised, then denoised by the generator as in its last pass over
    a chunk. The decoder learns to mend the generator's errors from them. It needs whole clips. 0 loads no generator."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "fit_clips", "crop_frames")
        require(self, NOT_NEGATIVE, "latent_noise", "motion_weight")
        require(self, SHARE, "denoised_share")
        if self.denoised_share and self.crop_frames is not None:
            raise ValueError(f"denoised_share={self.denoised_share} needs whole clips: set crop_frames=null")


@dataclass
class DiffusionConfig:
    """Training a many-step denoiser on real videos."""

    forcing: Forcing = Forcing.bidirectional
    """bidirectional (a teacher), diffusion_forcing or teacher_forcing (causal)."""
    guidance_dropout: float = 0.1
    """The share of prompts that are replaced by the negative prompt, in [0, 1]."""
    timestep_shift: float | None = None
    """Shift of the training timesteps. null takes the generator's shift. A smaller shift trains fine detail more."""
    sigma_floor: float = 0.0
    """For x0 predictions: below this noise level the weight of the flow error does not grow any more."""
    bell_weights: bool = False
    """Weight timesteps by Wan's bell curve."""
    noise_augmentation_max_timestep: float = 0.0
    """teacher_forcing: noise the clean context too, up to this timestep in [0, 1000]; 0 leaves it clean."""
    train_text_encoder: bool = False
    """Train the text encoder too. Without weights it starts from random ones."""

    def __post_init__(self) -> None:
        require(self, SHARE, "guidance_dropout")
        require(self, POSITIVE, "timestep_shift")
        require(self, NOT_NEGATIVE, "sigma_floor")
        if not 0 <= self.noise_augmentation_max_timestep <= 1000:
            raise ValueError(
                f"noise_augmentation_max_timestep={self.noise_augmentation_max_timestep} must lie in [0, 1000]"
            )


@dataclass
class ODEConfig:
    """Regression of a causal student to a teacher's ODE trajectories."""

    pairs: str = "logs/ode_pairs"
    """Folder written by scripts/make_ode_pairs.py."""


@dataclass
class DMDConfig:
    """Distribution matching distillation on self-generated videos."""

    real_guidance_scale: float = 3.0
    """Guidance g of the real score, ``c + g (c - u)``; 3 is CFG 4 in the usual convention."""
    fake_guidance_scale: float = 0.0
    """The same g for the fake score; 0 is no guidance."""
    min_timestep: float = 0.0
    """Lower bound of the score timestep before the shift, in [0, 1000)."""
    ts_schedule: bool = False
    """Draw score timesteps only above the denoising step that follows the rollout's exit step."""
    ts_schedule_max: bool = False
    """Draw score timesteps only below the rollout's exit step."""
    critic_updates: int = 5
    """Critic updates for each generator update."""
    critic_head_start: int = 0
    """First steps in which only the critic learns, from rollouts of the untrained student."""
    replay_rollouts: int = 0
    """The number of recent rollouts that critic updates reuse. 0 makes a new rollout for each critic update."""
    sigma_floor: float = 0.0
    """The sigma_floor of the critic's loss (see diffusion.sigma_floor)."""
    grad_start_frame: int = 0
    """First scored latent frame that carries gradient."""
    gradient_steps: GradientSteps = GradientSteps.last
    """The denoising passes of a chunk that carry gradient: last, the pass at which it stops, or all."""
    detach_cache: bool = True
    """Whether gradient ends at the cached keys and values. If false, it flows through them to earlier chunks."""
    regression_weight: float = 0.0
    """Weight of a regression to stored trajectories (ode.pairs) in the generator's loss. 0 turns it off."""
    clean_step: bool = False
    """causvid: a chunk may also be clean, as if rollout.denoising_steps had one more entry, 0."""
    clean_context: bool = False
    """causvid: every chunk is denoised after clean real chunks (teacher forcing), not after noised ones."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "critic_updates")
        require(self, NOT_NEGATIVE, "critic_head_start", "replay_rollouts", "sigma_floor", "grad_start_frame")
        require(self, NOT_NEGATIVE, "regression_weight")
        if not 0 <= self.min_timestep < 1000:
            raise ValueError(f"min_timestep={self.min_timestep} must lie in [0, 1000)")


@dataclass
class LongConfig:
    """Rollouts longer than the video.num_frames frames that the scores see. They learn by DMD (see the dmd section)."""

    max_frames: int = 63
    """self_forcing_long: a rollout has from video.num_frames to this many latent frames. The last ones are scored."""
    windows: int = 4
    """self_forcing_continued: windows of a rollout. In each one the scores see video.num_frames latent frames."""
    overlap: int | None = None
    """self_forcing_continued: frames that a window takes from the window before it. null is one chunk."""
    switch_probability: float = 1.0
    """self_forcing_continued: the probability that the prompt changes in a rollout, before a random window."""
    last_switch: int | None = None
    """self_forcing_continued: the last window (from 0) before which the prompt may change. null: the last one."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "max_frames", "windows")
        require(self, NOT_NEGATIVE, "overlap")
        require(self, SHARE, "switch_probability")
        if self.last_switch is not None and self.last_switch < 1:
            raise ValueError(
                f"last_switch={self.last_switch} must be at least 1: window 0 begins with the first prompt"
            )


@dataclass
class SiDConfig:
    """Score identity distillation instead of DMD. It uses the guidance and the critic of the dmd section."""

    alpha: float = 1.0
    """Weight of the squared difference of the scores that is subtracted."""


@dataclass
class GANConfig:
    """The adversarial term of self_forcing_gan and self_forcing_dmd_gan. Its discriminator reads the critic's features.

    The discriminator's loss is ``discriminator_weight * logit loss + (r1_weight * R1 + r2_weight * R2) / 2``.
    """

    kind: AdversarialLoss = AdversarialLoss.relativistic
    """relativistic or non_saturating."""
    generator_weight: float = 0.01
    """Weight of the adversarial loss in the generator's loss."""
    discriminator_weight: float = 0.01
    """Weight of the logit loss in the discriminator's loss."""
    r1_weight: float = 0.0
    """Weight of the squared slope at real videos. Half of it is used in the loss."""
    r2_weight: float = 0.0
    """Weight of the squared slope at generated videos. Half of it is used in the loss."""
    perturbation_sigma: float = 0.01
    """Size of the finite difference from which the penalties are computed."""
    heads: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "generator_weight", "discriminator_weight", "r1_weight", "r2_weight")
        require(self, POSITIVE, "perturbation_sigma")


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation of a causal many-step teacher (real_score) into student."""

    solver_steps: int = 48
    """Steps of the teacher's grid."""
    guidance_scale: float = 3.0
    """Guidance g of the teacher, ``u + g (c - u)``; 1 is no guidance."""
    per_chunk: bool = False
    """Draw one timestep for each chunk instead of one for each video."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "solver_steps")


@dataclass
class LoopConfig:
    """The training loop, which all trainers share."""

    steps: int = 1000
    """Updates of the trained network."""
    batch_size: int = 1
    """Clips in one pass of one process."""
    total_batch_size: int | None = None
    """Clips in an update, over all processes and passes; null is one pass of batch_size on each process."""
    seed: int = 0
    """Seed of every random number."""
    ema_decay: float = 0.99
    """Share of the old average that each step keeps, in [0, 1); 0 averages nothing."""
    ema_start_step: int = 0
    """Up to this step the average is a copy of the weights."""
    log_every: int = 10
    """Steps between log lines."""
    sample_every: int = 0
    """Steps between sample videos. 0 makes them only at the end."""
    save_every: int = 0
    """Steps between checkpoints. 0 saves only at the end."""
    save_in_background: bool = False
    """Write checkpoints while training goes on, from a copy in CPU memory."""
    keep_last: int = 2
    """The number of newest checkpoints to keep."""
    keep_every: int = 0
    """Keep also the checkpoints of steps that are multiples of this. 0 keeps none of them."""
    export_every: int = 0
    """Steps between exports of model_<step>.pt, in the official layout. 0 exports only at the end, to model.pt."""
    export_dtype: str = "float32"
    """Precision of the final model's files: float32, float16 or bfloat16."""
    wandb: bool = False
    """Also report to Weights & Biases."""
    tensorboard: bool = False
    """Also report to TensorBoard."""

    def __post_init__(self) -> None:
        require(self, AT_LEAST_1, "steps", "batch_size", "total_batch_size", "log_every", "keep_last")
        require(self, NOT_NEGATIVE, "ema_start_step", "sample_every", "save_every", "keep_every", "export_every")
        require(self, SHARE_BELOW_1, "ema_decay")
        if self.export_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"export_dtype={self.export_dtype!r} must be float32, float16 or bfloat16")


@dataclass
class Config(PipelineConfig):
    """The whole configuration. A YAML file sets the keys that differ from these defaults."""

    objective: Objective = Objective.self_forcing_dmd
    """What train.py trains."""
    student: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The weights that self-forcing starts from. generator is its result, for inference."""
    real_score: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The frozen teacher."""
    fake_score: DenoiserConfig | None = None
    """The weights that the critic starts from. null takes the teacher's."""
    data: DataConfig = field(default_factory=DataConfig)
    trainer: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    critic_lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    ode: ODEConfig = field(default_factory=ODEConfig)
    dmd: DMDConfig = field(default_factory=DMDConfig)
    long: LongConfig = field(default_factory=LongConfig)
    sid: SiDConfig = field(default_factory=SiDConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
