"""Opens video files and reads them as a player shows them: upright, in square pixels, in sRGB, each frame at its time.

No module here needs torch. PyAV is imported when a file is opened, so programs that read no video work without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from utils.errors import UserError
from utils.spacing import evenly_spaced
from utils.video.picture import MAX_PIXELS, to_picture
from utils.video.pyav import load_pyav, reason

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,gif,apng,webp_anim,mxf,nut,ivf,h264,hevc,av1,obu,"
    "yuv4mpegpipe,dv,rm,3gp,swf,wtv,mjpeg,vc1,h263,h261,mp3,wav,flac,aac,aiff"
)
"""The containers that are opened. None of them can name other files or addresses, as playlists can."""
LONGEST_HOLD = 60.0  # seconds a frame can stay; a longer gap, or time that goes back, is a break in the time stamps
LATE = 0.1  # of a sampled frame's length: how far a time stamp may be rounded up
USUAL_RATE = 25  # frames per second of a file that does not say it
NO_FRAMES = "it has no frames"


@dataclass(frozen=True)
class VideoFile:
    """An open video file and the stream that a player would show."""

    container: InputContainer
    stream: VideoStream

    path: Path

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yield the frames in the order in which they are shown.

        Damage after the first frame, as in a file that was cut off, ends the video there with one warning.
        """
        count = 0
        try:
            for frame in self.container.decode(self.stream):
                yield frame
                count += 1
        except (load_pyav().FFmpegError, OSError) as error:
            if not count:
                raise
            log.warning("%s: is damaged after %d frames (%s); only these are used", self.path, count, reason(error))

    def pictures(self) -> Iterator[Image.Image]:
        """Yield all frames as upright RGB images in square pixels."""
        for frame in self.decode():
            yield self.picture(frame)

    def picture(self, frame: av.VideoFrame) -> Image.Image:
        """Return a frame as an upright RGB image in square pixels."""
        return to_picture(frame, self.stream.sample_aspect_ratio)

    def sampled(self, fps: float) -> Iterator[tuple[av.VideoFrame, int]]:
        """Yield each frame with the number of times k / fps, for k = 0, 1, ..., at which it is shown.

        The first frame begins at time 0. A frame is shown until the next one begins, the last one for its own length.
        """
        tolerance = min(float(self.stream.time_base or 0) * fps, LATE) + 1e-6
        taken = 0
        for frame, end in self._with_ends():
            count = max(0, math.ceil(end * fps - tolerance) - taken)
            yield frame, count
            taken += count

    def _with_ends(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Yield each frame with the second at which it ends. The times never decrease."""
        held, begin = None, 0.0
        for frame in self.decode():
            if held is not None:
                passed = -1.0 if held.time is None or frame.time is None else frame.time - held.time
                begin += passed if 0 <= passed <= LONGEST_HOLD else self._length(held)
                yield held, begin
            held = frame
        if held is None:
            raise ValueError(NO_FRAMES)
        yield held, begin + self._length(held)

    def _length(self, frame: av.VideoFrame) -> float:
        """Return the seconds for which a frame is shown: its own duration, else from the file's rate."""
        length = float((frame.duration or 0) * (frame.time_base or 0))
        rate = self.stream.guessed_rate or self.stream.average_rate or USUAL_RATE
        return length if 0 < length <= LONGEST_HOLD else 1 / float(rate)


@contextmanager
def open_video(path: str | Path) -> Iterator[VideoFile]:
    """Open a video file.

    Raises:
        UserError: the file is missing or is no video, at once or while it is read within the block.
    """
    av = load_pyav()
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", metadata_errors="replace", options=options) as container:
            yield VideoFile(container, _shown_stream(container), path)
    except UserError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read a video from {path}: {reason(error)}") from error


def _shown_stream(container: InputContainer) -> VideoStream:
    """Return the stream that is shown. Cover pictures of music and lists of thumbnails are none."""
    Disposition = load_pyav().stream.Disposition
    hidden = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & hidden]
    if not streams:
        raise ValueError("it has only sound" if container.streams.audio else "it has no pictures")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    context = stream.codec_context
    if context is None:
        raise ValueError("its codec is not known")
    if context.width * context.height > MAX_PIXELS:
        raise ValueError(f"frames of {context.width}x{context.height} have more than {MAX_PIXELS:,} pixels")
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def sample_pictures(path: str | Path, count: int) -> list[Image.Image]:
    """Read `count` evenly spaced frames as upright RGB images. No other frames are kept in memory.

    Raises UserError if the file is missing or not a video.
    """
    with open_video(path) as video:
        frames = video.stream.frames or sum(1 for _ in video.decode())
    with open_video(path) as video:
        wanted = evenly_spaced(frames, count)
        return [video.picture(frame) for index, frame in enumerate(video.decode()) if index in wanted]


def plays(path: str | Path) -> bool:
    """Return whether at least one frame of a video file can be shown."""
    try:
        with open_video(path) as video:
            return next(video.decode(), None) is not None
    except UserError:
        return False


def count_frames(path: str | Path) -> int:
    """Decode a video file to its end and count the frames.

    Raises UserError if it is missing, is not a video, or is damaged or cut off.
    """
    with open_video(path) as video:
        packets = frames = 0
        for packet in video.container.demux(video.stream):
            packets += bool(packet.size)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError(f"frame {frames} is damaged")
                frames += 1
        if packets < video.stream.frames:  # an edit list may hide frames, so packets are compared
            raise ValueError(f"it is cut off: it holds {packets} of {video.stream.frames} frames")
        return frames


def read_video_metadata(path: str | Path) -> dict[str, str]:
    """Return the tags of a video file; an empty dict if the file cannot be read."""
    try:
        with open_video(path) as video:
            return dict(video.container.metadata)
    except UserError:
        return {}
