"""Makes one video, pass by pass, from prompts, noise, given frames and switches. The results are chunks of latents.

Shapes: F pixel frames, H W pixel size, f latent frames of a chunk, B videos, C latent channels, h w latent size.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from model.codec import VideoCodec
from model.denoiser import Denoiser, Prediction
from model.flow_matching import add_noise, full_timesteps
from pipeline.config import Sampler
from pipeline.request import PromptSwitch, StreamRequest
from pipeline.rollout import ChunkInput, FinishedChunk, Pass, randn, rollout_passes
from pipeline.sampling import many_step_chunks
from pipeline.source import SourceEncoder, SourceFrames
from pipeline.states import SwitchStyle
from pipeline.steps import list_for_chunks, steps_of_chunk
from pipeline.text_to_video import TextToVideo
from utils.timer import Stopwatch


@dataclass
class LatentChunk(FinishedChunk):
    """A finished chunk of a stream."""

    index: int
    prompt: str
    """The prompt of the chunk."""
    begins: bool
    """True if a clip begins with this chunk: at the start of the stream, and after a cut."""
    timer: Stopwatch = field(repr=False)
    stream: Stream = field(repr=False)
    """The stream it belongs to."""
    finished: torch.cuda.Event | None = None
    """On CUDA, the event after which its latents are complete."""

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """The shape of the decoded frames of one video, F H W 3."""
        codec = self.stream.pipeline.codec
        height, width = (side * codec.spatial_scale for side in self.latents.shape[-2:])
        return pixel_frames(codec, self.latents, begins=self.begins), height, width, 3


class Abandoned(Exception):
    """A stream was abandoned during a many-step sampling."""


class Stream:
    """Carries out a request. One thread at a time runs it, pass by pass.

    Several requests that differ only in prompt, seed, sample and given frames run as one batch. A switch then changes
    the prompt of all of them.

    Raises:
        ValueError: sizes, lengths or steps do not fit, or the requests cannot form one batch.
    """

    def __init__(self, pipeline: TextToVideo, *requests: StreamRequest) -> None:
        self.pipeline, self.requests = pipeline, requests
        self.request = request = _common(requests)
        self.like = pipeline.denoiser.transformer.patch_embedding.weight  # it never leaves the device
        self.device = self.like.device
        self.config = pipeline.config
        if request.denoising_steps is not None:
            self.config = replace(pipeline.config, denoising_steps=request.denoising_steps)
        pipeline.check_size(request.height, request.width)
        given = 0 if request.context_frames is None else pipeline.codec.num_latents(len(request.context_frames))
        self._check_length(given)
        self.sizes = iter(self._chunk_sizes(given))
        self.noise = initial_noise(requests, self.sizes, pipeline.codec, self.like)
        self.next_noise: Tensor | None = None
        self.encode = partial(encode, pipeline.codec, self.like)
        self.source = None if request.source is None else SourceFrames(request.source)
        self.source_encoder = SourceEncoder(self.encode, pipeline.codec.temporal_scale)
        self.decoder = pipeline.codec.streaming_decoder()

        self.strength = request.strength
        self.steps = list_for_chunks(self.config.denoising_steps)
        self.timesteps = list_for_chunks(self.config.timesteps(pipeline.denoiser))
        self.generators = [each.generator("steps") for each in requests]
        self.prompt = request.prompt
        self.embeds: Tensor | None = None
        self.scheduled = deque(request.switches)
        self.asked: deque[PromptSwitch] = deque(maxlen=1)
        self.blend: deque[Tensor] = deque()

        self.index = 0
        self.frames = 0  # pixel frames of all chunks so far
        self.begins = True
        self.ended = False
        self.abandoned = False
        self.pending: Pass | None = None
        self.timer = Stopwatch(self.device)
        self._events = self._run()
        self._advancing = threading.Lock()

    def switch(self, switch: PromptSwitch) -> None:
        """Change the prompt with the next chunk. If there are several changes before it, the last one counts.

        Any thread may call this.
        """
        self.asked.append(switch)

    def ready(self) -> bool:
        """Return whether :meth:`step` can continue. It cannot while frames of the source are missing."""
        if self.source is None or self.pending is not None or (noise := self._upcoming()) is None:
            return True
        return self.source.fill(self._pixel_frames(noise))

    def step(self) -> LatentChunk | None:
        """Run at most one pass. Returns a chunk if the pass finished one. ``ended`` is True after the last one."""
        if self.pending is None:
            return self.advance(None)
        with self.timer.phase(self.pending.stage.value):
            x0 = self.compute()
        self.timer.throttle()
        return self.advance(x0)

    @torch.inference_mode()
    def compute(self) -> Tensor:
        """Return x0 of the pending pass. Inference mode saves an eighth of the time of a small model on a CPU."""
        return self.pending.run(self.pipeline.denoiser)

    def advance(self, x0: Tensor | None) -> LatentChunk | None:
        """Like :meth:`step`, but with the x0 of the pending pass given."""
        self.pending = None
        try:
            with self._advancing:
                event = self._events.send(x0)
        except StopIteration:
            self.ended = True
            return None
        if isinstance(event, Pass):
            self.pending = event
            return None
        on_cuda = self.device.type == "cuda"
        chunk = LatentChunk(
            event.start_frame,
            event.latents,
            self.index,
            self.prompt,
            self.begins,
            self.timer,
            self,
            finished=torch.cuda.current_stream(self.device).record_event() if on_cuda else None,
        )
        self.frames += self._pixel_frames(event.latents)
        self.index, self.begins, self.timer = self.index + 1, False, Stopwatch(self.device)
        return chunk

    def close(self) -> None:
        """Free the caches and the given frames when the stream is no longer used. Any thread may call this.

        A many-step sampler stops before its next pass. The running generator holds its stream, and the stream holds
        the generator: without this call, both wait for a garbage collection. If another thread is inside
        :meth:`advance`, that thread has to call this again afterwards.
        """
        self.abandoned = True
        if self._advancing.acquire(blocking=False):
            try:
                self._events.close()
            finally:
                self._advancing.release()

    def __iter__(self) -> Iterator[LatentChunk]:
        """Yield the remaining chunks."""
        while not self.ended:
            if (chunk := self.step()) is not None:
                yield chunk

    def decode(self, chunk: LatentChunk) -> Tensor:
        """Decode the next chunk to frames [B F 3 H W] in [-1, 1]. One thread may decode while another denoises."""
        parts = list(self.decode_parts(chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def decode_parts(self, chunk: LatentChunk) -> Iterator[Tensor]:
        """Decode the next chunk, and yield frames [B F 3 H W] in [-1, 1] as soon as they are there.

        At the beginning of a clip, the latents of a chunk are decoded one by one, so that a viewer sees the first frame
        before the chunk is decoded. Later chunks are decoded in one piece.
        """
        if chunk.begins:
            self.decoder.reset()
        size = self.config.frames_per_chunk
        for index, latents in enumerate(chunk.latents.split(size, dim=1)):
            for part in latents.split(1 if chunk.begins and index == 0 else size, dim=1):
                with torch.no_grad(), chunk.timer.phase("decode"):
                    frames = self.decoder.decode(part)
                yield frames

    def _run(self) -> Generator[Pass | FinishedChunk, Tensor | None, None]:
        request, pipeline = self.request, self.pipeline
        with self.timer.phase("text"):
            self.embeds = pipeline.text_encoder.encode([each.prompt for each in self.requests])
        context = None
        if request.context_frames is not None:
            with self.timer.phase("source"):
                context = self.encode(torch.stack([each.context_frames for each in self.requests]))
            yield FinishedChunk(0, context)
        if pipeline.sampler is not Sampler.rollout:
            yield from self._many_steps(context)
            return
        yield from rollout_passes(
            self.timesteps,
            self._inputs(),
            self.embeds,
            pipeline.cache(),
            self.config,
            context_latents=context,
            generator=self.generators,
            num_frames=request.num_frames,
            images=self.config.context_images(pipeline.codec),
        )

    def _many_steps(self, context: Tensor | None) -> Iterator[FinishedChunk]:
        pipeline = self.pipeline
        return many_step_chunks(
            _Watched(pipeline.denoiser, self),
            torch.cat(list(self.noise), dim=1),
            self.embeds,
            pipeline.text_encoder.encode([pipeline.sampling.negative_prompt] * len(self.embeds)),
            self.config,
            pipeline.sampling,
            causal=pipeline.sampler is Sampler.causal_many_step,
            context_latents=context,
        )

    def _check_length(self, given: int) -> None:
        """Raise an error if the length after ``given`` latent frames does not fill whole chunks."""
        request, sampler = self.request, self.pipeline.sampler
        if sampler is Sampler.rollout:
            if request.num_frames is not None:
                self.config.chunks(request.num_frames - given, given)
            return
        if request.source is not None or request.switches or request.denoising_steps is not None:
            raise ValueError(f"sampler {sampler.value} takes no source video, prompt switches or denoising steps")
        if request.num_frames is None:
            raise ValueError(f"sampler {sampler.value} needs num_frames")
        if sampler is Sampler.causal_many_step:
            self.config.chunks(request.num_frames - given, given)
        elif given:
            raise ValueError(f"sampler {sampler.value} takes no given frames")

    def _chunk_sizes(self, given: int) -> Iterable[int]:
        """Return the latent frames of each chunk after ``given`` latent frames."""
        num_frames = self.request.num_frames
        if num_frames is None:
            first = [1] if self.config.independent_first_frame and not given else []
            return itertools.chain(first, itertools.repeat(self.config.frames_per_chunk))
        if self.pipeline.sampler is Sampler.many_step:
            return [num_frames - given]
        return [end - start for start, end in self.config.chunks(num_frames - given, given)]

    def _inputs(self) -> Iterator[ChunkInput]:
        """Yield the inputs of each chunk. They are decided when the chunk begins."""
        for chunk in itertools.count():
            if self._upcoming() is None:
                return
            embeds, style = self._next_prompt(chunk)
            latents = self._upcoming()
            self.begins = self.begins or (embeds is not None and style is SwitchStyle.cut)
            first_step = 0
            if self.source is not None:
                with self.timer.phase("source"):
                    frames = self.source.take(self._pixel_frames(latents))
                    if frames is None:
                        return
                    source = self.source_encoder(frames, latents.shape[1], begins=self.begins)
                first_step = self._first_step(chunk)
                timestep = steps_of_chunk(self.timesteps, chunk)[first_step]
                latents = add_noise(source, latents, full_timesteps(timestep, latents))
            self.next_noise = None
            yield ChunkInput(latents, first_step, embeds, style)

    def _upcoming(self) -> Tensor | None:
        """Return the noise [B f C h w] of the next chunk. None at the end."""
        if self.next_noise is None:
            self.next_noise = next(self.noise, None)
        return self.next_noise

    def _next_prompt(self, chunk: int) -> tuple[Tensor | None, SwitchStyle]:
        """Return the prompt embeddings of the generated chunk ``chunk``, the next one, if they change, else None."""
        switch = self.asked.pop() if self.asked else None
        while self.scheduled and self.scheduled[0].at_frame <= self.frames:
            switch = self.scheduled.popleft()
        style = SwitchStyle.blend
        if switch is not None:
            self._change_settings(switch, chunk)
            with self.timer.phase("text"):
                target = self.pipeline.text_encoder.encode([switch.prompt]).expand_as(self.embeds)
            style, self.prompt = switch.style, switch.prompt
            count = switch.blend_chunks if style is SwitchStyle.blend else 1
            self.blend = deque(torch.lerp(self.embeds, target, (k + 1) / count) for k in range(count))
        if not self.blend:
            return None, style
        self.embeds = self.blend.popleft()
        return self.embeds, style

    def _change_settings(self, switch: PromptSwitch, chunk: int) -> None:
        """Change the seed, the steps and the strength from the generated chunk ``chunk`` on."""
        if switch.strength is not None:
            self.strength = switch.strength
        if switch.denoising_steps is not None:
            timesteps = replace(self.config, denoising_steps=switch.denoising_steps).timesteps(self.pipeline.denoiser)
            for steps, changed in ((self.steps, switch.denoising_steps), (self.timesteps, timesteps)):
                steps[:] = [*(steps_of_chunk(steps, before) for before in range(chunk)), changed]
        if switch.seed is not None:
            self.requests = tuple(replace(each, seed=switch.seed) for each in self.requests)
            sizes = itertools.chain([self.next_noise.shape[1]], self.sizes)
            self.noise = initial_noise(self.requests, sizes, self.pipeline.codec, self.like)
            self.next_noise = None
            for generator, request in zip(self.generators, self.requests, strict=True):
                generator.set_state(request.generator("steps").get_state())

    def _pixel_frames(self, latents: Tensor) -> int:
        """Return the number of pixel frames of the next chunk, whose latents are [B f C h w]."""
        return pixel_frames(self.pipeline.codec, latents, begins=self.begins)

    def _first_step(self, chunk: int) -> int:
        """Return the index of the first denoising step that is at most 1000 * strength; the last step if none is."""
        steps = steps_of_chunk(self.steps, chunk)
        return next((i for i, step in enumerate(steps) if step <= 1000 * self.strength), len(steps) - 1)


def initial_noise(
    requests: Sequence[StreamRequest], chunk_sizes: Iterable[int], codec: VideoCodec, like: Tensor
) -> Iterator[Tensor]:
    """Yield the initial noise [B f C h w] of each chunk. Each video has its own generator."""
    scale, request = codec.spatial_scale, requests[0]
    shape = codec.latent_channels, request.height // scale, request.width // scale
    generators = [each.generator("noise") for each in requests]
    for frames in chunk_sizes:
        yield randn((len(generators), frames, *shape), generators, like)


def pixel_frames(codec: VideoCodec, latents: Tensor, *, begins: bool) -> int:
    """Return the number of pixel frames of latents [B f C h w]. ``begins``: a clip begins with them."""
    frames = latents.shape[1]
    return codec.num_frames(frames) if begins else frames * codec.temporal_scale


@torch.no_grad()
def encode(codec: VideoCodec, like: Tensor, frames: Tensor) -> Tensor:
    """Encode frames [B F 3 H W] in [-1, 1] to latents [B f C h w], on the device and in the dtype of ``like``."""
    return codec.encode(frames.to(like)).to(like)


class _Watched:
    """The denoiser of a stream, for samplers that run many passes. After the stream is abandoned, no pass begins."""

    def __init__(self, denoiser: Denoiser, stream: Stream) -> None:
        self.denoiser, self.stream = denoiser, stream
        self.schedule, self.transformer = denoiser.schedule, denoiser.transformer

    def __call__(self, *args, **options) -> Prediction:
        if self.stream.abandoned:
            raise Abandoned
        return self.denoiser(*args, **options)


def _common(requests: Sequence[StreamRequest]) -> StreamRequest:
    """Return the first request, if all of them can run as one batch."""
    first = requests[0]
    for other in requests[1:]:
        if other.source is not None or first.source is not None:
            raise ValueError("requests with a source video cannot be made as a batch")
        lengths = [None if each.context_frames is None else len(each.context_frames) for each in (first, other)]
        shared = [
            (each.height, each.width, each.num_frames, each.denoising_steps, each.switches) for each in (first, other)
        ]
        if shared[0] != shared[1] or lengths[0] != lengths[1]:
            raise ValueError("requests of one batch may differ in prompt, seed, sample and given frames alone")
    return first
