"""Several viewers, one model: a seat for each of the first few, a line for the rest, and turns of one chunk each.

Three threads, in a row: the first denoises (the one thread that drives the sessions), the second decodes and packs
frames, the third writes clips. The queues between them are short, so the slowest sets the pace.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.serving.clips import ClipRecorder, Gallery
from pipeline.serving.frames import frame_messages
from pipeline.serving.pace import Pace

if TYPE_CHECKING:
    from pipeline.session import Chunk, SessionState, SwitchStyle

log = logging.getLogger(__name__)

QUEUED_CHUNKS = 2  # between two threads
BATCH_SECONDS = 0.25  # so much before it is wanted, a chunk may be made along with another
IDLE_SECONDS = 600.0  # without a sign of life after which a seat is given up
IDLE_SECONDS_IN_DEMAND = 20.0  # the same while others wait

Message = dict[str, Any] | bytes


@dataclass(frozen=True)
class StreamSpec:
    """What a viewer asked for, checked by the API; the demo turns it into a session."""

    prompt: str
    height: int
    width: int
    fps: int
    seed: int = 0
    num_frames: int | None = None
    """Latent frames; None never ends."""
    steps: int | None = None
    """Denoising steps a chunk; None is the model's own number."""
    decoder: str = ""
    """Name of the video decoder; "" is the first one on offer."""
    precision: str = "full"
    """Of the matrix products: full, or the name of a ``pipeline.optimize.Quantization``."""
    compiled: bool = False
    """Compile the denoiser."""
    scale: int = 1
    """Whole-number enlargement of the clip's file."""
    image: bytes | None = field(default=None, repr=False)
    """First frame, as a PNG."""

    @property
    def kind(self) -> tuple:
        """Streams of the same kind can be made as one batch."""
        return self.height, self.width, self.steps, self.decoder, self.precision, self.compiled


@dataclass(frozen=True)
class Switch:
    """A new prompt for a running stream."""

    prompt: str
    style: str
    """Name of a ``pipeline.rollout.SwitchStyle``."""


class Session(Protocol):
    """What the hub needs of ``pipeline.session.StreamSession``."""

    @property
    def state(self) -> SessionState: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...
    def switch(self, prompt: str, style: SwitchStyle) -> None: ...
    def denoise(self, wait: bool = True) -> Any: ...
    def decode(self, block: Any) -> Chunk: ...


class Stream:
    """One viewer's running video. Its methods may be called from any thread."""

    def __init__(self, hub: Hub, number: int, spec: StreamSpec, deliver: Callable[[Message], None], owner: str) -> None:
        self.number = number
        self.spec = spec
        self.deliver = deliver
        self.owner = owner
        self.pace = Pace(spec.fps)
        self.session: Session | None = None
        self.recorder: ClipRecorder | None = None
        self.paused = self.stopped = False
        self.last_turn = 0.0
        self.wanted_since = 0.0
        self.heard_at = time.monotonic()
        self._hub = hub
        self.switches: list[tuple[int, Switch]] = []  # with the latent frame each took effect at
        self._waiting: Switch | None = None  # for the session to hear of
        self._taken: Switch | None = None  # by the session, but not in effect yet

    def pause(self) -> None:
        """Stop within a denoising step; the viewer keeps its seat."""
        self._command(lambda session: session.pause(), paused=True)

    def resume(self) -> None:
        """Go on where it paused."""
        self._command(lambda session: session.resume(), paused=False)

    def stop(self) -> None:
        """End within a denoising step; the clip so far is kept."""
        with self._hub.wake:
            self.stopped = True
        self._command(lambda session: session.stop(), paused=False)
        self._hub.fill_seats()

    def switch(self, switch: Switch) -> None:
        """Change the prompt at the next chunk; of several, all but the last are forgotten."""
        with self._hub.wake:
            self._waiting = switch
            self.heard_at = time.monotonic()

    def frame_sent(self) -> None:
        """A frame of it was written to the socket."""
        with self._hub.wake:
            self.pace.sent += 1
            self._hub.wake.notify_all()

    def frames_shown(self, count: int) -> None:
        """The viewer has shown the first ``count`` frames."""
        with self._hub.wake:
            self.heard_at = time.monotonic()
            self.pace.report_shown(count, self.heard_at)
            self._hub.wake.notify_all()

    def take_switch(self) -> Switch | None:
        """The change that came since the last turn."""
        with self._hub.wake:
            switch, self._waiting = self._waiting, None
        self._taken = switch or self._taken
        return switch

    def note_switch(self, block: Any) -> None:
        """Remember at which frame a change took effect: at once, or one block later where it came within one."""
        if self._taken is not None and block.prompt == self._taken.prompt:
            self.switches.append((block.start_frame, self._taken))
            self._taken = None

    def _command(self, command: Callable[[Session], None], *, paused: bool) -> None:
        with self._hub.wake:
            self.paused = paused
            self.heard_at = self.wanted_since = time.monotonic()
            session = self.session
            self._hub.wake.notify_all()
        if session is not None:
            command(session)


@dataclass
class Counters:
    """Totals since the start, for /metrics."""

    streams: int = 0
    chunks: int = 0
    frames: int = 0
    failures: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""


class Hub:
    """Seats, turns and the threads behind them.

    Args:
        max_viewers: streams that run at once; the others wait in line.
        gallery: where finished clips go.
        denoise_together: the next blocks of several sessions of one kind, made as a batch; None makes one by one.
    """

    def __init__(
        self,
        max_viewers: int,
        gallery: Gallery,
        denoise_together: Callable[[list[Session]], list[Any]] | None = None,
    ) -> None:
        if max_viewers < 1:
            raise ValueError(f"max_viewers={max_viewers} must be at least 1")
        self.max_viewers = max_viewers
        self.wake = threading.Condition()
        self.counters = Counters()
        self.seated: list[Stream] = []
        self.line: list[Stream] = []
        self._gallery = gallery
        self._denoise_together = denoise_together
        self._open_session: Callable[[StreamSpec], Session] | None = None
        self._numbers = 0
        self._closing = False
        self._to_decode: queue.Queue = queue.Queue(QUEUED_CHUNKS)
        self._to_record: queue.Queue = queue.Queue(QUEUED_CHUNKS)
        stages = {"generate": self._generate, "decode": self._decode, "record": self._write}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in stages.items()]
        for thread in self._threads:
            thread.start()

    def ready(self, open_session: Callable[[StreamSpec], Session]) -> None:
        """The model is loaded: streams that were asked for begin."""
        with self.wake:
            self._open_session = open_session
            self.wake.notify_all()

    def submit(self, spec: StreamSpec, deliver: Callable[[Message], None], owner: str) -> Stream:
        """A new stream, seated or in line. ``deliver`` gets its messages from other threads and must not block."""
        with self.wake:
            self._numbers += 1
            stream = Stream(self, self._numbers, spec, deliver, owner)
            self.counters.streams += 1
            self.line.append(stream)
        self.fill_seats()
        return stream

    def close(self) -> None:
        """Stop every stream and the threads; clips are finished first."""
        with self.wake:
            self._closing = True
            streams = [*self.seated, *self.line]
        for stream in streams:
            stream.stop()
        with self.wake:
            self.wake.notify_all()
        for thread in self._threads:
            thread.join()

    def fill_seats(self) -> None:
        """Seat who comes next, and tell the others their place."""
        with self.wake:
            for stream in [stream for stream in self.line if stream.stopped]:
                self.line.remove(stream)
                stream.deliver({"type": "ended", "stream": stream.number, "frames": 0})
            while self.line and len(self.seated) < self.max_viewers:
                stream = self.line.pop(0)
                stream.heard_at = stream.wanted_since = time.monotonic()
                self.seated.append(stream)
                stream.deliver({"type": "seated", "stream": stream.number})
            for place, stream in enumerate(self.line, start=1):
                stream.deliver({"type": "waiting", "stream": stream.number, "place": place})
            self.wake.notify_all()

    def _generate(self) -> None:
        while streams := self._next_turn():
            try:
                self._take_turn(streams)
            except Exception as error:  # one viewer's failure is not the others'
                for stream in streams:
                    self._fail(stream, error)
                    self._end(stream)
        self._to_decode.put(None)

    def _next_turn(self) -> list[Stream]:
        """The stream served longest ago among those that want a chunk, and those that can be made with it.

        Waits for one; empty once all is closed.
        """
        with self.wake:
            while not (self._closing and not self.seated):
                self._stop_idle()
                now = time.monotonic()
                due = {stream: self._due(stream) for stream in self.seated}
                wanting = sorted((s for s in due if due[s] <= now), key=lambda stream: stream.last_turn)
                if wanting:
                    chosen = self._together(wanting[0], due, now)
                    for stream in chosen:
                        stream.last_turn = now
                        stream.wanted_since = max(min(due[stream], now), stream.wanted_since)
                    return chosen
                self.wake.wait(min(min(due.values(), default=math.inf) - now, 1.0))
        return []

    def _together(self, first: Stream, due: dict[Stream, float], now: float) -> list[Stream]:
        """A stream and, where chunks are made in batches, those of its kind that want one about now."""
        if self._denoise_together is None or first.stopped:
            return [first]
        return [
            stream
            for stream in due
            if stream is first
            or (stream.spec.kind == first.spec.kind and due[stream] <= now + BATCH_SECONDS and not stream.stopped)
        ]

    def _due(self, stream: Stream) -> float:
        if stream.stopped:
            return 0.0
        return math.inf if stream.paused or self._open_session is None else stream.pace.wanted_at()

    def _stop_idle(self) -> None:
        limit = IDLE_SECONDS_IN_DEMAND if self.line else IDLE_SECONDS
        for stream in self.seated:
            if self._open_session and not stream.stopped and time.monotonic() - stream.heard_at > limit:
                stream.deliver({"type": "notice", "message": "Stopped: nobody was watching."})
                stream.stopped = True
                if stream.session is not None:
                    stream.session.stop()

    def _take_turn(self, streams: list[Stream]) -> None:
        started = time.monotonic()
        if streams[0].stopped:
            self._end(streams[0])
            return
        for stream in streams:
            self._prepare(stream)
        if len(streams) == 1:
            blocks = [streams[0].session.denoise(wait=False)]
        else:
            blocks = self._denoise_together([stream.session for stream in streams])
        for stream, block in zip(streams, blocks, strict=True):
            self._hand_on(stream, block, started)

    def _prepare(self, stream: Stream) -> None:
        """Open the session of a new stream, and tell it of a new prompt."""
        from pipeline.session import SwitchStyle

        if stream.session is None:
            self._open(stream)
        switch = stream.take_switch()
        if switch is not None:
            stream.session.switch(switch.prompt, SwitchStyle[switch.style])

    def _open(self, stream: Stream) -> None:
        session = self._open_session(stream.spec)
        with self.wake:
            stream.session = session
            stopped, paused = stream.stopped, stream.paused
        if stopped:  # while it was being opened
            session.stop()
        elif paused:
            session.pause()

    def _hand_on(self, stream: Stream, block: Any, started: float) -> None:
        """A block goes to the decoder; without one the stream may be over."""
        from pipeline.session import SessionState

        if block is not None:
            stream.note_switch(block)
            with self.wake:
                stream.pace.pending += 1
            self._to_decode.put((stream, block, started))
        elif stream.session.state in (SessionState.stopped, SessionState.finished):
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        """Free the seat at once; what is still being decoded follows, then the clip."""
        with self.wake:
            self.seated.remove(stream)
        self._to_decode.put((stream, None, 0.0))
        self.fill_seats()

    def _decode(self) -> None:
        while (job := self._to_decode.get()) is not None:
            stream, block, started = job
            try:
                chunk = None if block is None else self._deliver_chunk(stream, block, started)
            except Exception as error:
                self._drop(stream, error)
                continue
            self._to_record.put((stream, chunk, block))
        self._to_record.put(None)

    def _drop(self, stream: Stream, error: Exception) -> None:
        """A chunk that is not shown: the stream was stopped, or it cannot go on."""
        from pipeline.session import Stopped

        if not isinstance(error, Stopped):
            self._fail(stream, error)
            stream.stop()

    def _deliver_chunk(self, stream: Stream, block: Any, started: float) -> Chunk:
        """Decode a chunk and hand its frames on."""
        chunk = stream.session.decode(block)
        ready, first = time.time(), stream.pace.produced
        options = {"stream": stream.number, "first_frame": first, "chunk": chunk.index, "ready": ready}
        for message in frame_messages(chunk.frames, **options):
            stream.deliver(message)
        now = time.monotonic()
        timings = dict(chunk.timings) | {
            "encode": time.time() - ready,
            "queue": max(0.0, started - stream.wanted_since),
        }
        with self.wake:
            seconds = now - max(stream.wanted_since, stream.last_turn if stream.pace.produced == 0 else 0.0)
            stream.pace.decoded(len(chunk.frames), seconds)
            stream.wanted_since = now
            self.counters.chunks += 1
            self.counters.frames += len(chunk.frames)
            for stage, value in timings.items():
                self.counters.seconds[stage] = self.counters.seconds.get(stage, 0.0) + value
            self.wake.notify_all()
        stream.deliver(
            {
                "type": "chunk",
                "stream": stream.number,
                "chunk": chunk.index,
                "first_frame": first,
                "frames": len(chunk.frames),
                "prompt": chunk.prompt,
                "timings": {stage: round(value, 4) for stage, value in timings.items()},
            }
        )
        return chunk

    def _write(self) -> None:
        while (job := self._to_record.get()) is not None:
            stream, chunk, block = job
            try:
                self._record(stream, chunk, block)
            except Exception as error:
                self._fail(stream, error)
                stream.stop()

    def _record(self, stream: Stream, chunk: Chunk | None, block: Any) -> None:
        """Add a chunk to the stream's clip; without one the stream has ended and the clip is finished."""
        if chunk is not None:
            if stream.recorder is None:
                stream.recorder = ClipRecorder(self._gallery, stream)
            stream.recorder.write(chunk.frames, block.start_frame, block.start_frame + block.latents.shape[1])
            return
        stream.deliver({"type": "ended", "stream": stream.number, "frames": stream.pace.produced})
        if stream.recorder is not None:
            clip = stream.recorder.finish()
            stream.deliver({"type": "clip", "stream": stream.number, "clip": clip.describe()})

    def _fail(self, stream: Stream, error: Exception) -> None:
        known = isinstance(error, ValueError)
        if not known:
            log.error("stream %d failed", stream.number, exc_info=error)
        self.counters.failures += 1
        message = str(error) if known else f"{type(error).__name__}: see the server's log"
        stream.deliver({"type": "error", "stream": stream.number, "message": message})
