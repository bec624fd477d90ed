"""The pace of a stream: its next chunk is made as late as the measured time of a chunk allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

SPREAD = 3.0  # factor of the mean deviation of the time that chunks take
LEAST_MARGIN, MOST_MARGIN = 0.04, 0.6  # seconds for the network and the browser
RAISE, LOWER = 2.0, 0.97  # factors of the margin, after a frame that came too late and after each chunk
LONGEST_LEAD = 1.25  # chunks; more would not help a model that is too slow, and would delay a new prompt
MOST_UNSEEN = 2.0  # chunks that a viewer has not seen yet; with more, a switch is not made at once
SMOOTHING = 0.3  # weight of the latest chunk in the running means
EXTRAPOLATION = 1.0  # seconds for which a viewer is assumed to continue watching after its last report
FIRST_CHUNK_FRAMES = 12  # assumed until the first chunk is decoded


@dataclass
class Pace:
    """Counts the frames of one stream and says when its next chunk is wanted. Times are ``time.monotonic()`` seconds.

    The fewer frames wait at the viewer, the sooner it sees a new prompt. So a chunk begins as late as possible: its
    mean time before its first frame is due, plus some deviations, plus a margin. The margin doubles when the viewer
    reports a frame that came too late, and then shrinks slowly. On a busy machine more frames wait.

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
    late: int = 0
    """Frames that came too late, as the viewer has reported."""
    turnaround: float = 0.0
    """Mean seconds from the time at which a chunk is wanted until it is decoded."""
    deviation: float = 0.0
    """Mean deviation of these seconds."""
    margin: float = LEAST_MARGIN
    """Seconds from the time at which a chunk should be decoded until its first frame is due."""
    chunk_frames: int = FIRST_CHUNK_FRAMES
    """Frames of the latest chunk."""

    def denoised(self) -> None:
        """Count a denoised chunk."""
        self.pending += 1

    def decoded(self, frames: int, seconds: float, *, usual: bool = True) -> None:
        """Count a decoded chunk of `frames` frames, which was ready `seconds` after it was wanted.

        The seconds are measured only if the chunk is `usual`.
        """
        self.produced += frames
        self.pending -= 1
        self.chunk_frames = frames
        self.margin = max(LOWER * self.margin, LEAST_MARGIN)
        if not usual:
            return
        if not self.turnaround:
            self.turnaround, self.deviation = seconds, seconds / 4
            return
        difference = seconds - self.turnaround
        self.turnaround += SMOOTHING * difference
        self.deviation += SMOOTHING * (abs(difference) - self.deviation)

    def frame_sent(self) -> None:
        """Count a frame that was written to the socket."""
        self.sent += 1

    def report_shown(self, frames: int, now: float, late: int = 0) -> bool:
        """Record that the viewer has shown `frames` frames, and that `late` of them so far came too late.

        Return whether it has shown more than before.
        """
        before = self.shown
        self.shown, self.shown_at = max(self.shown, min(frames, self.sent)), now
        if late > self.late:
            self.margin = min(RAISE * self.margin, MOST_MARGIN)
        self.late = late
        return self.shown > before

    @property
    def all_shown(self) -> bool:
        """Whether the viewer has shown every frame that was sent."""
        return self.shown >= self.sent

    @property
    def lead(self) -> float:
        """Seconds from the time at which the next chunk begins until its first frame is due."""
        longest = max(LONGEST_LEAD * self.chunk_frames / self.fps, MOST_MARGIN)
        return min(self.turnaround + SPREAD * self.deviation + self.margin, longest)

    def wanted_at(self) -> float:
        """Return the time at which the next chunk is wanted; infinity if that depends on the viewer's next report."""
        expected = self.produced + self.pending * self.chunk_frames
        ahead = expected + 1 - self.lead * self.fps  # frames that will be shown by then, the one on screen included
        watched = min(ahead, expected)
        wait = (watched - self.shown) / self.fps
        if not self.shown:
            return math.inf if watched > 0 else 0.0
        if wait > EXTRAPOLATION or watched > self.sent:
            return math.inf
        return self.shown_at + wait

    def change_rate(self, fps: float, now: float) -> None:
        """Play at another rate from now on."""
        self.fps, self.shown_at = fps, now

    def resumed(self, now: float) -> None:
        """Record that the viewer continues after a pause."""
        self.shown_at = now

    def may_hurry(self) -> bool:
        """Return whether a switch may be made at once. It may not if many frames wait to be shown."""
        expected = self.produced + self.pending * self.chunk_frames
        return expected - self.shown <= MOST_UNSEEN * self.chunk_frames
