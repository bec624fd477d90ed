"""How far ahead of its viewer a stream may run: just far enough that the next chunk comes in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAD_MARGIN = 1.5  # times the seconds from a chunk being wanted to its being there
LEAD_SECONDS = 0.15  # on top of that, for the network and the browser
LONGEST_LEAD = 1.25  # chunks; more would not help a model that is too slow, and would delay what a viewer asks for
SMOOTHING = 0.3  # weight of the latest chunk in the running mean of the time that chunks take
EXTRAPOLATION = 1.0  # seconds that a viewer is believed to go on watching after its last report
FIRST_CHUNK_FRAMES = 12  # assumed until one has been decoded


@dataclass
class Pace:
    """Counts of one stream's frames, and when its next chunk is wanted. Times are ``time.monotonic()`` seconds.

    A frame counts as watched only if it was written to the socket and reported as shown. So neither a slow line nor a
    client that lies about what it shows makes the server buffer without limit.
    """

    fps: float
    """Frames a second at which the viewer plays."""
    produced: int = 0
    """Frames decoded."""
    pending: int = 0
    """Chunks denoised but not decoded."""
    sent: int = 0
    """Frames written to the socket."""
    shown: int = 0
    """Frames that the viewer reports as shown."""
    shown_at: float = 0.0
    """When it last reported."""
    turnaround: float = 0.0
    """Mean seconds from a chunk being wanted to its being there."""
    chunk_frames: int = FIRST_CHUNK_FRAMES
    """Frames of the latest chunk."""

    def denoised(self) -> None:
        """A chunk was denoised."""
        self.pending += 1

    def decoded(self, frames: int, seconds: float) -> None:
        """A chunk is there, ``seconds`` after it was wanted."""
        self.produced += frames
        self.pending -= 1
        self.chunk_frames = frames
        self.turnaround += (seconds - self.turnaround) * (SMOOTHING if self.turnaround else 1.0)

    def frame_sent(self) -> None:
        """A frame was written to the socket."""
        self.sent += 1

    def report_shown(self, frames: int, now: float) -> bool:
        """The viewer has shown this many frames. Returns whether that is more than before."""
        before = self.shown
        self.shown, self.shown_at = max(self.shown, min(frames, self.sent)), now
        return self.shown > before

    @property
    def all_shown(self) -> bool:
        """Whether the viewer has shown every frame that it got."""
        return self.shown >= self.sent

    @property
    def lead(self) -> float:
        """Seconds of video that should wait at the viewer while the next chunk is made."""
        longest = max(LONGEST_LEAD * self.chunk_frames / self.fps, 2 * LEAD_SECONDS)
        return min(LEAD_MARGIN * self.turnaround + LEAD_SECONDS, longest)

    def wanted_at(self) -> float:
        """When the next chunk is wanted, in the past or the future; inf until the viewer reports again."""
        expected = self.produced + self.pending * self.chunk_frames
        watched = expected - self.lead * self.fps  # frames watched by then
        wait = (watched - self.shown) / self.fps
        if wait > EXTRAPOLATION or watched > max(self.sent, 0):
            return math.inf
        return self.shown_at + wait
