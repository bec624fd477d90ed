"""Prompts to videos: text encoder, sampler and streaming decoder in one object.

Shapes: B videos, F pixel frames, H W pixel size, f latent frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.text_encoder import PromptCache
from pipeline.config import PipelineConfig, Sampler
from pipeline.loading import load_codec, load_denoiser, load_prompt_cache
from pipeline.memory import PROFILES, Profile, TextPlacement
from pipeline.optimize import optimize
from pipeline.rollout import Block, RolloutConfig, randn
from pipeline.sampling import SamplingConfig, sample, sample_causal
from pipeline.stream import Stream, StreamRequest, VideoSeed


class TextToVideo:
    """The pipeline behind inference and demo.

    Args:
        denoiser: what the sampler needs: few-step causal, bidirectional or many-step causal.
        text_encoder: prompts to embeddings.
        codec: video codec.
        config: how clips are rolled out.
        sampler: how noise becomes a clip.
        sampling: of the many-step samplers.
        decode_last: decode a clip when all its latents are there and the cache is freed, not chunk by chunk.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        text_encoder: PromptCache,
        codec: VideoCodec,
        config: RolloutConfig,
        *,
        sampler: Sampler = Sampler.rollout,
        sampling: SamplingConfig | None = None,
        decode_last: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.codec = codec
        self.config = config
        self.sampler = sampler
        self.sampling = sampling or SamplingConfig()
        self.decode_last = decode_last

    @classmethod
    def from_config(
        cls,
        config: PipelineConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        use_ema: bool = True,
        profile: Profile = PROFILES[0],
        prompts: Sequence[str] | None = None,
    ) -> TextToVideo:
        """Load every part the configuration names.

        Args:
            profile: what to save memory on; see :mod:`pipeline.memory`.
            prompts: all that will be asked for, where that is known: they are embedded now, and the text encoder is
                not loaded if all are on disk, and freed unless it is resident. None: it is loaded now and stays.
        """
        options = {"device": device, "dtype": dtype}
        resident = profile.text_encoder is TextPlacement.resident
        text_encoder = load_prompt_cache(
            config.text_encoder,
            streamed=profile.text_encoder is TextPlacement.streamed,
            keep_encoder=resident or prompts is None,
            **options,
        )
        if prompts is None:
            text_encoder.load()
        else:
            text_encoder.prepare(config.prompts_to_embed(prompts))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what a freed encoder took, for the parts to come
        denoiser = load_denoiser(config.generator, use_ema=use_ema, streamed=profile.stream_generator, **options)
        denoiser.eval().requires_grad_(False)
        optimize(denoiser.transformer, config.optimize, streamed=profile.stream_generator)
        return cls(
            denoiser,
            text_encoder,
            load_codec(config.codec, tiled=profile.tile_codec, **options),
            config.rollout,
            sampler=config.sampler,
            sampling=config.sampling,
            decode_last=profile.decode_last,
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
        given = [None] * len(seeds) if context_frames is None else context_frames
        stream = Stream(
            self,
            *(
                StreamRequest(
                    seed.prompt, height, width, seed.seed, seed.sample, num_frames=num_frames, context_frames=frames
                )
                for seed, frames in zip(seeds, given, strict=True)
            ),
        )
        chunks = iter(stream)
        if self.decode_last:
            chunks = list(chunks)
        for chunk in chunks:
            yield stream.decode(chunk).float().cpu()

    def generate(self, seeds: Sequence[VideoSeed], **options) -> Tensor:
        """Whole videos [B F 3 H W] at once; arguments as :meth:`stream`, with a finite ``num_frames``."""
        return torch.cat(list(self.stream(seeds, **options)), dim=1)

    def many_step_blocks(
        self, denoiser: Denoiser, noise: Iterator[Tensor], embeds: Tensor, context: Tensor | None
    ) -> Iterator[Block]:
        """Chunks of latents by a many-step sampler, after the given ones.

        Args:
            denoiser: this pipeline's, or what stands in for it.
            noise: of each chunk, [B f C h w].
            embeds: [B L E].
            context: given latents [B f C h w].
        """
        noise = torch.cat(list(noise), dim=1)
        negative = self.text_encoder.encode([self.sampling.negative_prompt] * len(embeds))
        if self.sampler is Sampler.causal_many_step:
            yield from sample_causal(
                denoiser, noise, embeds, negative, self.config, self.sampling, context_latents=context
            )
            return
        latents = sample(denoiser, noise, embeds, negative, self.sampling)
        start = 0
        for part in latents.split(self.config.frames_per_chunk, dim=1):
            yield Block(start, part)
            start += part.shape[1]

    @property
    def like(self) -> Tensor:
        """A weight that never leaves the device: latents have its device and dtype."""
        return self.denoiser.transformer.patch_embedding.weight

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C h w of the latents of clips of a size; raises as :meth:`check_size`."""
        self.check_size(height, width)
        scale = self.codec.spatial_scale
        return self.codec.latent_channels, height // scale, width // scale

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where the codec and the patch do not divide a resolution."""
        _, rows, columns = self.denoiser.transformer.config.patch_size
        down, across = self.codec.spatial_scale * rows, self.codec.spatial_scale * columns
        if height % down or width % across:
            raise ValueError(f"{height}x{width} pixels do not divide into tokens of {down}x{across}")

    def noise(
        self, seeds: Sequence[VideoSeed], height: int, width: int, num_frames: int | None, given: int
    ) -> Iterator[Tensor]:
        """Initial noise of the chunks after ``given`` frames [B f C h w], each video from its own generator.

        A many-step sampler of whole clips takes it in one piece.
        """
        shape = self._latent_shape(height, width)
        generators = [seed.generator("noise") for seed in seeds]
        for frames in self._chunk_sizes(num_frames, given):
            yield randn((len(seeds), frames, *shape), generators, self.like)

    def _chunk_sizes(self, num_frames: int | None, given: int) -> Iterable[int]:
        if num_frames is not None:
            if self.sampler is Sampler.many_step:
                return [num_frames]
            return [end - start for start, end in self.config.chunks(num_frames, given)]
        first = [1] if self.config.independent_first_frame and not given else []
        return itertools.chain(first, itertools.repeat(self.config.frames_per_chunk))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] -> latents [B f C h w], where and as the denoiser takes them."""
        return self.codec.encode(frames.to(self.like)).to(self.like)
