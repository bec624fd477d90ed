"""Clean uploaded first frames: decode them as images only, within limits, and write them as new PNG files.

As a program, this module reads an image from its input and writes a PNG to its output. ``workers.py`` runs it as a
program, so that an image that takes too much memory or time ends only that process. It imports little, to start fast.
"""

from __future__ import annotations

import io
import struct
import sys
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
LONGEST_SIDE = 1280  # pixels of the image that is kept
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SIZE = struct.Struct("<II")  # width and height, before the PNG
REFUSED = 2  # exit code if the image is refused; the reason is on stderr


class Refused(ValueError):
    """The upload is refused. The message says why."""


def clean_image(data: bytes) -> tuple[bytes, int, int]:
    """Return the image as a PNG, upright and with sides of at most 1280 pixels, and its width and height.

    Raises:
        Refused: the data are no image of a known format, or the image has too many pixels.
    """
    too_many = f"the image has more than {MOST_PIXELS // 10**6} megapixels; make it smaller"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:  # the header says so; nothing is decoded yet
                raise Refused(too_many)
            file.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
            file.load()
            image = _scalable(file)
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # before any further copy
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError as error:  # Pillow's own, higher limit
        raise Refused(too_many) from error
    except Refused:
        raise
    except MemoryError as error:
        raise Refused("the image needs too much memory; make it smaller") from error
    except Exception as error:  # Pillow's decoders can raise any error on damaged data
        raise Refused("this is not a PNG, JPEG, WebP, GIF or BMP image") from error
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), *image.size


def _scalable(image: Image.Image) -> Image.Image:
    """Return the image with eight bits per channel and without a palette, because a palette cannot be interpolated."""
    if image.mode in ("P", "PA", "1"):
        return image.convert("RGBA")
    if image.mode.startswith("I"):  # 16 bits
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    return image


def main() -> int:
    try:
        png, width, height = clean_image(sys.stdin.buffer.read())
    except Refused as error:
        sys.stderr.write(str(error))
        return REFUSED
    sys.stdout.buffer.write(SIZE.pack(width, height) + png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
