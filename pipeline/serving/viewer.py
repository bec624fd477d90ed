"""One viewer's running video: its controls, its pace, and the session that makes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.serving.outbox import Message
from pipeline.serving.pace import Pace
from pipeline.serving.spec import PromptChange, StreamSpec
from pipeline.states import SessionState, SwitchStyle

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.session import Chunk


class Session(Protocol):
    """The part of ``pipeline.session.StreamSession`` that the hub uses."""

    @property
    def state(self) -> SessionState: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...
    def switch(self, prompt: str, style: SwitchStyle, **settings: Any) -> None: ...
    def ready(self) -> bool: ...
    def denoise(self, wait: bool = True) -> Any: ...
    def decode(self, block: Any, show: Callable[[Tensor], None]) -> Chunk: ...


class Viewer:
    """One viewer's running video.

    Any thread may call the methods of the first group. Only the hub's threads call those of the second group.

    Args:
        number: the number of the stream. Its frames carry it.
        spec: the checked request.
        visitor: the visitor whose share of seats and turns it counts for; see ``limits.visitor_of``.
        session_id: the session whose gallery shows the clip.
        deliver: sends messages to the viewer. It is called from other threads and must not block.
        changed: called without a lock after a command, so that the hub checks its viewers again.
    """

    def __init__(
        self,
        number: int,
        spec: StreamSpec,
        *,
        visitor: str,
        session_id: str,
        deliver: Callable[[Message], None],
        changed: Callable[[], None],
    ) -> None:
        self.number, self.spec, self.visitor, self.session_id = number, spec, visitor, session_id
        self.pace = Pace(spec.fps)
        self._deliver: Callable[[Message], None] | None = deliver
        self._changed = changed
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._session: Session | None = None
        self._paused = self._stopped = False
        self._prompt = spec.prompt
        self._recording = spec.record
        self._asked: PromptChange | None = None  # not passed to the session yet
        self._asked_at = 0.0
        self._taken: PromptChange | None = None  # passed to the session, and no chunk shows it yet
        now = time.monotonic()
        self._wanted_from = self._seated_at = self._progress_at = now  # no chunk is wanted before _wanted_from

    # Controls.

    def pause(self) -> None:
        """Pause within one denoising step. The viewer keeps its seat."""
        self._command(lambda session: session.pause(), paused=True)

    def resume(self) -> None:
        """Continue after a pause."""
        self._command(lambda session: session.resume(), paused=False)

    def stop(self) -> None:
        """End the stream within one denoising step. The clip so far is kept."""
        with self._lock:
            self._stopped = True
        self._command(lambda session: session.stop(), paused=False)

    def change_prompt(self, change: PromptChange) -> None:
        """Change the prompt, with a chunk made at once. If several changes come before it, the last one counts."""
        with self._lock:
            self._asked, self._asked_at = change.after(self._asked, self._prompt), time.monotonic()
            self._prompt = self._asked.prompt
        self._changed()

    def change_rate(self, fps: int) -> None:
        """Play at another rate from now on."""
        with self._lock:
            self.pace.change_rate(fps, time.monotonic())
        self._changed()

    def look_again(self) -> None:
        """Check again, because the source has a new frame or has ended."""
        self._changed()

    def record(self, on: bool) -> None:
        """Begin or end a clip with the next chunk."""
        self._recording = on

    def frame_sent(self) -> None:
        """Record that one more frame was written to the socket."""
        with self._lock:
            self.pace.frame_sent()
        self._changed()

    def frames_shown(self, count: int, late: int = 0) -> None:
        """Record that the viewer has shown the first `count` frames, and that `late` frames so far came too late."""
        now = time.monotonic()
        with self._lock:
            if self.pace.report_shown(count, now, late):
                self._progress_at = now
        self._changed()

    def deliver(self, message: Message) -> None:
        """Send a message to the viewer. After :meth:`close` it does nothing."""
        deliver = self._deliver
        if deliver is not None:
            deliver(message)

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called or the stream has ended."""
        return self._stopped

    @property
    def recording(self) -> bool:
        """Whether the next chunk belongs to a clip."""
        return self._recording

    @property
    def paused(self) -> bool:
        """Whether the stream is paused."""
        return self._paused

    # For the hub's threads.

    @property
    def session(self) -> Session | None:
        """The session that makes the video; None before the first turn and after the end."""
        return self._session

    def seated(self) -> None:
        """Start the clocks of a viewer that has just got a seat, and tell it."""
        with self._lock:
            self._wanted_from = self._seated_at = self._progress_at = time.monotonic()
        self.deliver({"type": "seated", "stream": self.number})

    def open(self, open_session: Callable[[StreamSpec], Session]) -> None:
        """Open the session."""
        session = open_session(self.spec)
        with self._lock:
            self._session = session
            stopped, paused = self._stopped, self._paused
        if stopped:  # while the session was being opened
            session.stop()
        elif paused:
            session.pause()

    def take_change(self) -> PromptChange | None:
        """Return the latest change of the prompt since the last turn, or None."""
        with self._lock:
            change, self._asked = self._asked, None
            self._taken = change or self._taken
        return change

    def change_shown_by(self, block: Any) -> PromptChange | None:
        """Return the change of the prompt that takes effect with this block, or None.

        A change that came while a block was being made takes effect with the following block.
        """
        taken = self._taken
        if taken is None or block is None or block.prompt != taken.prompt:
            return None
        self._taken = None
        return taken

    def due(self) -> float:
        """Return the time at which the next chunk is wanted, in ``time.monotonic()`` seconds."""
        with self._lock:
            if self._stopped:
                return 0.0
            if self._paused or not self._has_source():
                return float("inf")
            wanted = self.pace.wanted_at()
            hurried = self._asked is not None and self.pace.produced and self.pace.may_hurry()
            return min(wanted, self._asked_at) if hurried else wanted

    def _has_source(self) -> bool:
        """Return whether the frames of the source are there that the next chunk needs."""
        return self.spec.source is None or self._session is None or self._session.ready()

    def turn_begins(self, due: float, now: float) -> float:
        """Return since when the chunk of a turn that begins `now` was wanted. `due` is the result of :meth:`due`."""
        with self._lock:
            return max(min(due, now), self._wanted_from)

    def block_made(self) -> None:
        """Record that a chunk was denoised."""
        with self._lock:
            self.pace.denoised()

    def chunk_ready(self, frames: int, wanted: float, *, usual: bool) -> None:
        """Record that a chunk of `frames` frames was decoded, which was wanted since `wanted`.

        Its time is measured only if it is `usual`: a chunk with a switch takes longer.
        """
        now = time.monotonic()
        with self._lock:
            self.pace.decoded(frames, now - max(wanted, self._wanted_from), usual=usual)
            self._wanted_from = now

    def idle_seconds(self, now: float) -> float:
        """Return for how long the stream has been paused, or its viewer has shown no new frame although it had some."""
        with self._lock:
            if not self._paused and self.pace.all_shown:
                self._progress_at = now  # the viewer waits for the server
            return now - self._progress_at

    def turn_seconds(self, now: float) -> float:
        """Return for how many seconds the viewer has had its seat."""
        return now - self._seated_at

    def end(self) -> Session | None:
        """Drop the session, so that its memory can be freed. Return it for the chunks that are not decoded yet."""
        with self._lock:
            session, self._session = self._session, None
            self._stopped = True
        return session

    def close(self) -> None:
        """Drop the client. No message is sent to it any more."""
        self._deliver = None
        self._closed.set()

    def wait_until_closed(self) -> None:
        """Wait until the stream has ended and its clip is finished."""
        self._closed.wait()

    def _command(self, command: Callable[[Session], None], *, paused: bool) -> None:
        with self._lock:
            if self._paused and not paused:
                self.pace.resumed(time.monotonic())
            self._paused = paused
            self._wanted_from = time.monotonic()
            session = self._session
        if session is not None:
            command(session)
        self._changed()
