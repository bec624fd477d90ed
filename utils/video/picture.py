"""Converts a decoded frame to the picture that a player shows: upright, in square pixels and in sRGB."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.video.hdr import is_hdr, tone_map
from utils.video.pyav import convert_frame, load_pyav

if TYPE_CHECKING:
    import av

MAX_PIXELS = 80_000_000  # of one image or frame: 240 MB as RGB
WIDEST_PIXEL = 10  # a pixel's width over its height, or the other way round; more is a mistake in the file
UNSPECIFIED = (0, 2)  # of the colour matrix: RGB, not known
HD_WIDTH, SD_HEIGHT = 1280, 576  # players take BT.709 for larger videos that do not say their matrix, else BT.601


def to_picture(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> Image.Image:
    """Return the frame as an upright RGB image in square pixels. Transparent parts become white.

    Args:
        frame: the decoded frame.
        pixel_aspect: width over height of a stored pixel; None or 0 if the file does not give it.
    """
    image = square_pixels(Image.fromarray(to_rgb(frame)), pixel_aspect)
    return turn(image, display_matrix(frame))


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return the stored pixels as sRGB, uint8 [H W 3]."""
    if is_hdr(frame):
        return tone_map(_converted(frame, "rgb48le"), frame.color_trc)
    if not any(component.is_alpha for component in frame.format.components):
        return _converted(frame, "rgb24")
    image = Image.fromarray(_converted(frame, "rgba"))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _converted(frame: av.VideoFrame, format: str) -> np.ndarray:
    Colorspace = load_pyav().video.reformatter.Colorspace
    matrix = None
    if frame.colorspace in UNSPECIFIED:
        is_hd = frame.width >= HD_WIDTH or frame.height > SD_HEIGHT
        matrix = Colorspace.ITU709 if is_hd else Colorspace.ITU601
    return convert_frame(frame, format, src_colorspace=matrix).to_ndarray()


def square_pixels(image: Image.Image, pixel_aspect: Fraction | None) -> Image.Image:
    """Stretch an image so that its pixels become squares. One side keeps its length and the other one grows."""
    aspect = pixel_aspect or Fraction(1)
    if aspect == 1 or not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        return image
    width, height = round(image.width * max(aspect, 1)), round(image.height / min(aspect, 1))
    if width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width}x{height} have more than {MAX_PIXELS:,} pixels")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return the container's 2 x 2 matrix from stored to shown directions, or None if it has none."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or data.buffer_size < 36:
        return None
    return np.frombuffer(data, np.int32, count=9).reshape(3, 3)[:2, :2]


def turn(image: Image.Image, matrix: np.ndarray | None) -> Image.Image:
    """Turn and mirror an image as the matrix [[a b] [c d]] says: stored (x, y) is shown at (a x + c y, b x + d y).

    Angles between are rounded to the nearest quarter turn.
    """
    if matrix is None or not matrix.any():
        return image
    (a, b), (c, d) = matrix.astype(float)
    swaps = abs(b) + abs(c) > abs(a) + abs(d)
    if swaps:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    across, down = (c, b) if swaps else (a, d)
    if across < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if down < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image
