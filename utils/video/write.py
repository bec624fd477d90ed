"""Writes H.264 mp4 files, frame by frame. The file depends only on the frames, not on the machine.

Shapes: F frames, H height, W width. Pixels are float in [-1, 1] as [F 3 H W] or uint8 in [0, 255] as [F H W 3].
PyAV is imported when a file is opened, so programs that write no video work without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path, fit_name
from utils.frames import enlarge, to_uint8
from utils.video.file import plays
from utils.video.pyav import convert_frame, load_pyav, reason

if TYPE_CHECKING:
    import av

BT709 = 1  # the same number names its matrix, primaries and transfer curve in H.264 (ITU-T H.273)
X264 = {
    "crf": "12",  # constant rate factor: visually lossless; 23, the default, smears small clips
    "preset": "veryfast",
    "threads": "1",  # x264's own threads give another picture now and then, and another one for each number of cores
    "x264-params": "cpu-independent=1:chromaloc=1",  # colour lies between its 2 x 2 pixels, whose mean it is
}
FRAGMENTED = {"movflags": "delay_moov+default_base_moof", "frag_duration": "1000000", "flush_packets": "1"}
NTSC_TOLERANCE = 0.001  # frames per second


class VideoWriter:
    """Write an H.264 mp4 frame by frame. The file gets its name when the writer closes without an error.

    Until then `NAME.partial.mp4` grows beside it, second by second. It plays at any time, so a process that is killed
    leaves a video too. An earlier partial file is kept; the new one is then `NAME.partial-2.mp4`, and so on.
    Odd sizes are padded to even ones with copies of the last row and column, because H.264 in yuv420p needs even sizes.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | Fraction,
        *,
        scale: int = 1,
        metadata: Mapping[str, str] | None = None,
        keep_partial: bool = False,
    ):
        """Nothing is opened yet.

        Args:
            path: the name of the finished file.
            fps: frames per second. 23.976, 29.97 and 59.94 become the exact rates 24000/1001 and so on.
            scale: a whole factor that enlarges each pixel to a square, for clips that are tiny to look at.
            metadata: tags of the mp4 such as "title" and "comment"; see :func:`utils.video.file.read_video_metadata`.
            keep_partial: keep the partial file after any error if it holds frames. Otherwise only a failure to write
                keeps it.

        Raises:
            ValueError: `fps` or `scale` is out of range.
        """
        if not 0 < fps < float("inf"):
            raise ValueError(f"fps={fps} must be positive")
        if scale < 1:
            raise ValueError(f"scale={scale} must be at least 1")
        self.path, self.fps, self.scale = Path(path), fps, scale
        self.metadata, self.keep_partial = dict(metadata or {}), keep_partial
        self.partial: Path | None = None
        self.frames = 0
        self._stopped = False
        self._container = self._stream = self._frame_shape = None

    def __enter__(self) -> VideoWriter:
        """Create the partial file. Raises UserError if that cannot be done."""
        av = load_pyav()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial, self._file = _create_partial(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {_short(self.path)}: {reason(error)}; choose another folder") from error
        self._container = av.open(self._file, "w", format="mp4", options=FRAGMENTED)
        self._container.metadata.update(self.metadata)
        return self

    def write(self, frames: Tensor) -> None:
        """Append [F 3 H W] in [-1, 1] or uint8 [F H W 3]. Every call must have the same H and W.

        Raises:
            UserError: the disk is full or cannot be written to.
        """
        pixels = enlarge(to_uint8(frames), self.scale).cpu().numpy()
        if self._stream is None:
            self._open_stream(pixels.shape[1:])
        if pixels.shape[1:] != self._frame_shape:
            raise ValueError(f"frames of {pixels.shape[1:]} do not fit {self.path}, which has {self._frame_shape}")
        height, width = self._frame_shape[:2]
        padded = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for image in padded:
            frame = _to_yuv(image)
            with self._failures():
                self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def stop(self) -> None:
        """Mark the video as ended early. It then keeps its partial name when it is closed."""
        self._stopped = True

    def _open_stream(self, frame_shape: tuple[int, ...]) -> None:
        self._frame_shape = frame_shape
        self._stream = self._container.add_stream("libx264", rate=frame_rate(self.fps), options=X264)
        self._stream.height, self._stream.width = (size + size % 2 for size in frame_shape[:2])
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = load_pyav().video.reformatter.ColorRange.MPEG

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._close(failed=error is not None)
            if error is None:
                if not self.frames:
                    raise ValueError(f"no frames were written to {self.path}")
                if not self._stopped:
                    self._finish()
                    self.partial.unlink(missing_ok=True)
        finally:
            keep = self.keep_partial or self._stopped
            if not (keep and plays(self.partial)):
                self.partial.unlink(missing_ok=True)

    def _close(self, *, failed: bool) -> None:
        """Flush the encoder and close the partial file. After a failure, do as much of this as possible."""
        with suppress(UserError) if failed else nullcontext(), self._failures(), self._file:
            try:
                if self._stream is not None:
                    self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()

    def _finish(self) -> None:
        """Copy the packets into a file with the index first, so that browsers can start before all is loaded."""
        av = load_pyav()
        with (
            self._failures(),
            atomic_path(self.path) as temporary,
            av.open(f"file:{self.partial}") as part,
            av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "faststart"}) as whole,
        ):
            whole.metadata.update(self.metadata)
            stream = whole.add_stream_from_template(part.streams.video[0])
            for packet in part.demux(video=0):
                if packet.size:  # the last one, which is empty, only ends the stream
                    packet.stream = stream
                    whole.mux(packet)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn a failure to write into one UserError, and keep the partial file in this case."""
        av = load_pyav()
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self.keep_partial = True
            kept = ""
            if plays(self.partial):
                kept = f"; the frames made before are in {self.partial.name}, which can be played"
            cause = reason(self._file.error or error)
            raise UserError(
                f"cannot write {_short(self.path)}: {cause}{kept}; free space or choose another folder"
            ) from error


class _PartialFile:
    """A new file for PyAV to write to. It keeps the error of a write, which PyAV hides behind its own."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError if something has that name, also a link."""
        self.error: OSError | None = None
        self._file = path.open("xb", buffering=0)
        self.seek, self.tell, self.seekable = self._file.seek, self._file.tell, self._file.seekable

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def __enter__(self) -> _PartialFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()


def _to_yuv(image: np.ndarray) -> av.VideoFrame:
    """Turn uint8 [H W 3] into a yuv420p frame of BT.709."""
    av = load_pyav()
    colours = av.video.reformatter
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return convert_frame(
        frame, "yuv420p", dst_colorspace=colours.Colorspace.ITU709, dst_color_range=colours.ColorRange.MPEG
    )


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return the exact rate: the NTSC rate n * 1000/1001 if `fps` names one, else the nearest simple fraction."""
    ntsc = Fraction(1000 * round(fps * 1.001), 1001)
    return ntsc if abs(ntsc - fps) < NTSC_TOLERANCE else Fraction(fps).limit_denominator(1001)


def partial_paths(path: Path) -> Iterator[Path]:
    """Yield the names that an unfinished `path` may have, in the order in which they are used, without end."""
    for count in itertools.count(1):
        yield path.with_name(fit_name(path.stem, f".partial{f'-{count}' if count > 1 else ''}{path.suffix}"))


def _create_partial(path: Path) -> tuple[Path, _PartialFile]:
    """Create and open the first partial file that does not exist yet. A link that lies there is never followed."""
    for partial in partial_paths(path):
        with suppress(FileExistsError):
            return partial, _PartialFile(partial)
    raise AssertionError("the names do not end")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}..."
