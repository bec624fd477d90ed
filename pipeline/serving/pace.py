"""The pace of a stream: it runs only so far ahead of its viewer that the next chunk comes in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAD_MARGIN = 1.5  # factor of the mean time that a chunk takes
LEAD_SECONDS = 0.15  # added to that, for the network and the browser
LONGEST_LEAD = 1.25  # chunks; more would not help a model that is too slow, and would delay a new prompt
SMOOTHING = 0.3  # weight of the latest chunk in the running mean of the time that chunks take
EXTRAPOLATION = 1.0  # seconds for which a viewer is assumed to continue watching after its last report
FIRST_CHUNK_FRAMES = 12  # assumed until the first chunk is decoded


@dataclass
class Pace:
    """Counts the frames of one stream and says when its next chunk is wanted. Times are ``time.monotonic()`` seconds.

    A frame counts as shown only if it was written to the socket and the viewer reported it. So neither a slow network
    nor a client with false reports makes the server buffer without limit.
    """

    fps: float
    """Frames per second at which the viewer plays."""
    produced: int = 0
    """Frames decoded."""
    pending: int = 0
    """Chunks that are denoised and not decoded yet."""
    sent: int = 0
    """Frames written to the socket."""
    shown: int = 0
    """Frames that the viewer has reported as shown."""
    shown_at: float = 0.0
    """Time of its last report."""
    turnaround: float = 0.0
    """Mean seconds from the time at which a chunk is wanted until it is decoded."""
    chunk_frames: int = FIRST_CHUNK_FRAMES
    """Frames of the latest chunk."""

    def denoised(self) -> None:
        """Count a denoised chunk."""
        self.pending += 1

    def decoded(self, frames: int, seconds: float) -> None:
        """Count a decoded chunk of `frames` frames, which was ready `seconds` after it was wanted."""
        self.produced += frames
        self.pending -= 1
        self.chunk_frames = frames
        self.turnaround += (seconds - self.turnaround) * (SMOOTHING if self.turnaround else 1.0)

    def frame_sent(self) -> None:
        """Count a frame that was written to the socket."""
        self.sent += 1

    def report_shown(self, frames: int, now: float) -> bool:
        """Record that the viewer has shown `frames` frames. Return whether that is more than before."""
        before = self.shown
        self.shown, self.shown_at = max(self.shown, min(frames, self.sent)), now
        return self.shown > before

    @property
    def all_shown(self) -> bool:
        """Whether the viewer has shown every frame that was sent."""
        return self.shown >= self.sent

    @property
    def lead(self) -> float:
        """Seconds of video that the viewer should have in its buffer while the next chunk is made."""
        longest = max(LONGEST_LEAD * self.chunk_frames / self.fps, 2 * LEAD_SECONDS)
        return min(LEAD_MARGIN * self.turnaround + LEAD_SECONDS, longest)

    def wanted_at(self) -> float:
        """Return the time at which the next chunk is wanted; infinity if that depends on the viewer's next report."""
        expected = self.produced + self.pending * self.chunk_frames
        watched = expected - self.lead * self.fps  # frames that will be shown by then
        wait = (watched - self.shown) / self.fps
        if wait > EXTRAPOLATION or watched > max(self.sent, 0):
            return math.inf
        return self.shown_at + wait
