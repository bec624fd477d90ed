"""Streaming sessions: an endless video that can be paused, steered, stopped and restarted while it is made.

Shapes: F pixel frames, H W pixel size, f latent frames of a chunk, C latent channels, h w latent size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.batching import run_together
from pipeline.request import PromptSwitch, StreamRequest
from pipeline.rollout import Stage
from pipeline.states import SessionState, Stopped, SwitchStyle
from pipeline.stream import Abandoned, LatentChunk, Stream
from pipeline.text_to_video import TextToVideo
from utils.frames import to_uint8

SOURCE_POLL_SECONDS = 0.01
Show = Callable[[Tensor], None]
"""It gets decoded frames, uint8 [F H W 3] on the CPU."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """A decoded chunk for a viewer."""

    index: int
    start_frame: int
    """First latent frame."""
    frames: Tensor
    """uint8 [F H W 3] on the CPU."""
    prompt: str
    """The prompt of the chunk."""
    timings: dict[str, float]
    """Seconds by stage: text, source (encoding of given frames), denoise, context, decode. The server adds more."""


class StreamSession:
    """A stream and its controls.

    Any thread may steer it. One thread denoises, and the same or another thread decodes.
    """

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
        self._decode_stream = pipeline.workspace.decoding_stream(device) if device.type == "cuda" else None

    @property
    def state(self) -> SessionState:
        """The state of the session."""
        return self._state

    @property
    def prompt(self) -> str:
        """The latest requested prompt."""
        return self._prompt

    def pause(self) -> None:
        """Wait before the next denoising step."""
        self._move(SessionState.paused, SessionState.running)

    def resume(self) -> None:
        """Continue after a pause."""
        self._move(SessionState.running, SessionState.paused)

    def stop(self) -> None:
        """End before the next denoising step. Chunks that are not decoded yet are dropped, and memory is freed.

        :meth:`restart` can begin again.
        """
        with self._changed:
            self._move(SessionState.stopped, SessionState.running, SessionState.paused)
            if self._state is SessionState.stopped:
                self._drop()

    def restart(self, request: StreamRequest | None = None) -> None:
        """Begin again with a new request or with the same one. This is possible in any state.

        Raises:
            ValueError: the errors of the constructor. The session then continues without a change.
        """
        with self._changed:
            request = self._request if request is None else request
            stream = Stream(self.pipeline, request)
            self._drop()
            self._stream = stream
            self._request, self._prompt = request, request.prompt
            self._state = SessionState.running
            self._changed.notify_all()

    def switch(self, prompt: str, style: SwitchStyle = SwitchStyle.recache, **settings: Any) -> None:
        """Request another prompt from the next chunk on. ``settings`` are further fields of a PromptSwitch.

        Raises:
            ValueError: an empty prompt, or settings out of their range.
        """
        switch = PromptSwitch(prompt, style, **settings)
        with self._changed:
            self._prompt = prompt
            if self._stream is not None:
                self._stream.switch(switch)

    def denoise(self, wait: bool = True) -> LatentChunk | None:
        """Return the next finished chunk, or None if the session is finished or stopped.

        Without ``wait`` it also returns None at once if the session is paused or its source has no frames yet. If a
        step fails, the session is stopped.
        """
        while True:
            alive, chunk = self._advance(wait)
            if chunk is not None or not alive:
                return chunk

    def ready(self) -> bool:
        """Return False while :meth:`denoise` would wait for frames of the source. Only its thread may call this."""
        stream = self._runnable(wait=False)
        return stream is None or self._ready(stream)

    def decode(self, block: LatentChunk, show: Show | None = None) -> Chunk:
        """Return the frames of a chunk. Chunks must be decoded in order.

        Args:
            show: called with frames uint8 [F H W 3] on the CPU as soon as they are there. At the beginning of a clip
                these are the frames of one latent, later all frames of the chunk.

        Raises:
            Stopped: the stream of the chunk was stopped or restarted.
        """
        if block.stream is not self._stream:
            raise Stopped(f"chunk {block.index} belongs to a stream that has ended")
        frames = self._pixels(block, show)
        return Chunk(block.index, block.start_frame, frames, block.prompt, block.timer.seconds())

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks, see :meth:`chunks`."""
        return self.chunks()

    def chunks(self, show: Show | None = None) -> Iterator[Chunk]:
        """Yield chunks. While a thread decodes one chunk, the next one is denoised.

        The first chunk is decoded before the second one begins, because a viewer waits for it. Leaving the loop stops
        the session. ``show`` is that of :meth:`decode`; the decoding thread calls it.
        """
        if self.pipeline.decode_last:
            yield from map(partial(self.decode, show=show), list(iter(self.denoise, None)))
            return
        decoding: deque[Future[Chunk]] = deque()
        first = True
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as worker:
            try:
                while True:
                    alive, block = self._advance(wait=not decoding)
                    if block is not None:
                        decoding.append(worker.submit(self.decode, block, show))
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
        """Run one pass. Returns whether there may be more to do, and the chunk that the pass finished or None."""
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
        """Advance the stream. Its chunk counts unless the stream was replaced in the meantime."""
        try:
            with self._stopped_by_errors():
                chunk = advance(*x0)
        except Abandoned:
            stream.close()
            return None
        if stream is not self._stream:
            stream.close()  # the thread that replaced it could not close it while this thread used it
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
        """Return the stream to continue, or None. With ``wait``, wait for the end of a pause."""
        with self._changed:
            while wait and self._state is SessionState.paused:
                self._changed.wait()
            return self._stream if self._state is SessionState.running else None

    def _pixels(self, block: LatentChunk, show: Show | None) -> Tensor:
        """Return frames uint8 [F H W 3] on the CPU. On CUDA a separate stream decodes them during denoising."""
        if self._decode_stream is None:
            return self._copied(block, show)
        self._decode_stream.wait_event(block.finished)
        with torch.cuda.stream(self._decode_stream):
            block.latents.record_stream(self._decode_stream)
            return self._copied(block, show)

    def _copied(self, block: LatentChunk, show: Show | None) -> Tensor:
        """Decode a chunk part by part into one tensor, on CUDA in pinned memory."""
        on_gpu, made = self._decode_stream is not None, 0
        frames = torch.empty(block.pixel_shape, dtype=torch.uint8, pin_memory=on_gpu)
        for part in block.stream.decode_parts(block):
            pixels = to_uint8(part[0])
            shown = frames[made : made + len(pixels)]
            shown.copy_(pixels, non_blocking=on_gpu)
            if on_gpu:
                self._decode_stream.synchronize()
            made += len(pixels)
            if show is not None:
                show(shown)
        return frames

    def _move(self, state: SessionState, *origins: SessionState) -> None:
        with self._changed:
            if self._state in origins:
                self._state = state
                self._changed.notify_all()


def denoise_together(sessions: Sequence[StreamSession]) -> list[LatentChunk | None]:
    """Return the next chunk of each session, like ``denoise(wait=False)``. Passes that are alike run as one batch.

    All sessions share one pipeline. Each makes the same chunk as without the others, up to rounding. Passes are alike
    if their shapes, timesteps and numbers of seen frames agree. This is the case for sessions that began together, and
    for sessions with full windows.
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
    """Return x0 of the next passes. Context passes run first, so that denoising steps of all sessions can be joined."""
    beginning = {one: None for one, stream in streams.items() if stream.pending is None}
    if beginning:
        return beginning
    first = any(stream.pending.stage is Stage.context for stream in streams.values())
    due = [one for one, stream in streams.items() if not first or stream.pending.stage is Stage.context]
    with ExitStack() as timers:
        for one in due:
            timers.enter_context(streams[one].timer.phase(streams[one].pending.stage.value))
        x0 = run_together(due[0].pipeline.denoiser, [streams[one].pending for one in due])
    streams[due[0]].timer.throttle()  # the passes of all sessions were queued together
    return dict(zip(due, x0, strict=True))
