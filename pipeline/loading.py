"""From configuration to ready parts: denoisers, codecs and text encoders."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

import torch

from model.attention import AttentionBackend
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.lora import load_lora, merge_lora
from model.text_encoder import TextEncoder
from model.transformer import PRESETS, WanConfig, WanTransformer
from model.transformer_files import read_declared_config, read_transformer
from model.weights import not_found, read_config
from pipeline.rollout import RolloutConfig
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class DenoiserConfig:
    """One denoiser: sizes, weights, schedule."""

    preset: str = "wan2.1-t2v-1.3b"
    """Sizes without weights; with them, what their shapes do not show and no config.json says, if the sizes agree."""
    weights: str | None = None
    """Folder or file of weights in any format; null starts from random ones."""
    lora: str | None = None
    """Folder or file of a LoRA to merge into the weights."""
    lora_scale: float = 1.0
    """How much of the LoRA to merge."""
    shift: float = 5.0
    """Timestep shift of its schedule."""
    attention: AttentionBackend = AttentionBackend.auto
    """Attention kernel."""
    gradient_checkpointing: bool = False
    """Recompute blocks in backward instead of keeping their activations."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is none of {', '.join(PRESETS)}")


class CodecKind(Enum):
    """Which video codec."""

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
    """A saved text-encoder folder, or Wan's .pth; null starts one from nothing (training a teacher with its own)."""
    tokenizer: str | None = "wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl"
    """Tokenizer folder; null takes the one beside the weights."""


@dataclass
class VideoConfig:
    """What a clip is."""

    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    num_frames: int = 21
    """Latent frames of a training clip, and of a generated one unless asked otherwise."""
    fps: int = 16
    """Frames per second of the written video."""
    scale: int = 1
    """Whole-number enlargement of the written video, for worlds of few pixels."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "fps", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def latent_shape(self, codec: VideoCodec, num_frames: int | None = None) -> tuple[int, int, int, int]:
        """F C H W of a clip's latents; ``num_frames`` stands in for the configured length."""
        height, width = self.height // codec.spatial_scale, self.width // codec.spatial_scale
        return num_frames or self.num_frames, codec.latent_channels, height, width


@dataclass
class InferenceConfig:
    """What inference.py makes."""

    data_path: str = "prompts/shapes.txt"
    """Prompts, one a line; with i2v, JSON lines {"image": ..., "prompt": ...}."""
    output_folder: str = "videos"
    """Where videos go."""
    seed: int = 0
    """With the prompt and the sample index it decides every random number."""
    num_samples: int = 1
    """Videos a prompt."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")


@dataclass
class PartsConfig:
    """Everything needed to turn prompts into videos."""

    generator: DenoiserConfig = field(default_factory=DenoiserConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16."""


def transformer_config(path: Path | None, preset: str) -> WanConfig:
    """What is known before weights load: the config.json with them, else the preset."""
    declared = None if path is None else read_declared_config(path)
    if declared is None:
        return PRESETS[preset]
    try:
        return WanConfig(**(asdict(PRESETS[preset]) | declared))
    except ValueError as error:
        raise UserError(f"{path}: config.json: {error}") from error


def token_size(config: PartsConfig) -> tuple[int, int]:
    """Pixel rows and columns of a token, from the configurations beside the weights: known before weights load."""
    from model.tiny_vae import TinyVAEConfig

    path = Path(config.codec.weights)
    sizes = asdict(TinyVAEConfig())  # whose reduction the Wan VAE shares
    if config.codec.kind is CodecKind.tiny and path.is_dir():
        sizes |= read_config(path)
    scale = sizes["patch_size"] * math.prod(sizes["spatial_strides"])
    generator = Path(config.generator.weights) if config.generator.weights else None
    _, rows, columns = transformer_config(generator, config.generator.preset).patch_size
    return scale * rows, scale * columns


def load_transformer(
    config: DenoiserConfig,
    *,
    use_ema: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> WanTransformer:
    """Build a transformer from its weights and LoRA, or from random weights drawn from ``generator``.

    ``use_ema`` chooses between a checkpoint's averaged and raw weights; None takes averaged ones where there are any.

    Raises:
        UserError: weights that are missing, damaged or of other sizes.
    """
    if config.weights is None:
        with torch.device("meta"):
            model = WanTransformer(PRESETS[config.preset])
        model.to_empty(device="cpu")
        model.reset_parameters(generator)
        model.to(device, dtype)
    else:
        model = read_transformer(config.weights, preset=config.preset, use_ema=use_ema, device=device, dtype=dtype)
    if config.lora is not None:
        merge_lora(dict(model.named_parameters()), load_lora(config.lora), config.lora_scale, source=config.lora)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.attention_backend = config.attention
    return model


def load_denoiser(config: DenoiserConfig, **options) -> Denoiser:
    """A :class:`Denoiser` around :func:`load_transformer`."""
    return Denoiser(load_transformer(config, **options), FlowMatching(config.shift))


def load_codec(
    config: CodecConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VideoCodec:
    """The video codec, frozen."""
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    if config.kind is CodecKind.wan:
        from model.wan_vae import WanVAE

        codec = WanVAE.from_file(path)
    else:
        from model.tiny_vae import TinyVAE

        codec = TinyVAE.from_pretrained(path) if path.is_dir() else TinyVAE.from_file(path)
    return codec.to(device, dtype).eval().requires_grad_(False)


def load_text_encoder(
    config: TextConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder with its tokenizer, frozen."""
    if config.weights is None:
        raise UserError("text_encoder.weights is null; name a text-encoder folder or Wan's .pth file")
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    if path.is_dir():
        encoder = TextEncoder.from_pretrained(path, tokenizer_folder=config.tokenizer, dtype=dtype)
    else:
        encoder = TextEncoder.from_wan(path, config.tokenizer or path.parent, dtype=dtype)
    return encoder.to(device).eval().requires_grad_(False)
