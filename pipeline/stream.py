"""One video being made, pass by pass: prompts, noise, given frames and switches go in, chunks of latents come out.

Shapes: F pixel frames, H W pixel size, f latent frames of a chunk, B videos, C latent channels, h w latent size.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.denoiser import Denoiser, Prediction
from model.flow_matching import add_noise
from model.kv_cache import KVCache
from pipeline.config import Sampler
from pipeline.rollout import Block, ChunkInput, Pass, SwitchStyle, full_timesteps, rollout_passes

if TYPE_CHECKING:
    from pipeline.text_to_video import TextToVideo


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


@dataclass(frozen=True)
class Switch:
    """A change of the prompt."""

    prompt: str
    style: SwitchStyle = SwitchStyle.recache
    blend_chunks: int = 4
    """Over how many chunks ``blend`` moves to the new prompt."""
    at_frame: int = 0
    """It takes effect with the first chunk that begins at this pixel frame or later."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt to switch to is empty")
        if self.blend_chunks < 1:
            raise ValueError(f"blend_chunks={self.blend_chunks} must be at least 1")
        if self.at_frame < 0:
            raise ValueError(f"at_frame={self.at_frame} must not be negative")


@dataclass(frozen=True, eq=False)
class StreamRequest:
    """Everything that decides a stream, but for what is done to it while it runs."""

    prompt: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    seed: int = 0
    sample: int = 0
    num_frames: int | None = None
    """Latent frames, given ones included; None never ends."""
    denoising_steps: list[float] | None = None
    """As in RolloutConfig; None takes the pipeline's."""
    context_frames: Tensor | None = None
    """Given first frames [F 3 H W] in [-1, 1]: an image or the end of a video."""
    source: Iterable[Tensor | None] | None = None
    """Video to video: frames [F 3 H W] in [-1, 1], in pieces of any length; None where none has come yet. The stream
    ends with it; its last chunk is filled up with copies of the last frame."""
    strength: float = 0.6
    """Of video to video, in (0, 1]: a chunk starts from its noised source at the steps up to 1000 strength."""
    switches: tuple[Switch, ...] = ()
    """Changes of the prompt known beforehand, in the order of their frames."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1")
        frames = [switch.at_frame for switch in self.switches]
        if frames != sorted(frames):
            raise ValueError(f"switches at the frames {frames} are not in their order")


class StageTimer:
    """Seconds by stage; on CUDA, where work is only queued, between events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((stage, start, self._now()))

    def throttle(self) -> None:
        """Wait until no more than the newest stretch of work is still queued, so that a stop takes effect soon."""
        if self._device.type == "cuda" and len(self._spans) > 1:
            self._spans[-2][2].synchronize()

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage; waits for what is queued."""
        total: dict[str, float] = {}
        for stage, start, end in self._spans:
            total[stage] = total.get(stage, 0.0) + self._elapsed(start, end)
        return total

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _elapsed(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if self._device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass
class LatentChunk(Block):
    """A finished block of a stream."""

    index: int
    prompt: str
    """What was asked for when it was denoised."""
    begins: bool
    """Whether a clip begins here: at the start, and after a cut."""
    timer: StageTimer = field(repr=False)
    stream: Stream = field(repr=False)
    """What it belongs to."""
    finished: torch.cuda.Event | None = None
    """On CUDA, when its latents are there."""


class Source:
    """Frames of another video, handed on chunk by chunk."""

    def __init__(self, pieces: Iterable[Tensor | None]) -> None:
        self._pieces = iter(pieces)
        self._frames: Tensor | None = None
        self._ended = False

    def fill(self, count: int) -> bool:
        """Whether ``count`` frames are there, or all that will ever come; takes more pieces as need be."""
        while not self._ended and (self._frames is None or len(self._frames) < count):
            try:
                piece = next(self._pieces)
            except StopIteration:
                self._ended = True
                break
            if piece is None:
                return False
            self._frames = piece if self._frames is None else torch.cat([self._frames, piece])
        return True

    def take(self, count: int) -> Tensor | None:
        """The next frames [count 3 H W]; None at the end."""
        self.fill(count)
        if self._frames is None or len(self._frames) == 0:
            return None
        frames, self._frames = self._frames[:count], self._frames[count:]
        return torch.cat([frames, frames[-1:].expand(count - len(frames), -1, -1, -1)])


def _common(requests: Sequence[StreamRequest]) -> StreamRequest:
    """The first of requests that can be fulfilled together."""
    first = requests[0]
    for other in requests[1:]:
        if other.source is not None or first.source is not None:
            raise ValueError("video to video is made one by one")
        lengths = [None if each.context_frames is None else len(each.context_frames) for each in (first, other)]
        shared = [
            (each.height, each.width, each.num_frames, each.denoising_steps, each.switches) for each in (first, other)
        ]
        if shared[0] != shared[1] or lengths[0] != lengths[1]:
            raise ValueError("requests of one batch may differ in prompt, seed, sample and given frames alone")
    return first


class Abandoned(Exception):
    """A stream was abandoned in the middle of a many-step sampling."""


class _Watched:
    """A stream's denoiser for samplers that run many passes on end: none begins once the stream is abandoned."""

    def __init__(self, denoiser: Denoiser, stream: Stream) -> None:
        self.denoiser, self.stream = denoiser, stream
        self.schedule, self.transformer = denoiser.schedule, denoiser.transformer

    def __call__(self, *args, **options) -> Prediction:
        if self.stream.abandoned:
            raise Abandoned
        return self.denoiser(*args, **options)


class Stream:
    """A request being fulfilled. It is driven pass by pass from one thread at a time and knows of no other.

    Several requests that differ in prompt, seed, sample and given frames only are fulfilled as one batch; a switch then
    changes the prompt of all.

    Raises:
        ValueError: sizes, lengths or steps that do not fit, or requests that do not make a batch.
    """

    def __init__(self, pipeline: TextToVideo, *requests: StreamRequest) -> None:
        self.pipeline, self.requests = pipeline, requests
        self.request = request = _common(requests)
        self.device = pipeline.like.device
        self.config = pipeline.config
        if request.denoising_steps is not None:
            self.config = replace(pipeline.config, denoising_steps=request.denoising_steps)
        pipeline.check_size(request.height, request.width)
        given = 0 if request.context_frames is None else pipeline.codec.num_latents(len(request.context_frames))
        length = None if request.num_frames is None else request.num_frames - given
        if pipeline.sampler is not Sampler.rollout:
            self._check_many_step(given)
        elif length is not None:
            self.config.chunks(length, given)
        self.seeds = [VideoSeed(each.seed, each.prompt, each.sample) for each in requests]
        self.noise = pipeline.noise(self.seeds, request.height, request.width, length, given)
        self.next_noise: Tensor | None = None
        self.source = None if request.source is None else Source(request.source)
        self.past_frames: Tensor | None = None
        self.decoder = pipeline.codec.streaming_decoder()

        self.prompt = request.prompt
        self.embeds: Tensor | None = None
        self.scheduled = deque(request.switches)
        self.asked: deque[Switch] = deque(maxlen=1)
        self.blend: deque[Tensor] = deque()

        self.index = 0
        self.frames = 0  # pixels, of all chunks so far
        self.begins = True
        self.ended = False
        self.abandoned = False
        """Set, from any thread, to make a many-step sampler give up before its next pass."""
        self.pending: Pass | None = None
        self.timer = StageTimer(self.device)
        self._events = self._run()
        self._advancing = threading.Lock()

    def switch(self, switch: Switch) -> None:
        """Change the prompt with the next chunk; of several changes before it the last counts. Any thread may call."""
        self.asked.append(switch)

    def ready(self) -> bool:
        """Whether :meth:`step` can go on; not where frames of the source have yet to come."""
        if self.source is None or self.pending is not None or (noise := self._upcoming()) is None:
            return True
        return self.source.fill(self._pixel_frames(noise))

    def step(self) -> LatentChunk | None:
        """Run one pass at most; returns a chunk where one is finished by it. ``ended`` says that none will follow."""
        if self.pending is None:
            return self.advance(None)
        with self.timer(self.pending.stage.value):
            x0 = self.pending.run(self.pipeline.denoiser)
        self.timer.throttle()
        return self.advance(x0)

    def advance(self, x0: Tensor | None) -> LatentChunk | None:
        """As :meth:`step`, where the x0 of the pending pass is known already."""
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
        chunk = LatentChunk(event.start_frame, event.latents, self.index, self.prompt, self.begins, self.timer, self)
        if self.device.type == "cuda":
            chunk.finished = torch.cuda.current_stream(self.device).record_event()
        self.frames += self._pixel_frames(event.latents)
        self.index, self.begins, self.timer = self.index + 1, False, StageTimer(self.device)
        return chunk

    def close(self) -> None:
        """Let the caches and the given frames be freed as soon as nobody holds the stream. Any thread may call this.

        The running generator holds its stream, and the stream holds the generator: without this call, both wait for a
        garbage collection. If another thread is inside :meth:`advance`, that thread has to call this again afterwards.
        """
        self.abandoned = True
        if self._advancing.acquire(blocking=False):
            try:
                self._events.close()
            finally:
                self._advancing.release()

    def __iter__(self) -> Iterator[LatentChunk]:
        """The chunks to come."""
        while not self.ended:
            if (chunk := self.step()) is not None:
                yield chunk

    def decode(self, chunk: LatentChunk) -> Tensor:
        """Frames [B F 3 H W] in [-1, 1] of the next chunk; another thread than the one that denoises may call this."""
        if chunk.begins:
            self.decoder.reset()
        with torch.no_grad():
            return self.decoder.decode(chunk.latents)

    def _run(self) -> Generator[Pass | Block, Tensor | None, None]:
        request, pipeline = self.request, self.pipeline
        with self.timer("text"):
            self.embeds = pipeline.text_encoder.encode([each.prompt for each in self.requests])
        context = None
        if request.context_frames is not None:
            with self.timer("source"):
                context = pipeline.encode(torch.stack([each.context_frames for each in self.requests]))
            yield Block(0, context)
        if pipeline.sampler is not Sampler.rollout:
            denoiser = _Watched(pipeline.denoiser, self)
            yield from pipeline.many_step_blocks(denoiser, self.noise, self.embeds, context)
            return
        yield from rollout_passes(
            self.config.timesteps(pipeline.denoiser),
            self._inputs(),
            self.embeds,
            KVCache(pipeline.denoiser.transformer.config.num_layers),
            self.config,
            context_latents=context,
            generator=[seed.generator("steps") for seed in self.seeds],
            num_frames=request.num_frames,
        )

    def _check_many_step(self, given: int) -> None:
        request, sampler = self.request, self.pipeline.sampler.value
        if request.source is not None or request.switches or request.denoising_steps is not None:
            raise ValueError(f"sampler {sampler} has neither video to video nor prompt switches nor denoising steps")
        if request.num_frames is None:
            raise ValueError(f"sampler {sampler} needs num_frames")
        if self.pipeline.sampler is Sampler.causal_many_step:
            self.config.chunks(request.num_frames - given, given)
        elif given:
            raise ValueError(f"sampler {sampler} takes no given frames")

    def _inputs(self) -> Iterator[ChunkInput]:
        """What each chunk is made from, decided when its turn comes."""
        while (latents := self._upcoming()) is not None:
            embeds, style = self._next_prompt()
            self.begins = self.begins or (embeds is not None and style is SwitchStyle.cut)
            first_step = 0
            if self.source is not None:
                with self.timer("source"):
                    frames = self.source.take(self._pixel_frames(latents))
                    if frames is None:
                        return
                    source = self._encode(frames, latents.shape[1])
                first_step = self._first_step()
                timestep = self.config.timesteps(self.pipeline.denoiser)[first_step]
                latents = add_noise(source, latents, full_timesteps(timestep, latents))
            self.next_noise = None
            yield ChunkInput(latents, first_step, embeds, style)

    def _upcoming(self) -> Tensor | None:
        """Noise [B f C h w] of the chunk that comes next; None at the end."""
        if self.next_noise is None:
            self.next_noise = next(self.noise, None)
        return self.next_noise

    def _next_prompt(self) -> tuple[Tensor | None, SwitchStyle]:
        """Embeddings where they change with the next chunk."""
        switch = self.asked.pop() if self.asked else None
        while self.scheduled and self.scheduled[0].at_frame <= self.frames:
            switch = self.scheduled.popleft()
        style = SwitchStyle.blend
        if switch is not None:
            with self.timer("text"):
                target = self.pipeline.text_encoder.encode([switch.prompt]).expand_as(self.embeds)
            style, self.prompt = switch.style, switch.prompt
            count = switch.blend_chunks if style is SwitchStyle.blend else 1
            self.blend = deque(torch.lerp(self.embeds, target, (k + 1) / count) for k in range(count))
        if not self.blend:
            return None, style
        self.embeds = self.blend.popleft()
        return self.embeds, style

    def _pixel_frames(self, latents: Tensor) -> int:
        """Pixel frames of the chunk [B f C h w] at hand."""
        frames, codec = latents.shape[1], self.pipeline.codec
        return codec.num_frames(frames) if self.begins else frames * codec.temporal_scale

    def _encode(self, frames: Tensor, latent_frames: int) -> Tensor:
        """Latents [1 f C h w] of a chunk of the source.

        The first latent of an encoding stands for one frame alone, so a chunk that goes on with a clip is encoded
        behind the last frames before it, whose latents are dropped.
        """
        past = None if self.begins else self.past_frames
        self.past_frames = frames[-1 - self.pipeline.codec.temporal_scale :]
        if past is not None:
            frames = torch.cat([past, frames])
        return self.pipeline.encode(frames[None])[:, -latent_frames:]

    def _first_step(self) -> int:
        """The first step that is not above the strength, or the last of all."""
        steps = self.config.denoising_steps
        return next((i for i, step in enumerate(steps) if step <= 1000 * self.request.strength), len(steps) - 1)
