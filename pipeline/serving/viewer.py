"""One viewer's running video: its controls, its pace, and the session that makes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.serving.outbox import Message
from pipeline.serving.pace import Pace
from pipeline.serving.spec import PromptChange, StreamSpec

if TYPE_CHECKING:
    from pipeline.session import Chunk, SessionState, SwitchStyle


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


class Viewer:
    """One viewer's running video.

    The methods of the first group may be called from any thread; the second group belongs to the hub's threads.

    Args:
        number: the stream's number, which its frames carry.
        spec: what is made.
        visitor: whose share of seats and turns it counts for; see ``limits.visitor_of``.
        session_id: the session whose gallery shows the clip.
        deliver: takes messages to the viewer; it is called from other threads and must not block.
        changed: called without a lock after a command, so that the hub looks again.
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
        self._session: Session | None = None
        self._paused = self._stopped = False
        self._asked: PromptChange | None = None  # the session has not heard of it
        self._taken: PromptChange | None = None  # the session has, but no chunk shows it yet
        now = time.monotonic()
        self._wanted_from = self._seated_at = self._progress_at = now  # chunks are not wanted before the first

    # Controls.

    def pause(self) -> None:
        """Stop within a denoising step; the viewer keeps its seat."""
        self._command(lambda session: session.pause(), paused=True)

    def resume(self) -> None:
        """Go on where it paused."""
        self._command(lambda session: session.resume(), paused=False)

    def stop(self) -> None:
        """End within a denoising step; the clip so far is kept."""
        with self._lock:
            self._stopped = True
        self._command(lambda session: session.stop(), paused=False)

    def change_prompt(self, change: PromptChange) -> None:
        """Change the prompt at the next chunk; of several changes before it, the last one counts."""
        with self._lock:
            self._asked = change

    def frame_sent(self) -> None:
        """One more of its frames was written to the socket."""
        with self._lock:
            self.pace.frame_sent()
        self._changed()

    def frames_shown(self, count: int) -> None:
        """The viewer has shown the first ``count`` frames."""
        now = time.monotonic()
        with self._lock:
            if self.pace.report_shown(count, now):
                self._progress_at = now
        self._changed()

    def deliver(self, message: Message) -> None:
        """Send a message to the viewer, unless it is over."""
        deliver = self._deliver
        if deliver is not None:
            deliver(message)

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped

    @property
    def paused(self) -> bool:
        """Whether it holds."""
        return self._paused

    # For the hub's threads.

    @property
    def session(self) -> Session | None:
        """What makes the video; None before its first turn and after its end."""
        return self._session

    def seated(self) -> None:
        """It has got a seat: its clocks begin."""
        with self._lock:
            self._wanted_from = self._seated_at = self._progress_at = time.monotonic()
        self.deliver({"type": "seated", "stream": self.number})

    def open(self, open_session: Callable[[StreamSpec], Session]) -> None:
        """Begin the session."""
        session = open_session(self.spec)
        with self._lock:
            self._session = session
            stopped, paused = self._stopped, self._paused
        if stopped:  # while it was being opened
            session.stop()
        elif paused:
            session.pause()

    def take_change(self) -> PromptChange | None:
        """The change of the prompt that came since the last turn."""
        with self._lock:
            change, self._asked = self._asked, None
            self._taken = change or self._taken
        return change

    def change_shown_by(self, block: Any) -> PromptChange | None:
        """The change that takes effect with this block.

        That is one block later than the turn it was taken in, if it came while that block was being made.
        """
        taken = self._taken
        if taken is None or block is None or block.prompt != taken.prompt:
            return None
        self._taken = None
        return taken

    def due(self) -> float:
        """When its next chunk is wanted, in ``time.monotonic()`` seconds."""
        with self._lock:
            if self._stopped:
                return 0.0
            return float("inf") if self._paused else self.pace.wanted_at()

    def turn_begins(self, due: float, now: float) -> float:
        """A chunk that was due at ``due`` is made from now on. Returns since when it was wanted."""
        with self._lock:
            return max(min(due, now), self._wanted_from)

    def block_made(self) -> None:
        """A chunk was denoised and is not decoded yet."""
        with self._lock:
            self.pace.denoised()

    def chunk_ready(self, frames: int, wanted: float) -> None:
        """A chunk was decoded and is on its way; it was wanted since ``wanted``."""
        now = time.monotonic()
        with self._lock:
            self.pace.decoded(frames, now - max(wanted, self._wanted_from))
            self._wanted_from = now

    def idle_seconds(self, now: float) -> float:
        """For how long its viewer has shown nothing new although it could, or it has been paused."""
        with self._lock:
            if not self._paused and self.pace.all_shown:
                self._progress_at = now  # the viewer waits for the server
            return now - self._progress_at

    def turn_seconds(self, now: float) -> float:
        """For how long it has had its seat."""
        return now - self._seated_at

    def end(self) -> Session | None:
        """Let go of the session, so that its memory is freed; returns it for the chunks that are under way."""
        with self._lock:
            session, self._session = self._session, None
            self._stopped = True
        return session

    def close(self) -> None:
        """Let go of the client: no message follows."""
        self._deliver = None

    def _command(self, command: Callable[[Session], None], *, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            self._wanted_from = time.monotonic()
            session = self._session
        if session is not None:
            command(session)
        self._changed()
