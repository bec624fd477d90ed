"""The autoregressive rollout: one loop for generation and self-forcing training (Self Forcing, Algorithms 1 and 2).

Shapes: B batch, F latent frames of the clip, f of a chunk, C channels, H W latent height and width, L E text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from model.attention import BlockMask, block_causal_mask, chunk_ranges, visible_frames
from model.codec import VideoCodec
from model.denoiser import Denoiser
from model.flow_matching import add_noise, full_timesteps
from model.kv_cache import KVCache
from model.layer_cache import CacheDtype
from pipeline.recompute import ContextImages
from pipeline.states import SwitchStyle
from pipeline.steps import GradientSteps, Steps, checked_steps, map_steps, steps_of_chunk
from utils.transfer import send

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class RolloutConfig:
    """How a clip is rolled out."""

    denoising_steps: list[Any] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    """Timesteps of the few-step denoiser, descending from 1000. Or a list for each chunk; the last list then serves all
    later chunks. [[1000, 750, 500, 250], [1000, 500]]: four steps for the first chunk, two for the others."""
    warp_denoising_step: bool = True
    """Look the steps up in the shifted 1000-step grid."""
    frames_per_chunk: int = 3
    """Latent frames denoised together; 1 is frame-wise."""
    independent_first_frame: bool = False
    """The first chunk is a single frame (an image)."""
    context_noise: float = 0.0
    """Timestep at which finished frames are committed to the cache; 0 commits them clean."""
    window: int | None = None
    """The most latent frames that attention sees, the current chunk included. null: all frames."""
    sink: int = 0
    """The number of first latent frames that never leave the window."""
    relative_positions: bool = False
    """Count positions within the window, so that the sink never gets further away than in training."""
    cache_dtype: CacheDtype = CacheDtype.auto
    """How keys and values are stored: auto or fp8."""
    recache_sink: bool = True
    """Whether a prompt switch with recache encodes the sink again too. If false, the sink keeps the first prompt."""
    recompute: bool = False
    """Before every chunk, encode the visible frames again, as a clip that begins with its own image latent
    (krea-ai/realtime-video). It needs a window without a sink. Training rollouts ignore it."""

    def __post_init__(self) -> None:
        self.denoising_steps = checked_steps("denoising_steps", self.denoising_steps)
        if self.frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk={self.frames_per_chunk} must be at least 1")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise={self.context_noise} must be a timestep in [0, 1000]")
        if self.window is not None and self.window - self.sink < self.frames_per_chunk:
            raise ValueError(
                f"window={self.window} minus sink={self.sink} is less than frames_per_chunk={self.frames_per_chunk}"
            )
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must not be negative")
        if self.recompute and (self.window is None or self.sink):
            raise ValueError(f"recompute=true needs a window and sink=0, not window={self.window} and sink={self.sink}")

    def chunks(self, num_frames: int, context_frames: int = 0) -> list[tuple[int, int]]:
        """Return the frame ranges of the generated chunks, after `context_frames` given frames.

        Raises:
            ValueError: the frames do not divide into chunks.
        """
        alone = self.independent_first_frame and context_frames == 0
        ranges = chunk_ranges(num_frames, self.frames_per_chunk, alone)
        return [(start + context_frames, end + context_frames) for start, end in ranges]

    def mask(self, num_frames: int, build: Callable[..., BlockMask] = block_causal_mask) -> BlockMask:
        """Return the mask for training on whole clips that equals the cache. ``build``: a mask of model.attention."""
        return build(
            num_frames,
            self.frames_per_chunk,
            window=self.window,
            sink=self.sink,
            independent_first_frame=self.independent_first_frame,
        )

    def context_images(self, codec: VideoCodec) -> ContextImages | None:
        """Return the helper with which ``recompute`` encodes the context of one rollout. None without this mode."""
        return ContextImages(codec, self.window) if self.recompute else None

    def timesteps(self, denoiser: Denoiser) -> Steps:
        """Return the steps after the denoiser's schedule has warped them: one list, or a list for each chunk."""
        if not self.warp_denoising_step:
            return self.denoising_steps
        return map_steps(self.denoising_steps, denoiser.schedule.warp)


@dataclass(frozen=True)
class ChunkInput:
    """The inputs of one chunk."""

    latents: Tensor
    """Noise [B f C H W], or a video noised to the timestep of ``first_step``."""
    first_step: int = 0
    """Index of the first step taken; more than 0 makes video to video."""
    prompt_embeds: Tensor | None = None
    """The prompt from this chunk on [B L E]. None keeps the last prompt."""
    style: SwitchStyle = SwitchStyle.keep
    """How the context is treated if ``prompt_embeds`` is given."""


@dataclass
class FinishedChunk:
    """One finished chunk."""

    start_frame: int
    latents: Tensor
    """Predicted x0 [B f C H W]."""


class Stage(Enum):
    """The purpose of a pass."""

    denoise = "denoise"
    context = "context"


@dataclass(frozen=True)
class Pass:
    """One run of the denoiser, as a rollout requests it."""

    stage: Stage
    latents: Tensor
    timestep: float
    prompt_embeds: Tensor
    cache: KVCache
    start_frame: int | tuple[int, ...]
    """The position in the cache. In a batch of passes there may be one for each sample."""
    chunk_frames: tuple[int, ...] | None = None
    """Sizes of the chunks if the pass covers several."""
    with_grad: bool = False

    def run(self, denoiser: Denoiser) -> Tensor:
        """x0 [B f C H W]; a context pass gives no frame."""
        with nullcontext() if self.with_grad else torch.no_grad():
            return denoiser(
                self.latents,
                full_timesteps(self.timestep, self.latents),
                self.prompt_embeds,
                cache=self.cache,
                start_frame=self.start_frame,
                chunk_frames=self.chunk_frames,
                output_frames=0 if self.stage is Stage.context else None,
            ).x0


def randn(shape: Sequence[int], generator: Generators, like: Tensor) -> Tensor:
    """Draw standard normal noise [B ...] in the device and dtype of ``like``. With a list, sample b uses generator b.

    The numbers are drawn in float32 on the generator's device: a CPU generator gives the same ones for every device.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        drawn = torch.cat([torch.randn(1, *shape[1:], generator=one, device=one.device) for one in generator])
    else:
        drawn = torch.randn(*shape, generator=generator, device=generator.device if generator else like.device)
    return send(drawn, like.device, like.dtype)


def rollout(
    denoiser: Denoiser,
    noise: Tensor | Iterable[Tensor | ChunkInput],
    prompt_embeds: Tensor,
    cache: KVCache,
    config: RolloutConfig,
    **options,
) -> Iterator[FinishedChunk]:
    """Generate a video chunk by chunk. Each chunk is denoised in a few steps over the cache of earlier chunks.

    Arguments are those of :func:`rollout_passes`.

    Yields:
        finished chunks. The context pass of a chunk runs later, and only if another chunk follows.
    """
    passes = rollout_passes(config.timesteps(denoiser), noise, prompt_embeds, cache, config, **options)
    event = next(passes, None)
    while event is not None:
        if isinstance(event, FinishedChunk):
            yield event
            event = next(passes, None)
        else:
            event = passes.send(event.run(denoiser))


def rollout_passes(
    timesteps: Steps,
    noise: Tensor | Iterable[Tensor | ChunkInput],
    prompt_embeds: Tensor,
    cache: KVCache,
    config: RolloutConfig,
    *,
    context_latents: Tensor | None = None,
    exit_steps: Sequence[int] | None = None,
    grad_start_frame: int | None = None,
    gradient_steps: GradientSteps = GradientSteps.last,
    detach_cache: bool = True,
    generator: Generators = None,
    num_frames: int | None = None,
    denoise_chunk: Callable[[Tensor, int], Tensor] | None = None,
    images: ContextImages | None = None,
) -> Generator[Pass | FinishedChunk, Tensor | None, None]:
    """The loop of a rollout. It does not run the denoiser: it yields each pass and receives the x0 of the pass.

    It also yields finished chunks. The caller can stop between passes, time them, or batch those of several rollouts.

    Args:
        timesteps: the timesteps of the denoising steps, descending; or a list for each chunk.
        noise: [B F C H W], which is split into chunks. Or an iterable, which may be endless, of noise [B f C H W] or
            :class:`ChunkInput`, which can change the prompt. An entry is taken when the chunk before it is finished.
        prompt_embeds: [B L E].
        cache: the cache, which is reset here. With gradients it must be ``append_only``.
        context_latents: given clean frames [B F' C H W] (an image or a video) before the first chunk.
        exit_steps: for training, the index of the step at which each chunk stops, or its last step if it has fewer.
            None runs every step.
        grad_start_frame: from the chunk of this frame on, passes carry gradient. None: no gradient.
        gradient_steps: the denoising passes of these chunks that carry it.
        detach_cache: gradient ends at the cache. If false, it flows through cached keys and values to earlier chunks.
        generator: for the fresh noise between steps; see :func:`randn`.
        num_frames: length of the clip, given frames included, if ``noise`` does not show it; it sizes the cache.
        denoise_chunk: another function from the noise [B f C H W] of a chunk and its position in the cache to x0, such
            as a many-step solver over the same cache. None is the few-step denoiser.
        images: decodes finished frames for ``config.recompute``. None keeps the cache from chunk to chunk.

    Raises:
        ValueError: the frames do not fill whole chunks, or ``exit_steps`` has the wrong length.
    """
    start = 0 if context_latents is None else context_latents.shape[1]
    if isinstance(noise, Tensor):
        num_frames = start + noise.shape[1]
        chunks = config.chunks(noise.shape[1], start)
        if exit_steps is not None and len(exit_steps) != len(chunks):
            raise ValueError(f"{len(exit_steps)} exit_steps for {len(chunks)} chunks")
        noise = noise.split([chunk_end - chunk_start for chunk_start, chunk_end in chunks], dim=1)
    context = _Context(cache, config, generator, num_frames, images)
    if context_latents is not None:
        context.note(context_latents)
        yield from context.encode(context_latents, prompt_embeds, 0.0)

    for index, chunk in enumerate(noise):
        if isinstance(chunk, Tensor):
            chunk = ChunkInput(chunk)
        yield from context.settle(prompt_embeds, chunk)
        if chunk.prompt_embeds is not None:
            prompt_embeds = chunk.prompt_embeds
        if denoise_chunk is None:
            steps = steps_of_chunk(timesteps, index)
            steps = steps[chunk.first_step : None if exit_steps is None else exit_steps[index] + 1]
            with_grad = grad_start_frame is not None and start >= grad_start_frame
            live = Pass(
                Stage.denoise, chunk.latents, steps[0], prompt_embeds, context.cache, context.end, with_grad=with_grad
            )
            x0 = yield from _denoise(live, steps, generator, gradient_steps)
        else:
            x0 = denoise_chunk(chunk.latents, context.end)
        context.note(x0.detach())
        context.add(x0.detach() if detach_cache else x0)
        yield FinishedChunk(start, x0)
        start += x0.shape[1]
    context.cache.drop_graph()


def _denoise(
    first: Pass, timesteps: Sequence[float], generator: Generators, gradient_steps: GradientSteps
) -> Generator[Pass, Tensor, Tensor]:
    """Predict x0 at each timestep and noise it again to the next one."""
    latents = first.latents
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        last = following is None
        with_grad = first.with_grad and (last or gradient_steps is GradientSteps.all)
        x0 = yield replace(first, latents=latents, timestep=timestep, with_grad=with_grad)
        if not last:
            latents = add_noise(x0, randn(x0.shape, generator, x0), full_timesteps(following, x0))
    return x0


class _Context:
    """The finished frames. It writes them to the cache, and stores the visible ones for a recache.

    Latents are small compared with keys and values. After a cut or a recache, positions are counted again.
    """

    def __init__(
        self,
        cache: KVCache,
        config: RolloutConfig,
        generator: Generators,
        num_frames: int | None,
        images: ContextImages | None = None,
    ) -> None:
        self.cache, self.config, self.generator, self.images = cache, config, generator, images
        self.finished = 0
        cache.configure(
            window=config.window,
            sink=config.sink,
            relative=config.relative_positions,
            fp8=config.cache_dtype is CacheDtype.fp8,
        )
        cache.reset(num_frames)
        self.frames: dict[int, Tensor] = {}
        self.end = 0
        self.uncommitted: Tensor | None = None

    def note(self, latents: Tensor) -> None:
        """Count given or generated frames [B f C H W], and decode them if the context is encoded from images."""
        self.finished += latents.shape[1]
        if self.images is not None:
            self.images.add(latents)

    def add(self, latents: Tensor) -> None:
        """Add a finished chunk [B f C H W]. It is written to the cache when the next chunk is known.

        If the chunk carries gradient, so does its context pass. What is stored for a recache carries none.
        """
        self.frames |= dict(enumerate(latents.detach().unbind(1), self.end))
        self.end += latents.shape[1]
        self.uncommitted = latents
        visible = set(self._visible())
        self.frames = {position: frame for position, frame in self.frames.items() if position in visible}

    def settle(self, prompt_embeds: Tensor, following: ChunkInput) -> Iterator[Pass]:
        """Yield the passes that prepare the cache for the next chunk."""
        style = SwitchStyle.keep if following.prompt_embeds is None else following.style
        if style is SwitchStyle.cut:
            self._begin_anew(0)
            self.finished = 0
            if self.images is not None:
                self.images.reset()
        elif self.images is not None:
            embeds = prompt_embeds if following.prompt_embeds is None else following.prompt_embeds
            yield from self._recompute(embeds, following.latents.shape[1])
        elif style is SwitchStyle.recache:
            seen = self._visible(following.latents.shape[1])
            kept = 0 if self.config.recache_sink else min(self.cache.sink, self.end)
            latents = [self.frames[position] for position in seen if kept <= position < self.end]
            self._begin_anew(kept)
            if latents:
                yield from self.encode(torch.stack(latents, dim=1), following.prompt_embeds, self.config.context_noise)
        elif self.uncommitted is not None:
            timestep = self.config.context_noise
            latents = self._noised(self.uncommitted, timestep)
            start, with_grad = self.end - latents.shape[1], latents.requires_grad
            yield Pass(Stage.context, latents, timestep, prompt_embeds, self.cache, start, with_grad=with_grad)

    def _recompute(self, prompt_embeds: Tensor, following: int) -> Iterator[Pass]:
        """Encode the latest frames again, at the first positions of the same cache. The next chunk follows them."""
        latest = sorted(self.frames)[-(self.config.window - following) :]
        if not latest:
            return
        latents = torch.stack([self.frames[position] for position in latest], dim=1)
        if self.finished > len(latest):
            latents = torch.cat([self.images.first(len(latest)).to(latents), latents[:, 1:]], dim=1)
        self.frames, self.end, self.uncommitted = {}, 0, None
        yield from self.encode(latents, prompt_embeds, self.config.context_noise)

    def encode(self, latents: Tensor, prompt_embeds: Tensor, timestep: float) -> Iterator[Pass]:
        """Commit frames [B F C H W] in one pass, in chunks as if generated. The first one takes the remainder."""
        size, alone = self.config.frames_per_chunk, int(self.config.independent_first_frame and self.end == 0)
        first = alone + (latents.shape[1] - alone) % size
        sizes = (first,) * (first > 0) + (size,) * ((latents.shape[1] - first) // size)
        noised = self._noised(latents, timestep)
        yield Pass(Stage.context, noised, timestep, prompt_embeds, self.cache, self.end, chunk_frames=sizes)
        self.add(latents)
        self.uncommitted = None

    def _begin_anew(self, kept: int) -> None:
        """Begin a cache with the first ``kept`` frames. Backward may still need the values of the old one."""
        old, self.cache = self.cache, self.cache.restarted(keep_sink=kept > 0)
        old.drop_graph()
        self.frames = {position: self.frames[position] for position in range(kept)}
        self.end, self.uncommitted = kept, None

    def _visible(self, following: int = 0) -> list[int]:
        """Return the positions that a chunk of ``following`` frames sees, its own included."""
        ranges = visible_frames(self.end + following, self.cache.window, self.cache.sink)
        return [position for low, high in ranges for position in range(low, high)]

    def _noised(self, latents: Tensor, timestep: float) -> Tensor:
        if timestep == 0:
            return latents
        noise = randn(latents.shape, self.generator, latents)
        return add_noise(latents, noise, full_timesteps(timestep, latents))
