"""The loaded parts of a pipeline: text encoder, denoiser and codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from model.attention import resolve_backend
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.prompt_cache import PromptCache
from pipeline.config import PipelineConfig, Sampler
from pipeline.loading import load_codec, load_denoiser, load_prompt_cache
from pipeline.memory import PROFILES, Profile, TextPlacement
from pipeline.optimize import optimize, optimize_codec, rollout_flops
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig
from pipeline.sizes import token_size
from pipeline.workspace import Workspace


@dataclass(frozen=True, eq=False)
class TextToVideo:
    """All loaded parts that turn prompts into videos."""

    denoiser: Denoiser
    """A few-step causal, a bidirectional or a many-step causal denoiser. The sampler decides which."""
    text_encoder: PromptCache
    codec: VideoCodec
    config: RolloutConfig
    """How clips are rolled out."""
    sampler: Sampler = Sampler.rollout
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Options of the many-step samplers."""
    decode_last: bool = False
    """True: decode a clip after all its latents are complete and the cache is freed. False: chunk by chunk."""

    workspace: Workspace = field(default_factory=Workspace)
    """What streams share on the device. A copy of this object by ``replace`` shares it too."""

    def cache(self) -> KVCache:
        """Make the cache of a stream. It takes the buffers of an ended stream, unless memory is short."""
        layers = self.denoiser.transformer.config.num_layers
        return KVCache(layers) if self.decode_last else self.workspace.cache(layers)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if a size in pixels is not a multiple of codec scale times patch size."""
        _, rows, columns = self.denoiser.transformer.config.patch_size
        down, across = self.codec.spatial_scale * rows, self.codec.spatial_scale * columns
        if height % down or width % across:
            raise ValueError(f"{height}x{width} pixels do not divide into tokens of {down}x{across}")


def load_pipeline(
    config: PipelineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    use_ema: bool | None = True,
    profile: Profile = PROFILES[0],
    prompts: Sequence[str] | None = None,
) -> TextToVideo:
    """Load every part that the configuration names.

    Args:
        profile: how to save memory; see :mod:`pipeline.memory`.
        prompts: all prompts of the run, if they are known. They are embedded now. The text encoder is not loaded if
            all embeddings are on disk. It is freed afterwards unless it is resident. None: the text encoder is loaded
            now and kept.
    """
    options = {"device": device, "dtype": dtype}
    resolve_backend(config.generator.attention, device, dtype)  # before large files are read
    text_encoder = _prepare_text(config, profile, prompts, **options)
    denoiser = load_denoiser(config.generator, use_ema=use_ema, streamed=profile.stream_generator, **options)
    denoiser.eval().requires_grad_(False)
    optimize(
        denoiser.transformer,
        config.optimize,
        streamed=profile.stream_generator,
        flops_ahead=_flops_ahead(config, denoiser, prompts),
    )
    codec = load_codec(config.codec, tiled=profile.tile_codec, **options)
    optimize_codec(codec, config.optimize)
    return TextToVideo(
        denoiser,
        text_encoder,
        codec,
        config.rollout,
        sampler=config.sampler,
        sampling=config.sampling,
        decode_last=profile.decode_last,
    )


def _flops_ahead(config: PipelineConfig, denoiser: Denoiser, prompts: Sequence[str] | None) -> float:
    """Return the FLOPs of the denoiser for a video of each prompt. Infinite if prompts come during the run."""
    if prompts is None:
        return math.inf
    rows, columns = token_size(config)
    tokens = (config.video.height // rows) * (config.video.width // columns)
    one = rollout_flops(denoiser.transformer, config.rollout, frames=config.video.num_frames, tokens=tokens)
    return one * len(prompts) * config.inference.num_samples


def _prepare_text(
    config: PipelineConfig,
    profile: Profile,
    prompts: Sequence[str] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PromptCache:
    """Return the text encoder, or the embeddings of all prompts after the encoder is freed."""
    text_encoder = load_prompt_cache(
        config.text_encoder,
        streamed=profile.text_encoder is TextPlacement.streamed,
        keep_encoder=profile.text_encoder is TextPlacement.resident or prompts is None,
        device=device,
        dtype=dtype,
    )
    if prompts is None:
        text_encoder.load()
    else:
        text_encoder.prepare(config.prompts_to_embed(prompts))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # give the memory of the freed text encoder to the next parts
    return text_encoder
