"""Small pictures of clips to look at: GIFs, and contact sheets with a row of frames for each clip.

Shapes: F frames, H height, W width. Clips are float [F 3 H W] in [-1, 1] or uint8 [F H W 3] in [0, 255].
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import atomic_path
from utils.frames import enlarge, to_uint8
from utils.spacing import evenly_spaced

THUMBNAIL_HEIGHT = 144
MARGIN = 12
GAP = 3
FONT_SIZE = 16
BACKGROUND, INK = "white", "#222222"


def contact_sheet(
    clips: Sequence[Tensor], labels: Sequence[str], *, columns_frames: int = 8, scale: int | None = None
) -> Image.Image:
    """Draw one row for each clip: its label, and below it `columns_frames` frames from the first to the last.

    The clips may have different sizes. `scale` enlarges them by a whole factor. Without it, small clips are enlarged by
    the whole factor that makes them nearest to 144 pixels high, and large ones are shrunk to that height.
    """
    if len(clips) != len(labels) or not clips:
        raise ValueError(
            f"{len(clips)} clips and {len(labels)} labels: give at least one clip, and one label for each clip"
        )
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
    """Write the :func:`contact_sheet` of the clips. The suffix of `path` names the format, usually .png."""
    sheet = contact_sheet(clips, labels, columns_frames=columns_frames, scale=scale)
    with atomic_path(path) as temporary:
        sheet.save(temporary, compress_level=3)  # PNG: a third of the time of the default, and 5% more bytes


def _strip(frames: Tensor, count: int, scale: int | None) -> Image.Image:
    """Put `count` of the frames, uint8 [F H W 3], side by side."""
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
    """Break the label into lines of at most `width` pixels."""
    text = " ".join(label.split())
    characters = len(text)
    while characters > 1:
        lines = textwrap.wrap(text, characters)
        if max(font.getlength(line) for line in lines) <= width:
            return lines
        characters = min(characters - 1, int(characters * 0.95))
    return [text]
