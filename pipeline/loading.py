"""From configuration to ready parts: denoisers, codecs and text encoders."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from model.attention import AttentionBackend
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import FlowMatching
from model.lora import load_lora, merge_lora
from model.prompt_files import PromptFiles
from model.text_encoder import PromptCache, TextEncoder, clean_prompt, open_prompt_files
from model.transformer import PRESETS, WanConfig, WanTransformer
from model.transformer_files import read_declared_config, read_transformer
from model.weights import load_state_dict, not_found, read_config, weights_hash
from pipeline.optimize import OptimizeConfig
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from model.tiny_vae import TinyVAEConfig

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
    cache: str | None = "~/.cache/self-forcing/prompts"
    """Folder where a run finds the embeddings of prompts that were seen before; null keeps none."""


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


class Sampler(Enum):
    """How the generator turns noise into videos."""

    rollout = "rollout"
    many_step = "many_step"
    causal_many_step = "causal_many_step"


@dataclass
class PartsConfig:
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
    """Of the many-step samplers, also where training samples a teacher."""
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16."""
    vram: float | None = None
    """Gigabytes of the device's memory (of RAM on a CPU) that generation may take; null is what is free."""

    def __post_init__(self) -> None:
        if self.vram is not None and self.vram <= 0:
            raise ValueError(f"vram={self.vram} gigabytes must be above 0")


def transformer_config(path: Path | None, preset: str) -> WanConfig:
    """What is known before weights load: the config.json with them, else the preset."""
    declared = None if path is None else read_declared_config(path)
    if declared is None:
        return PRESETS[preset]
    try:
        return WanConfig(**(asdict(PRESETS[preset]) | declared))
    except ValueError as error:
        raise UserError(f"{path}: config.json: {error}") from error


def codec_sizes(config: CodecConfig) -> TinyVAEConfig:
    """Sizes of a TinyVAE, known before weights load; of the Wan VAE those it shares with the published TAEHV."""
    from model.tiny_vae import TinyVAEConfig

    path = Path(config.weights)
    if config.kind is CodecKind.tiny and path.is_dir():
        try:
            return TinyVAEConfig(**read_config(path))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: config.json is not a TinyVAE's: {error}") from error
    return TinyVAEConfig()


def token_size(config: PartsConfig) -> tuple[int, int]:
    """Pixel rows and columns of a token, from the configurations beside the weights: known before weights load."""
    sizes = codec_sizes(config.codec)
    scale = sizes.patch_size * math.prod(sizes.spatial_strides)
    generator = Path(config.generator.weights) if config.generator.weights else None
    _, rows, columns = transformer_config(generator, config.generator.preset).patch_size
    return scale * rows, scale * columns


def all_prompts(config: PartsConfig, prompts: Sequence[str]) -> list[str]:
    """The prompts that making videos of ``prompts`` embeds: with a many-step sampler, the negative one too."""
    return [*prompts, *([] if config.sampler is Sampler.rollout else [config.sampling.negative_prompt])]


def load_transformer(
    config: DenoiserConfig,
    *,
    use_ema: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    streamed: bool = False,
) -> WanTransformer:
    """Build a transformer from its weights and LoRA, or from random weights drawn from ``generator``.

    Args:
        use_ema: a checkpoint's averaged weights or its raw ones; None takes averaged ones where there are any.
        streamed: the blocks' weights wait in RAM (see :func:`stream_weights`); for inference only.

    Raises:
        UserError: weights that are missing, damaged or of other sizes.
    """
    if streamed:
        waiting = waiting_dtype(torch.device(device), dtype)
        model = read_transformer(config.weights, preset=config.preset, use_ema=use_ema, dtype=waiting)
    elif config.weights is None:
        with torch.device("meta"):
            model = WanTransformer(PRESETS[config.preset])
        model.to_empty(device="cpu")
        model.reset_parameters(generator)
        model.to(device, dtype)
    else:
        model = read_transformer(config.weights, preset=config.preset, use_ema=use_ema, device=device, dtype=dtype)
    if config.lora is not None:
        merge_lora(dict(model.named_parameters()), load_lora(config.lora), config.lora_scale, source=config.lora)
    if streamed:
        for name, part in model.named_children():
            if name != "blocks":
                part.to(device, dtype)
        for block in model.blocks:
            stream_weights(block, device, dtype)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.attention_backend = config.attention
    return model


def waiting_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """In which dtype streamed weights wait: on a CPU as they are stored, so that they stay in their file."""
    return None if device.type == "cpu" else dtype


def stream_weights(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Leave a module's weights where they are; each layer's are on ``device``, in ``dtype``, only while it computes."""
    from accelerate import cpu_offload

    cpu_offload(module.requires_grad_(False), execution_device=torch.device(device), state_dict=module.state_dict())
    module.to(dtype)  # the parameters hold no values now: it only says what the weights are turned into


def generator_hash(config: DenoiserConfig, *, use_ema: bool | None = None) -> str:
    """What identifies a generator: the hash of its stored weights, then that of a LoRA after its scale."""
    digest = weights_hash(load_state_dict(config.weights, use_ema=use_ema))
    if config.lora is None:
        return digest
    lora = load_lora(config.lora)
    parts = {
        f"{name}.{part}": torch.as_tensor(value)
        for name, low in lora.layers.items()
        for part, value in vars(low).items()
    }
    return f"{digest}+{config.lora_scale:g}*{weights_hash(parts | lora.full)}"


def load_denoiser(config: DenoiserConfig, **options) -> Denoiser:
    """A :class:`Denoiser` around :func:`load_transformer`."""
    return Denoiser(load_transformer(config, **options), FlowMatching(config.shift))


def load_codec(
    config: CodecConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiled: bool = False,
) -> VideoCodec:
    """The video codec, frozen; ``tiled`` lets the Wan VAE decode in tiles (a TinyVAE is small enough)."""
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    if config.kind is CodecKind.wan:
        from model.tiling import TileConfig
        from model.wan_vae import WanVAE

        codec = WanVAE.from_file(path)
        codec.tiling = TileConfig() if tiled else None
    else:
        from model.tiny_vae import TinyVAE

        codec = TinyVAE.from_pretrained(path) if path.is_dir() else TinyVAE.from_file(path)
    return codec.to(device, dtype).eval().requires_grad_(False)


def load_text_encoder(
    config: TextConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    streamed: bool = False,
) -> TextEncoder:
    """The text encoder with its tokenizer, frozen; ``streamed`` leaves its weights in RAM (:func:`stream_weights`)."""
    if config.weights is None:
        raise UserError("text_encoder.weights is null; name a text-encoder folder or Wan's .pth file")
    path = Path(config.weights)
    if not path.exists():
        raise not_found(path)
    device = torch.device(device)
    where = {"dtype": waiting_dtype(device, dtype)} if streamed else {"dtype": dtype, "device": device}
    if path.is_dir():
        encoder = TextEncoder.from_pretrained(path, tokenizer_folder=config.tokenizer, **where)
    else:
        encoder = TextEncoder.from_wan(path, config.tokenizer, **where)
    if streamed:
        encoder.input_device = device
        stream_weights(encoder.model.encoder, device, dtype)  # the rest is the embedding, which it shares
    return encoder.eval().requires_grad_(False)


def stored_prompts(config: TextConfig, dtype: torch.dtype) -> PromptFiles | None:
    """The embeddings that earlier runs with this text encoder have left on disk; None where none are kept."""
    if config.cache is None or config.weights is None:
        return None
    return open_prompt_files(config.cache, config.weights, config.tokenizer, dtype)


def needs_text_encoder(config: PartsConfig, prompts: Sequence[str], dtype: torch.dtype) -> bool:
    """Whether a prompt that making these videos embeds is not on disk."""
    files = stored_prompts(config.text_encoder, dtype)
    return files is None or not all(files.holds(clean_prompt(prompt)) for prompt in all_prompts(config, prompts))


def load_prompt_cache(
    config: TextConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    streamed: bool = False,
    keep_encoder: bool = True,
) -> PromptCache:
    """The text encoder behind its cache, loaded when a prompt first needs it."""
    return PromptCache(
        lambda: load_text_encoder(config, device=device, dtype=dtype, streamed=streamed),
        files=stored_prompts(config, dtype),
        keep_encoder=keep_encoder,
        device=device,
    )
