"""Streaming sessions: an endless video that is paused, steered, stopped and started again while it is made.

Shapes: F pixel frames, H W pixel size, f latent frames of a chunk, C latent channels, h w latent size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from pipeline.batching import run_together
from pipeline.request import PromptSwitch, StreamRequest
from pipeline.rollout import Stage, SwitchStyle
from pipeline.stream import Abandoned, LatentChunk, Stream
from pipeline.text_to_video import TextToVideo
from utils.video import to_uint8

SOURCE_POLL_SECONDS = 0.01


class SessionState(Enum):
    """What a session is doing."""

    running = "running"
    paused = "paused"
    stopped = "stopped"
    finished = "finished"


class Stopped(Exception):
    """A block is of a stream that has been stopped or started again since."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a viewer gets."""

    index: int
    start_frame: int
    """First latent frame."""
    frames: Tensor
    """uint8 [F H W 3] on the CPU."""
    prompt: str
    """What was asked for when it was denoised."""
    timings: dict[str, float]
    """Seconds by stage: text, source (encoding given frames), denoise, context, decode; later stages add theirs."""


class StreamSession:
    """A stream and its controls. Any thread may steer it; one thread denoises, one (the same or another) decodes."""

    def __init__(self, pipeline: TextToVideo, request: StreamRequest) -> None:
        """Nothing is computed yet.

        Raises:
            ValueError: sizes, lengths or steps that do not fit.
        """
        self.pipeline = pipeline
        self._changed = threading.Condition()
        self._request = request
        self._stream: Stream | None = Stream(pipeline, request)
        self._prompt = request.prompt
        self._state = SessionState.running
        device = self._stream.device
        self._decode_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def state(self) -> SessionState:
        """What it is doing."""
        return self._state

    @property
    def prompt(self) -> str:
        """What was last asked for."""
        return self._prompt

    def pause(self) -> None:
        """Hold before the next denoising step."""
        self._move(SessionState.paused, SessionState.running)

    def resume(self) -> None:
        """Go on where it paused."""
        self._move(SessionState.running, SessionState.paused)

    def stop(self) -> None:
        """End before the next denoising step, unless restarted; what is not decoded yet is dropped, memory freed."""
        with self._changed:
            self._move(SessionState.stopped, SessionState.running, SessionState.paused)
            if self._state is SessionState.stopped:
                self._drop()

    def restart(self, request: StreamRequest | None = None) -> None:
        """Begin again with a new request or the same one, whatever the state.

        Raises:
            ValueError: as the constructor does; the session then goes on as it was.
        """
        with self._changed:
            request = self._request if request is None else request
            stream = Stream(self.pipeline, request)
            self._drop()
            self._stream = stream
            self._request, self._prompt = request, request.prompt
            self._state = SessionState.running
            self._changed.notify_all()

    def switch(self, prompt: str, style: SwitchStyle = SwitchStyle.recache, *, blend_chunks: int = 4) -> None:
        """Ask for something else from the next chunk on.

        Raises:
            ValueError: an empty prompt, or ``blend_chunks`` below 1.
        """
        switch = PromptSwitch(prompt, style, blend_chunks)
        with self._changed:
            self._prompt = prompt
            if self._stream is not None:
                self._stream.switch(switch)

    def denoise(self, wait: bool = True) -> LatentChunk | None:
        """The next finished chunk; None when finished or stopped.

        Without ``wait`` also None at once where it is paused or its source has no frames yet. A session whose step
        fails is stopped.
        """
        while True:
            alive, chunk = self._advance(wait)
            if chunk is not None or not alive:
                return chunk

    def decode(self, block: LatentChunk) -> Chunk:
        """The frames of a block, block after block.

        Raises:
            Stopped: the stream it belongs to was stopped or restarted.
        """
        if block.stream is not self._stream:
            raise Stopped(f"chunk {block.index} is of a stream that is over")
        frames = self._pixels(block)
        return Chunk(block.index, block.start_frame, frames, block.prompt, block.timer.seconds())

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks as they come. While one is decoded, on a thread of its own, the next is denoised, but no more.

        The first is decoded before anything else is begun: somebody waits for it.

        Leaving the loop stops the session.
        """
        if self.pipeline.decode_last:
            yield from map(self.decode, list(iter(self.denoise, None)))
            return
        decoding: deque[Future[Chunk]] = deque()
        first = True
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as worker:
            try:
                while True:
                    alive, block = self._advance(wait=not decoding)
                    if block is not None:
                        decoding.append(worker.submit(self.decode, block))
                    if decoding and (first or not alive or len(decoding) > 1 or decoding[0].done()):
                        chunk = decoding.popleft().result()
                        first = False
                        yield chunk
                    elif not alive:
                        return
            except Stopped:
                return
            finally:
                self.stop()

    def _advance(self, wait: bool) -> tuple[bool, LatentChunk | None]:
        """Run one pass: whether there may be more to do, and the chunk it finished, if any."""
        stream = self._runnable(wait)
        if stream is None:
            return False, None
        if self._ready(stream):
            return True, self._go_on(stream, stream.step)
        if wait:
            with self._changed:
                self._changed.wait(SOURCE_POLL_SECONDS)
        return wait, None

    def _ready(self, stream: Stream) -> bool:
        with self._stopped_by_errors():
            return stream.ready()

    def _go_on(self, stream: Stream, advance: Callable[..., LatentChunk | None], *x0: Tensor) -> LatentChunk | None:
        """Advance the stream; a chunk of it counts unless it was replaced meanwhile."""
        try:
            with self._stopped_by_errors():
                chunk = advance(*x0)
        except Abandoned:
            stream.close()
            return None
        if stream is not self._stream:
            stream.close()  # whoever replaced it could not, while this thread was inside it
            return None
        if stream.ended:
            self._move(SessionState.finished, SessionState.running, SessionState.paused)
        return chunk

    @contextmanager
    def _stopped_by_errors(self) -> Iterator[None]:
        try:
            yield
        except Abandoned:
            raise
        except BaseException:
            self.stop()
            raise

    def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _runnable(self, wait: bool) -> Stream | None:
        """The stream to go on with; with ``wait`` a paused session is waited for."""
        with self._changed:
            while wait and self._state is SessionState.paused:
                self._changed.wait()
            return self._stream if self._state is SessionState.running else None

    def _pixels(self, block: LatentChunk) -> Tensor:
        """uint8 [F H W 3] on the CPU; on CUDA beside the denoising, in a stream of its own through pinned memory."""
        if self._decode_stream is None:
            with block.timer("decode"):
                return to_uint8(block.stream.decode(block)[0]).cpu().contiguous()
        self._decode_stream.wait_event(block.finished)
        with torch.cuda.stream(self._decode_stream), block.timer("decode"):
            block.latents.record_stream(self._decode_stream)
            pixels = to_uint8(block.stream.decode(block)[0]).contiguous()
            frames = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            frames.copy_(pixels, non_blocking=True)
            self._decode_stream.synchronize()
        return frames

    def _move(self, state: SessionState, *origins: SessionState) -> None:
        with self._changed:
            if self._state in origins:
                self._state = state
                self._changed.notify_all()


def denoise_together(sessions: Sequence[StreamSession]) -> list[LatentChunk | None]:
    """The next chunk of each session of one pipeline, as their ``denoise(wait=False)``; like passes run as one batch.

    The chunks are those each would make alone, up to rounding. Passes are alike where shapes, timesteps and the number
    of frames they see agree: of sessions that began together, or whose windows are full.
    """
    chunks: dict[StreamSession, LatentChunk] = {}
    while True:
        streams = {one: one._runnable(wait=False) for one in sessions if one not in chunks}
        streams = {one: stream for one, stream in streams.items() if stream is not None and one._ready(stream)}
        if not streams:
            return [chunks.get(one) for one in sessions]
        for one, x0 in _run_round(streams).items():
            if (chunk := one._go_on(streams[one], streams[one].advance, x0)) is not None:
                chunks[one] = chunk


def _run_round(streams: dict[StreamSession, Stream]) -> dict[StreamSession, Tensor | None]:
    """x0 of the passes to run next; context passes before any other, so that the denoising steps meet."""
    beginning = {one: None for one, stream in streams.items() if stream.pending is None}
    if beginning:
        return beginning
    first = any(stream.pending.stage is Stage.context for stream in streams.values())
    due = [one for one, stream in streams.items() if not first or stream.pending.stage is Stage.context]
    with ExitStack() as timers:
        for one in due:
            timers.enter_context(streams[one].timer(streams[one].pending.stage.value))
        x0 = run_together(due[0].pipeline.denoiser, [streams[one].pending for one in due])
    return dict(zip(due, x0, strict=True))
