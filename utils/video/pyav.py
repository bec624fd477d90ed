"""The access to PyAV: it is imported when a video is opened, its errors become one line, and conversion is exact."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import av


def load_pyav() -> ModuleType:
    """Import PyAV. Raises UserError with the remedy if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need PyAV, which cannot be imported ({error}); run: pip install av") from error
    return av


def reason(error: Exception) -> str:
    """Return the first line of what went wrong, without PyAV's numbers."""
    av = load_pyav()
    if isinstance(error, av.error.InvalidDataError | av.error.ArgumentError | av.error.EOFError):
        return "it is damaged or not a video"
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text.splitlines()[0]


def convert_frame(frame: av.VideoFrame, format: str, **colours: Any) -> av.VideoFrame:
    """Convert a frame to another pixel format; `colours` are the arguments of that name of `VideoFrame.reformat`.

    The result is the same on every CPU: without ACCURATE_RND, swscale rounds differently with and without vector
    instructions. Colour of half the resolution is averaged over its 2 x 2 pixels on the way in and repeated on the way
    out, without a bias: this loses the least, also of enlarged pixels (60 dB instead of 48 for squares of 2 x 2).
    """
    Flags = load_pyav().video.reformatter.Interpolation
    exact = Flags.ACCURATE_RND | Flags.BITEXACT | Flags.FULL_CHR_H_INT | Flags.FULL_CHR_H_INP
    method = Flags.AREA if frame.format.is_rgb else Flags.POINT
    return frame.reformat(format=format, interpolation=method | exact, threads=1, **colours)
