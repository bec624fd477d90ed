"""Share one model between several viewers. They take turns, and a turn is one chunk.

There are three threads in a row. The first one denoises; only this thread drives sessions. The second one decodes and
packs frames. The third one writes clips. The queues between them are short, so the slowest thread sets the pace.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.serving.busy_times import BusyTimes
from pipeline.serving.clips import Gallery
from pipeline.serving.frames import frame_messages
from pipeline.serving.limits import Limits
from pipeline.serving.outbox import Message
from pipeline.serving.recorder import Recorders
from pipeline.serving.seats import FairTurns, Seats
from pipeline.serving.spec import PromptChange, StreamSpec
from pipeline.serving.viewer import Session, Viewer
from pipeline.states import SessionState, Stopped, SwitchStyle
from pipeline.steps import even_steps

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.session import Chunk

log = logging.getLogger(__name__)

QUEUED_CHUNKS = 2  # between two threads
BATCH_SECONDS = 0.25  # a chunk that is wanted within this time may be made in a batch with one that is wanted now


@dataclass(frozen=True, eq=False)
class FinishedBlock:
    """A denoised chunk on its way to the viewer and to the clip. If block is None, it marks the end of the stream."""

    viewer: Viewer
    session: Session | None = None
    block: Any = None
    record: bool = True
    """Whether it belongs to a clip."""
    change: PromptChange | None = None
    """The change of the prompt that takes effect with this chunk."""
    wanted: float = 0.0
    """Time since when the chunk was wanted, in ``time.monotonic()`` seconds."""
    started: float = 0.0
    """Time at which its turn began, in ``time.monotonic()`` seconds."""


@dataclass
class Counters:
    """Totals since the start, for /metrics."""

    streams: int = 0
    chunks: int = 0
    frames: int = 0
    failures: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds spent."""

    def add_chunk(self, frames: int, timings: dict[str, float]) -> None:
        """Count a chunk, its pixel frames and the seconds of its stages."""
        self.chunks += 1
        self.frames += frames
        for stage, value in timings.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value


class Hub:
    """Seats, turns and the threads behind them.

    Args:
        max_viewers: number of streams that run at the same time. Others wait in line.
        gallery: where finished clips go.
        denoise_batch: makes the next blocks of several sessions of one kind as a batch. None makes them one by one.
        limits: how long a viewer may keep its seat.
    """

    def __init__(
        self,
        max_viewers: int,
        gallery: Gallery,
        denoise_batch: Callable[[list[Session]], list[Any]] | None = None,
        limits: Limits | None = None,
    ) -> None:
        if max_viewers < 1:
            raise ValueError(f"max_viewers={max_viewers} must be at least 1")
        self.counters = Counters()
        self._busy = BusyTimes()
        self._seats = Seats(max_viewers, limits or Limits())
        self._wake = threading.Condition()
        self._turns = FairTurns()
        self._last_turn: dict[Viewer, float] = {}
        self._places: dict[Viewer, int] = {}
        self._recorders = Recorders(gallery)
        self._denoise_batch = denoise_batch
        self._open_session: Callable[[StreamSpec], Session] | None = None
        self._closing = False
        self._to_decode: queue.Queue[FinishedBlock | None] = queue.Queue(QUEUED_CHUNKS)
        self._to_record: queue.Queue[tuple[FinishedBlock, Chunk | None] | None] = queue.Queue(QUEUED_CHUNKS)
        stages = {"generate": self._generate, "decode": self._decode, "record": self._record}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in stages.items()]
        for thread in self._threads:
            thread.start()

    @property
    def max_viewers(self) -> int:
        """Number of streams that can run at the same time."""
        return self._seats.count

    @property
    def viewers(self) -> int:
        """Number of streams that have a seat."""
        return len(self._seats.taken)

    @property
    def waiting(self) -> int:
        """Number of streams that wait in line."""
        return len(self._seats.line)

    def stalled(self, seconds: float) -> str | None:
        """Say in one line which thread has ended, or works on one chunk for longer than ``seconds``; None if none."""
        if not self._closing and (ended := [thread.name for thread in self._threads if not thread.is_alive()]):
            return f"the thread {ended[0]!r} has ended"
        name, busy = self._busy.longest()
        return f"the thread {name!r} has worked on one chunk for {busy:.0f} s" if busy > seconds else None

    def place(self, viewer: Viewer) -> int | None:
        """Return the place of a viewer in line, from 1; None if it does not wait."""
        return self._places.get(viewer)

    def ready(self, open_session: Callable[[StreamSpec], Session]) -> None:
        """Begin the requested streams, now that the model is loaded. `open_session` opens the session of a stream."""
        with self._wake:
            self._open_session = open_session
            self._wake.notify_all()

    def submit(self, spec: StreamSpec, deliver: Callable[[Message], None], visitor: str, session_id: str) -> Viewer:
        """Create a stream. It gets a seat or waits in line.

        Args:
            spec: the stream.
            deliver: receives the messages of the stream. It is called from other threads and must not block.
            visitor: the visitor whose share of seats and turns the stream counts for.
            session_id: the session whose gallery shows the clip.
        """
        with self._wake:
            self.counters.streams += 1
            viewer = Viewer(
                self.counters.streams,
                spec,
                visitor=visitor,
                session_id=session_id,
                deliver=deliver,
                changed=self._look_again,
            )
            self._seats.join(viewer)
            self._fill_seats()
        return viewer

    def end_all(self, notice: str) -> None:
        """End every stream with a notice, and wait until the clips are finished. No stream may begin meanwhile."""
        with self._wake:
            viewers = [*self._seats.taken, *self._seats.line]
        for viewer in viewers:
            viewer.deliver({"type": "notice", "stream": viewer.number, "message": notice})
            viewer.stop()
        for viewer in viewers:
            viewer.wait_until_closed()

    def close(self) -> None:
        """Stop every stream, finish the clips, and end the threads."""
        with self._wake:
            self._closing = True
            viewers = [*self._seats.taken, *self._seats.line]
        for viewer in viewers:
            viewer.stop()
        self._look_again()
        for thread in self._threads:
            thread.join()

    # Seats.

    def _look_again(self) -> None:
        with self._wake:
            if any(viewer.stopped for viewer in self._seats.line):
                self._fill_seats()
            self._wake.notify_all()

    def _fill_seats(self) -> None:
        """Give free seats to the next viewers in line. The caller holds the lock."""
        for viewer in self._seats.drop_stopped():
            viewer.deliver({"type": "ended", "stream": viewer.number, "frames": 0})
            viewer.close()
        for viewer in self._seats.fill():
            viewer.seated()
        self._places = {viewer: place for place, viewer in enumerate(self._seats.in_order(), start=1)}
        self._wake.notify_all()

    def _make_room(self, now: float) -> None:
        if self._open_session is None:
            return
        for viewer, reason in self._seats.to_stop(now):
            viewer.deliver({"type": "notice", "stream": viewer.number, "message": reason})
            viewer.stop()

    # The first thread: denoising.

    def _generate(self) -> None:
        while turn := self._next_turn():
            with self._busy.at_work("generate"):
                self._try_turn(turn)
            del turn  # keep no viewer alive while waiting
        self._to_decode.put(None)

    def _try_turn(self, turn: dict[Viewer, float]) -> None:
        """Make a chunk for each viewer. An error ends the streams of this turn only."""
        started = time.monotonic()
        try:
            self._take_turn(turn, started)
        except Exception as error:
            for viewer in turn:
                self._fail(viewer, error)
                if viewer in self._seats.taken:
                    self._end(viewer)
        with self._wake:
            for viewer in turn:
                self._turns.used(viewer.visitor, (time.monotonic() - started) / len(turn))

    def _next_turn(self) -> dict[Viewer, float]:
        """Wait for a turn. Return its viewers and since when each wants a chunk; empty once everything is closed."""
        with self._wake:
            while not (self._closing and not self._seats.taken):
                turn, seconds = self._choose(time.monotonic())
                if turn:
                    return turn
                self._wake.wait(min(seconds, 1.0))
        return {}

    def _choose(self, now: float) -> tuple[dict[Viewer, float], float]:
        """Return the viewers of the next turn. If there is none, return the seconds until a viewer wants a chunk.

        Among the viewers that want a chunk, the first one belongs to the visitor that has used the least time. The
        others are those whose chunks can be made in one batch with it.
        """
        self._make_room(now)
        due = {viewer: self._due(viewer) for viewer in self._seats.taken}
        used = self._turns.order(viewer.visitor for viewer in due)
        wanting = [viewer for viewer in due if due[viewer] <= now]
        if not wanting:
            return {}, min(due.values(), default=math.inf) - now
        first = min(wanting, key=lambda viewer: (not viewer.stopped, used[viewer.visitor], self._served_at(viewer)))
        chosen = self._together(first, due, now)
        self._last_turn = {viewer: now if viewer in chosen else self._served_at(viewer) for viewer in due}
        return {viewer: viewer.turn_begins(due[viewer], now) for viewer in chosen}, 0.0

    def _served_at(self, viewer: Viewer) -> float:
        return self._last_turn.get(viewer, 0.0)

    def _due(self, viewer: Viewer) -> float:
        return viewer.due() if self._open_session is not None or viewer.stopped else math.inf

    def _together(self, first: Viewer, due: dict[Viewer, float], now: float) -> list[Viewer]:
        """Return a viewer and, if chunks are made in batches, the viewers of its kind that want a chunk soon."""
        if self._denoise_batch is None or first.stopped:
            return [first]
        kind, soon = first.spec.kind, now + BATCH_SECONDS
        return [v for v in due if v is first or (v.spec.kind == kind and due[v] <= soon and not v.stopped)]

    def _take_turn(self, turn: dict[Viewer, float], started: float) -> None:
        first = next(iter(turn))
        if first.stopped:
            self._end(first)
            return
        for viewer in turn:
            self._prepare(viewer)
        sessions = [viewer.session for viewer in turn]
        together = self._denoise_batch if len(turn) > 1 else lambda one: [one[0].denoise(wait=False)]
        for (viewer, wanted), session, block in zip(turn.items(), sessions, together(sessions), strict=True):
            change = viewer.change_shown_by(block)
            self._hand_on(FinishedBlock(viewer, session, block, viewer.recording, change, wanted, started))

    def _hand_on(self, job: FinishedBlock) -> None:
        """Send a block to the decoder. If there is no block, end the stream if its session has ended."""
        if job.block is not None:
            job.viewer.block_made()
            self._to_decode.put(job)
        elif job.session.state in (SessionState.stopped, SessionState.finished):
            self._end(job.viewer)

    def _prepare(self, viewer: Viewer) -> None:
        """Open the session of a new viewer, and pass on a change of the prompt."""
        if viewer.session is None:
            viewer.open(self._open_session)
        change = viewer.take_change()
        if change is not None:
            settings = change.settings
            if "steps" in settings:
                settings["denoising_steps"] = even_steps(settings.pop("steps"))
            viewer.session.switch(change.prompt, SwitchStyle[change.style], **settings)

    def _end(self, viewer: Viewer) -> None:
        """Free the seat and the session at once. Chunks that are still being decoded and the clip follow."""
        session = viewer.end()
        with self._wake:
            self._seats.leave(viewer)
            self._last_turn.pop(viewer, None)
            self._fill_seats()
        self._to_decode.put(FinishedBlock(viewer, session))

    # The second thread: decoding.

    def _decode(self) -> None:
        while (job := self._to_decode.get()) is not None:
            with self._busy.at_work("decode"):
                try:
                    chunk = None if job.block is None else self._deliver_chunk(job)
                    self._to_record.put((job, chunk))
                except Exception as error:
                    self._drop(job.viewer, error)
            chunk = job = None  # keep nothing alive while waiting
        self._to_record.put(None)

    def _drop(self, viewer: Viewer, error: Exception) -> None:
        """Drop a chunk that could not be decoded. Unless the stream was stopped, report the error and stop it."""
        if not isinstance(error, Stopped):
            self._fail(viewer, error)
            viewer.stop()

    def _deliver_chunk(self, job: FinishedBlock) -> Chunk:
        """Decode a chunk and send its frames. The first ones of a stream go before the whole chunk is decoded."""
        viewer, first = job.viewer, job.viewer.pace.produced
        shown, packing = first, 0.0
        if job.change is not None:
            told = {"stream": viewer.number, "first_frame": first, **job.change.settings}
            told |= {"prompt": job.change.prompt, "style": job.change.style, "id": job.change.id}
            viewer.deliver({"type": "switched", **told})

        def show(frames: Tensor) -> None:
            nonlocal shown, packing
            ready = time.time()
            options = {"stream": viewer.number, "first_frame": shown, "chunk": job.block.index, "ready": ready}
            for message in frame_messages(frames, **options):
                viewer.deliver(message)
            shown += len(frames)
            packing += time.time() - ready

        chunk = job.session.decode(job.block, show)
        timings = dict(chunk.timings) | {"encode": packing, "queue": max(0.0, job.started - job.wanted)}
        viewer.chunk_ready(len(chunk.frames), job.wanted if first else job.started, usual=job.change is None)
        self.counters.add_chunk(len(chunk.frames), timings)
        viewer.deliver(
            {
                "type": "chunk",
                "stream": viewer.number,
                "chunk": chunk.index,
                "first_frame": first,
                "frames": len(chunk.frames),
                "prompt": chunk.prompt,
                "timings": {stage: round(value, 4) for stage, value in timings.items()},
            }
        )
        self._look_again()
        return chunk

    # The third thread: clips.

    def _record(self) -> None:
        while (entry := self._to_record.get()) is not None:
            with self._busy.at_work("record"):
                self._record_chunk(*entry)
            entry = None  # keep nothing alive while waiting

    def _record_chunk(self, job: FinishedBlock, chunk: Chunk | None) -> None:
        """Add a chunk to its clip; without one, end the stream and finish its clip."""
        viewer = job.viewer
        if chunk is not None:
            self._recorders.write(viewer, chunk.frames, job.block, job.change, record=job.record)
            return
        viewer.deliver({"type": "ended", "stream": viewer.number, "frames": viewer.pace.produced})
        self._recorders.finish(viewer)
        viewer.close()

    def _fail(self, viewer: Viewer, error: Exception) -> None:
        known = isinstance(error, ValueError)
        if not known:
            log.error("stream %d failed", viewer.number, exc_info=error)
        self.counters.failures += 1
        message = str(error) if known else f"the video ended with {type(error).__name__}; see the server's log"
        viewer.deliver({"type": "error", "stream": viewer.number, "message": message})
