"""The schema of a pipeline: the settings with which inference.py, demo.py and the scripts make a video."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from model.attention import AttentionBackend
from model.codec import VideoCodec
from model.transformer import PRESETS
from pipeline.optimize import OptimizeConfig
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig
from utils.bounds import POSITIVE, require
from utils.config import INPUTS, load_config

MAX_FPS = 1000
RANDOM_SEED = -1


@dataclass
class DenoiserConfig:
    """One denoiser: sizes, weights, schedule."""

    preset: str = "wan2.1-t2v-1.3b"
    """Sizes of a model that starts from random weights. With weights, their shapes and their config.json decide. The
    preset then gives only the missing sizes, and must agree with the others."""
    weights: str | None = None
    """Folder or file of weights in any format; null starts from random ones."""
    lora: Any = None
    """LoRA to merge into the weights: a path, PATH:SCALE, PATH#ADAPTER:SCALE, or a list of these (docs/weights.md)."""
    lora_scale: float = 1.0
    """The strength of the LoRA: 1 is the trained strength. It multiplies the scale of each LoRA."""
    use_ema: bool | None = None
    """Which weights of a checkpoint that holds both: true takes the averaged ones, false the trained ones. null takes
    the trained ones to make videos, unless --use_ema asks for the average, and the averaged ones to train on."""
    shift: float = 5.0
    """Timestep shift of its schedule."""
    attention: AttentionBackend = AttentionBackend.auto
    """Attention kernel."""
    gradient_checkpointing: bool = False
    """Recompute blocks in backward instead of keeping their activations."""

    def average(self, asked: bool | None) -> bool | None:
        """Return which weights to load: true for averaged ones, false for trained ones, None for averaged ones if any.

        Args:
            asked: whether --use_ema was given; None if nobody could ask (training).
        """
        if asked:
            return True
        return False if self.use_ema is False or (asked is False and self.use_ema is None) else None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(PRESETS)}")
        entries = self.lora if isinstance(self.lora, list) else [self.lora]
        if self.lora is not None and not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"lora={self.lora!r} is not a path or a list of paths, such as [a.safetensors:0.8, b.pt]")
        require(self, POSITIVE, "shift")


class CodecKind(Enum):
    """The video codec."""

    tiny = "tiny"
    wan = "wan"


@dataclass
class CodecConfig:
    """The video codec."""

    kind: CodecKind = CodecKind.wan
    """wan: the Wan VAE; tiny: a TinyVAE (TAEHV)."""
    weights: str = "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"
    """Folder or file of weights."""


@dataclass
class TextConfig:
    """The text encoder."""

    weights: str | None = "wan_models/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth"
    """A saved text-encoder folder, or Wan's .pth. null starts an untrained one (to train it with a teacher)."""
    tokenizer: str | None = "wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl"
    """Tokenizer folder. null takes the tokenizer beside the weights."""
    cache: str | None = "~/.cache/self-forcing/prompts"
    """Folder in which runs store the embeddings of prompts, to use them again. null stores none."""


@dataclass
class VideoConfig:
    """The size and length of a clip."""

    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    num_frames: int = 21
    """Latent frames of a training clip, and the default length of a generated clip."""
    fps: int | float = 16
    """Frames per second of the written video, such as 16 or 23.976."""
    scale: int = 1
    """A whole-number factor that enlarges the written video, for worlds of few pixels."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"fps={self.fps} must be above 0 and at most {MAX_FPS}")

    def latent_shape(self, codec: VideoCodec, num_frames: int | None = None) -> tuple[int, int, int, int]:
        """Return F C H W of a clip's latents. ``num_frames`` replaces the configured length."""
        height, width = self.height // codec.spatial_scale, self.width // codec.spatial_scale
        return num_frames or self.num_frames, codec.latent_channels, height, width


@dataclass
class InferenceConfig:
    """The output of inference.py."""

    data_path: str = "prompts/shapes.txt"
    """Prompts, one a line; with i2v, JSON lines {"image": ..., "prompt": ...}."""
    output_folder: str = "videos"
    """The folder for videos."""
    seed: int = 0
    """Seed, prompt and sample index decide every random number. -1 draws a seed and records it."""
    num_samples: int = 1
    """Videos for each prompt."""

    def __post_init__(self) -> None:
        if self.seed < RANDOM_SEED:
            raise ValueError(f"seed={self.seed} must be at least 0, or {RANDOM_SEED} to draw one")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")


class Sampler(Enum):
    """How the generator turns noise into videos."""

    rollout = "rollout"
    many_step = "many_step"
    causal_many_step = "causal_many_step"


@dataclass
class PipelineConfig:
    """Everything needed to turn prompts into videos."""

    sampler: Sampler = Sampler.rollout
    """rollout: few steps, chunk by chunk; many_step: a bidirectional teacher, the whole clip at once, with guidance;
    causal_many_step: a causal many-step denoiser, chunk by chunk, with guidance."""
    generator: DenoiserConfig = field(default_factory=DenoiserConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Options of the many-step samplers. Training uses them too when it samples a teacher."""
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16."""
    vram: float | None = None
    """Gigabytes of the device's memory (of RAM on a CPU) that generation may use. null: all free memory."""

    def __post_init__(self) -> None:
        if self.vram is not None and self.vram <= 0:
            raise ValueError(f"vram={self.vram} gigabytes must be above 0")

    def prompts_to_embed(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts to embed for videos of ``prompts``. A many-step sampler adds the negative prompt."""
        return [*prompts, *([] if self.sampler is Sampler.rollout else [self.sampling.negative_prompt])]


TRAINING_SECTIONS = frozenset(
    [
        "objective",
        "student",
        "real_score",
        "fake_score",
        "data",
        "trainer",
        "parallel",
        "health",
        "lora",
        "critic_lora",
        "optimizer",
        "critic_optimizer",
        "autoencoder",
        "diffusion",
        "ode",
        "dmd",
        "long",
        "sid",
        "gan",
        "consistency",
    ]
)
"""The sections that :class:`trainer.config.Config` adds to a pipeline's configuration. One YAML file serves both."""


def load_pipeline_config(
    path: str | Path, overrides: Sequence[str] = (), *, inputs: Collection[str] = INPUTS
) -> PipelineConfig:
    """Read the pipeline's part of a YAML file, with overrides such as ``rollout.window=9``.

    Args:
        inputs: keys that name files; they may lie in the checkout.

    Raises:
        UserError: the errors of :func:`utils.config.load_config`, or an override of a key that only training uses.
    """
    return load_config(PipelineConfig, path, overrides, ignored=TRAINING_SECTIONS, inputs=inputs)
