"""The loaded parts of a pipeline: text encoder, denoiser and codec, and how they work together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from model.attention import resolve_backend
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.prompt_cache import PromptCache
from pipeline.config import PipelineConfig, Sampler
from pipeline.loading import load_codec, load_denoiser, load_prompt_cache
from pipeline.memory import PROFILES, Profile, TextPlacement
from pipeline.optimize import optimize, optimize_codec, rollout_flops
from pipeline.rollout import RolloutConfig
from pipeline.sampling import SamplingConfig
from pipeline.sizes import token_size


@dataclass(frozen=True, eq=False)
class TextToVideo:
    """Everything that turns prompts into videos, loaded and ready."""

    denoiser: Denoiser
    """A few-step causal, a bidirectional or a many-step causal one, as the sampler needs it."""
    text_encoder: PromptCache
    codec: VideoCodec
    config: RolloutConfig
    """How clips are rolled out."""
    sampler: Sampler = Sampler.rollout
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Options of the many-step samplers."""
    decode_last: bool = False
    """Decode a clip when all its latents are there and the cache is freed, instead of chunk by chunk."""

    @cached_property
    def decode_stream(self) -> torch.cuda.Stream:
        """The CUDA stream in which chunks are decoded: one for all sessions, because each stream has its own memory."""
        return torch.cuda.Stream(next(self.denoiser.parameters()).device)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the codec and the patch do not divide a size in pixels."""
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
        profile: what to save memory on; see :mod:`pipeline.memory`.
        prompts: all prompts that will be asked for, if they are known. They are embedded now. The text encoder is not
            loaded if all embeddings are on disk, and it is freed afterwards unless it is resident. None: the text
            encoder is loaded now and stays.
    """
    options = {"device": device, "dtype": dtype}
    resolve_backend(config.generator.attention, device, dtype)  # first: a mistake shows before large files are read
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
    """Work of the denoiser for a video of each prompt; infinite if prompts come while it runs."""
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
    """The text encoder, or the embeddings of all prompts with the memory of the encoder free again."""
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
        torch.cuda.empty_cache()  # the memory of a freed text encoder, for the parts to come
    return text_encoder
