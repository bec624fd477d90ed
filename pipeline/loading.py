"""From configuration to ready parts: denoisers, codecs and text encoders."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path

import torch

from model.attention import AttentionBackend, resolve_backend
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.text_encoder import TextEncoder
from model.transformer import PRESETS, WanConfig, WanTransformer
from model.weights import load_into, load_state_dict, read_config
from pipeline.rollout import RolloutConfig
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class DenoiserConfig:
    """One denoiser: sizes, weights, schedule."""

    preset: str = "wan2.1-t2v-1.3b"
    """Sizes, where the weights bring no config.json of their own."""
    weights: str | None = None
    """Folder or file of weights; null starts from random ones."""
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
    """Sizes from the config.json beside the weights, else those of the preset."""
    folder = None if path is None else path if path.is_dir() else path.parent
    if folder is None or not (folder / "config.json").is_file():
        return PRESETS[preset]
    values = read_config(folder)
    known = {entry.name for entry in fields(WanConfig)}
    try:
        return WanConfig(**(asdict(PRESETS[preset]) | {key: value for key, value in values.items() if key in known}))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def load_transformer(
    config: DenoiserConfig,
    *,
    use_ema: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> WanTransformer:
    """Build a transformer from its weights, or from random ones drawn from ``generator``.

    Raises:
        UserError: weights that are missing, damaged or of other sizes.
    """
    path = None if config.weights is None else Path(config.weights)
    state = None if path is None else load_state_dict(path, use_ema=use_ema)
    with torch.device("meta"):
        model = WanTransformer(transformer_config(path, config.preset))
    if state is None:
        model.to_empty(device="cpu")
        model.reset_parameters(generator)
        model.to(dtype)
    else:
        load_into(model, state, source=str(path), dtype=dtype)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.attention_backend = config.attention
    backend = resolve_backend(config.attention, torch.device(device), dtype)
    weights = config.weights or f"{config.preset}, random weights"
    log.info("%s on %s in %s, attention: %s", weights, device, str(dtype).removeprefix("torch."), backend.value)
    return model.to(device)


def load_denoiser(config: DenoiserConfig, **options) -> Denoiser:
    """A :class:`Denoiser` around :func:`load_transformer`."""
    return Denoiser(load_transformer(config, **options), FlowMatching(config.shift))


def load_codec(
    config: CodecConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VideoCodec:
    """The video codec, frozen."""
    path = Path(config.weights)
    if not path.exists():
        raise UserError(f"codec.weights={path} not found")
    if config.kind is CodecKind.wan:
        from model.wan_vae import WanVAE

        codec = WanVAE.from_file(path)
    else:
        from model.tiny_vae import TinyVAE, TinyVAEConfig

        codec = TinyVAE.from_pretrained(path) if path.is_dir() else TinyVAE.from_file(path, TinyVAEConfig())
    return codec.to(device, dtype).eval().requires_grad_(False)


def load_text_encoder(
    config: TextConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The text encoder with its tokenizer, frozen."""
    if config.weights is None:
        raise UserError("text_encoder.weights is null; name a text-encoder folder or Wan's .pth file")
    path = Path(config.weights)
    if not path.exists():
        raise UserError(f"text_encoder.weights={path} not found")
    if path.is_dir():
        encoder = TextEncoder.from_pretrained(path, tokenizer_folder=config.tokenizer, dtype=dtype)
    else:
        encoder = TextEncoder.from_wan(path, config.tokenizer or path.parent, dtype=dtype)
    return encoder.to(device).eval().requires_grad_(False)
