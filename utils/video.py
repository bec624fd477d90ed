"""Frames to and from files: streaming mp4, GIF, contact sheets of many clips, and images.

Shapes: F frames, H height, W width. Pixels are float in [-1, 1] as [F 3 H W] or uint8 in [0, 255] as [F H W 3].
"""

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path

BT709 = 1  # the same number names its matrix, primaries and transfer curve in H.264 (ITU-T H.273)
QUALITY = "12"  # x264's constant rate factor: visually lossless; 23, its default, smears small clips
FRAGMENTED = {"movflags": "delay_moov+default_base_moof", "frag_duration": "1000000", "flush_packets": "1"}
NTSC_TOLERANCE = 0.001  # frames per second
THUMBNAIL_HEIGHT = 144
MARGIN = 12
GAP = 3
FONT_SIZE = 16
NO_FRAMES = "it has no frames"
BACKGROUND, INK = "white", "#222222"


class VideoWriter:
    """Write an H.264 mp4 frame by frame. The file gets its name when the writer closes without an error.

    Until then `NAME.partial.mp4` grows beside it, second by second. It plays at any time, so a process that is killed
    leaves a video too. An earlier partial file is kept; the new one is then `NAME.partial-2.mp4`, and so on.
    Odd sizes are padded to even ones with copies of the last row and column, because H.264 in yuv420p needs even sizes.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
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
            metadata: tags of the mp4 such as "title" and "comment"; see :func:`read_metadata`.
            keep_partial: keep the partial file after an error if it holds frames. Otherwise an error deletes it.

        Raises:
            ValueError: `fps` or `scale` is out of range.
        """
        if fps <= 0:
            raise ValueError(f"fps={fps} must be positive")
        if scale < 1:
            raise ValueError(f"scale={scale} must be at least 1")
        self.path, self.fps, self.scale = Path(path), fps, scale
        self.metadata, self.keep_partial = dict(metadata or {}), keep_partial
        self.partial: Path | None = None
        self._stopped = False
        self._container = self._stream = self._frame_shape = None

    def __enter__(self) -> "VideoWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = _create_partial(self.path)
        self._container = av.open(str(self.partial), "w", format="mp4", options=FRAGMENTED)
        self._container.metadata.update(self.metadata)
        return self

    def write(self, frames: Tensor) -> None:
        """Append [F 3 H W] in [-1, 1] or uint8 [F H W 3]; every call with the same H and W."""
        pixels = enlarge(to_uint8(frames), self.scale).cpu().numpy()
        if self._stream is None:
            self._open_stream(pixels.shape[1:])
        if pixels.shape[1:] != self._frame_shape:
            raise ValueError(f"frames of {pixels.shape[1:]} do not fit {self.path}, which has {self._frame_shape}")
        height, width = self._frame_shape[:2]
        padded = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for image in padded:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            self._container.mux(self._stream.encode(frame))

    def stop(self) -> None:
        """Say that the video ends before its planned end: on closing it keeps its partial name."""
        self._stopped = True

    def _open_stream(self, frame_shape: tuple[int, ...]) -> None:
        self._frame_shape = frame_shape
        self._stream = self._container.add_stream("libx264", rate=frame_rate(self.fps), options={"crf": QUALITY})
        self._stream.height, self._stream.width = (size + size % 2 for size in frame_shape[:2])
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        keep = self.keep_partial or self._stopped
        try:
            self._close(failed=error is not None)
            if error is not None:
                return
            if self._stream is None:
                raise ValueError(f"no frames were written to {self.path}")
            if not self._stopped:
                self._finish()
                keep = False
        finally:
            if not (keep and self._stream is not None and self.partial.stat().st_size):
                self.partial.unlink(missing_ok=True)

    def _close(self, *, failed: bool) -> None:
        """Write what the encoder still holds and close the partial file; after a failure, as far as that goes."""
        try:
            with closing(self._container):
                if self._stream is not None:
                    self._container.mux(self._stream.encode(None))
        except (OSError, ValueError):  # a full disk gives the same error again
            if not failed:
                raise

    def _finish(self) -> None:
        """Copy the packets into a file with its index first: browsers start before all is loaded."""
        with (
            atomic_path(self.path) as temporary,
            av.open(str(self.partial)) as part,
            av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as whole,
        ):
            whole.metadata.update(self.metadata)
            stream = whole.add_stream_from_template(part.streams.video[0])
            for packet in part.demux(video=0):
                if packet.size:  # the last one, which is empty, only ends the stream
                    packet.stream = stream
                    whole.mux(packet)


def frame_rate(fps: float) -> Fraction:
    """Return the exact rate: the NTSC rate n * 1000/1001 if `fps` names one, else the nearest simple fraction."""
    ntsc = Fraction(1000 * round(fps * 1.001), 1001)
    return ntsc if abs(ntsc - fps) < NTSC_TOLERANCE else Fraction(fps).limit_denominator(1001)


def partial_paths(path: Path) -> Iterator[Path]:
    """Yield the names that an unfinished `path` may have, in the order in which they are used, without end."""
    for count in itertools.count(1):
        yield path.with_name(f"{path.stem}.partial{f'-{count}' if count > 1 else ''}{path.suffix}")


def _create_partial(path: Path) -> Path:
    """Create the first partial file that does not exist yet. A link that lies there is never followed."""
    for partial in partial_paths(path):
        try:
            partial.touch(exist_ok=False)
        except FileExistsError:
            continue
        return partial
    raise AssertionError("the names do not end")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The tags of a video file; an empty dict if the file cannot be read."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            return dict(container.metadata)
    except (OSError, ValueError):
        return {}


def to_uint8(frames: Tensor) -> Tensor:
    """[F 3 H W] in [-1, 1] (clamped) -> uint8 [F H W 3]; uint8 [F H W 3] passes unchanged."""
    if frames.ndim == 4 and frames.dtype == torch.uint8 and frames.shape[-1] == 3:
        return frames
    if frames.ndim != 4 or not frames.is_floating_point() or frames.shape[1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not float [F 3 H W] or uint8 [F H W 3]")
    levels = ((frames.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(levels, "f c h w -> f h w c")


def enlarge(frames: Tensor, scale: int) -> Tensor:
    """[F H W 3] -> [F scale*H scale*W 3], each pixel a square."""
    return frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2) if scale > 1 else frames


@contextmanager
def open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    """A video file to decode. Raises UserError if it is missing or, now or while it is read, no video."""
    try:
        with av.open(str(path)) as container:
            yield container
    except (OSError, ValueError, IndexError) as error:  # av's derive from the first two; no video stream: the last
        raise UserError(f"cannot read a video from {path}: {_reason(error)}") from error


def read_video(path: str | Path) -> Tensor:
    """All frames of a video file, uint8 [F H W 3]. Raises UserError if it is missing or not a video."""
    with open_video(path) as container:
        return _stack(container.decode(video=0))


def sample_frames(path: str | Path, count: int) -> Tensor:
    """`count` frames of a video file from the first to the last, uint8 [count H W 3]; no others are kept in memory.

    Raises UserError if it is missing or not a video.
    """
    with open_video(path) as container:
        wanted = evenly_spaced(container.streams.video[0].frames, count)
        return _stack(frame for index, frame in enumerate(container.decode(video=0)) if index in wanted)


def _stack(frames: Iterable[av.VideoFrame]) -> Tensor:
    """uint8 [F H W 3]. Raises ValueError where there are none."""
    pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames]
    if not pictures:
        raise ValueError(NO_FRAMES)
    return torch.stack(pictures)


def stream_video(path: str | Path, height: int, width: int, fps: float) -> Iterator[Tensor]:
    """Frames of a video file one by one, [1 3 H W] in [-1, 1], as many a second as asked for.

    Frames are repeated or left out to keep the speed, and fitted as by :func:`load_image`. Raises UserError if the file
    is missing or not a video.
    """
    with open_video(path) as container:
        shown = 0
        for number, frame in enumerate(container.decode(video=0)):
            seconds = number / fps if frame.time is None else frame.time - (container.start_time or 0) / 1e6
            picture = fit_image(frame.to_image(), height, width)[None]
            while shown <= seconds * fps + 1e-6:
                shown += 1
                yield picture
        if not shown:
            raise ValueError(NO_FRAMES)


def write_gif(path: str | Path, frames: Tensor, fps: float, *, scale: int = 1) -> None:
    """Write [F 3 H W] in [-1, 1] or uint8 [F H W 3] as a looping GIF (whose delays are multiples of 10 ms)."""
    if len(frames) == 0:
        raise ValueError(f"no frames to write to {path}")
    images = [Image.fromarray(image) for image in enlarge(to_uint8(frames), scale).cpu().numpy()]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
        )


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices into `count` items, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(wanted, count))})


def contact_sheet(
    clips: Sequence[Tensor], labels: Sequence[str], *, columns_frames: int = 8, scale: int | None = None
) -> Image.Image:
    """One row per clip: its label, and below it `columns_frames` frames from the first to the last.

    Clips are [F 3 H W] in [-1, 1] or uint8 [F H W 3], of any sizes. `scale` enlarges them by a whole factor; without it
    small clips grow by the factor that brings them nearest to 144 pixels in height and large ones shrink to it.
    """
    if len(clips) != len(labels) or not clips:
        raise ValueError(f"{len(clips)} clips and {len(labels)} labels: give one label for each of at least one clip")
    strips = [_strip(to_uint8(clip), columns_frames, scale) for clip in clips]
    width = max(strip.width for strip in strips)
    font = ImageFont.load_default(size=FONT_SIZE)
    texts = [_wrap(label, font, width) for label in labels]
    line_height = round(1.3 * FONT_SIZE)
    heights = [line_height * len(text) + strip.height + 2 * GAP for text, strip in zip(texts, strips, strict=True)]
    sheet = Image.new("RGB", (width + 2 * MARGIN, sum(heights) + MARGIN * (len(clips) + 1)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for text, strip, height in zip(texts, strips, heights, strict=True):
        for line_number, line in enumerate(text):
            draw.text((MARGIN, y + line_number * line_height), line, fill=INK, font=font)
        sheet.paste(strip, (MARGIN, y + line_height * len(text) + 2 * GAP))
        y += height + MARGIN
    return sheet


def save_contact_sheet(
    path: str | Path,
    clips: Sequence[Tensor],
    labels: Sequence[str],
    *,
    columns_frames: int = 8,
    scale: int | None = None,
) -> None:
    """Write the `contact_sheet` of the clips; the suffix of `path` names the format, .png as a rule."""
    sheet = contact_sheet(clips, labels, columns_frames=columns_frames, scale=scale)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def load_image(path: str | Path, height: int, width: int) -> Tensor:
    """An image file as [3 H W] in [-1, 1], upright by its EXIF data.

    It is scaled to cover H x W and cropped around the centre; transparent parts become white. Raises UserError if the
    file is missing or not an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # broken PNGs: SyntaxError
        raise UserError(f"cannot read an image from {path}: {_reason(error)}") from error
    return fit_image(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), height, width)


def fit_image(image: Image.Image, height: int, width: int) -> Tensor:
    """An RGB image scaled to cover H x W and cropped around the centre, [3 H W] in [-1, 1]."""
    pixels = np.array(ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, "h w c -> c h w")


def _strip(frames: Tensor, count: int, scale: int | None) -> Image.Image:
    """uint8 [F H W 3] -> `count` of its frames side by side."""
    frames = frames[evenly_spaced(len(frames), count)]
    height, width = frames.shape[1:3]
    scale = max(1, round(THUMBNAIL_HEIGHT / height)) if scale is None else scale
    images = [Image.fromarray(image) for image in enlarge(frames, scale).cpu().numpy()]
    if scale == 1 and height > THUMBNAIL_HEIGHT:
        size = (round(width * THUMBNAIL_HEIGHT / height), THUMBNAIL_HEIGHT)
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    strip = Image.new("RGB", (len(images) * (images[0].width + GAP) - GAP, images[0].height), BACKGROUND)
    for i, image in enumerate(images):
        strip.paste(image, (i * (image.width + GAP), 0))
    return strip


def _wrap(label: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The label in lines of at most `width` pixels."""
    text = " ".join(label.split())
    characters = len(text)
    while characters > 1:
        lines = textwrap.wrap(text, characters)
        if max(font.getlength(line) for line in lines) <= width:
            return lines
        characters = min(characters - 1, int(characters * 0.95))
    return [text]


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
