"""Prompts to videos: text encoder, rollout and streaming decoder in one object.

Shapes: B videos, F pixel frames, H W pixel size, f latent frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.text_encoder import PromptCache, TextEncoder
from pipeline.loading import PartsConfig, load_codec, load_denoiser, load_text_encoder
from pipeline.rollout import RolloutConfig, randn, rollout


@dataclass(frozen=True)
class VideoSeed:
    """What, with the settings, decides a video: never its batch, its place in a list or the process that makes it."""

    seed: int
    prompt: str
    sample: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator of its own for each purpose."""
        key = f"{self.seed}\n{self.sample}\n{purpose}\n{self.prompt}".encode()
        digest = hashlib.sha256(key).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class TextToVideo:
    """The pipeline behind inference and demo.

    Args:
        denoiser: few-step causal denoiser.
        text_encoder: its prompts are cached here.
        codec: video codec.
        config: how clips are rolled out.
    """

    def __init__(self, denoiser: Denoiser, text_encoder: TextEncoder, codec: VideoCodec, config: RolloutConfig) -> None:
        self.denoiser = denoiser
        self.text_encoder = PromptCache(text_encoder)
        self.codec = codec
        self.config = config

    @classmethod
    def from_config(
        cls, config: PartsConfig, *, device: torch.device, dtype: torch.dtype, use_ema: bool = True
    ) -> TextToVideo:
        """Load every part the configuration names."""
        options = {"device": device, "dtype": dtype}
        denoiser = load_denoiser(config.generator, use_ema=use_ema, **options).eval().requires_grad_(False)
        return cls(
            denoiser,
            load_text_encoder(config.text_encoder, **options),
            load_codec(config.codec, **options),
            config.rollout,
        )

    def stream(
        self,
        seeds: Sequence[VideoSeed],
        *,
        height: int,
        width: int,
        num_frames: int | None = None,
        context_frames: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Generate videos of one size together, chunk by chunk.

        Args:
            seeds: one a video.
            height, width: pixels, multiples of the codec's scale times the patch.
            num_frames: latent frames of the whole video, given ones included; None never ends.
            context_frames: given first frames [B F 3 H W] in [-1, 1], such as an image.

        Yields:
            decoded frames [B F 3 H W] float32 in [-1, 1] on the CPU, each chunk as soon as it exists. A longer video
            begins with the frames of a shorter one.
        """
        with torch.no_grad():
            embeds = self.text_encoder.encode([seed.prompt for seed in seeds])
            context = None if context_frames is None else self._encode(context_frames)
        decoder = self.codec.streaming_decoder()
        if context is not None:
            yield self._decode(decoder, context)
        given = 0 if context is None else context.shape[1]
        blocks = rollout(
            self.denoiser,
            self._noise(seeds, height, width, None if num_frames is None else num_frames - given, given),
            embeds,
            KVCache(self.denoiser.transformer.config.num_layers),  # its own: streams may run side by side
            self.config,
            context_latents=context,
            generator=[seed.generator("steps") for seed in seeds],
        )
        for block in blocks:
            yield self._decode(decoder, block.latents)

    def generate(self, seeds: Sequence[VideoSeed], **options) -> Tensor:
        """Whole videos [B F 3 H W] at once; arguments as :meth:`stream`, with a finite ``num_frames``."""
        return torch.cat(list(self.stream(seeds, **options)), dim=1)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where the codec and the patch do not divide a resolution."""
        _, rows, columns = self.denoiser.transformer.config.patch_size
        down, across = self.codec.spatial_scale * rows, self.codec.spatial_scale * columns
        if height % down or width % across:
            raise ValueError(f"{height}x{width} pixels do not divide into tokens of {down}x{across}")

    def _noise(
        self, seeds: Sequence[VideoSeed], height: int, width: int, num_frames: int | None, given: int
    ) -> Iterator[Tensor]:
        """Initial noise chunk by chunk [B f C h w], each video from its own generator."""
        self.check_size(height, width)
        scale = self.codec.spatial_scale
        shape = (self.codec.latent_channels, height // scale, width // scale)
        weight = self.denoiser.transformer.patch_embedding.weight
        generators = [seed.generator("noise") for seed in seeds]
        for frames in self._chunk_sizes(num_frames, given):
            yield randn((len(seeds), frames, *shape), generators, weight)

    def _chunk_sizes(self, num_frames: int | None, given: int) -> Iterator[int]:
        if num_frames is not None:
            yield from (end - start for start, end in self.config.chunks(num_frames, given))
            return
        if self.config.independent_first_frame and not given:
            yield 1
        while True:
            yield self.config.frames_per_chunk

    @torch.no_grad()
    def _decode(self, decoder, latents: Tensor) -> Tensor:
        return decoder.decode(latents).float().cpu()

    def _encode(self, frames: Tensor) -> Tensor:
        weight = self.denoiser.transformer.patch_embedding.weight
        return self.codec.encode(frames.to(weight)).to(weight)
