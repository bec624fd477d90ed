"""Uploaded first frames: decoded as images and nothing else, within limits, and written anew.

Run as a program, it reads an image from its input and writes a PNG to its output; ``workers.py`` runs it like this, so
that an image that takes too much memory or time ends with its process. For the same reason it imports little.
"""

from __future__ import annotations

import io
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
LONGEST_SIDE = 1280  # pixels of what is kept
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SIZE = struct.Struct("<II")  # width and height, before the PNG
REFUSED = 2  # exit code for an image that is refused, with the reason on stderr


class Refused(ValueError):
    """The upload is not taken; the message says why."""


def clean_image(data: bytes) -> tuple[bytes, int, int]:
    """A PNG of the image, upright and at most 1280 pixels long, with its width and height.

    Raises:
        Refused: what is not such an image, or has more pixels than are decoded.
    """
    from PIL import Image, ImageOps

    too_many = f"the image has more than {MOST_PIXELS // 10**6} megapixels; make it smaller"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:  # from the header: nothing is decoded yet
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
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
        raise Refused("this is not a PNG, JPEG, WebP, GIF or BMP image") from error
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), *image.size


def _scalable(image: Image.Image) -> Image.Image:
    """The image with eight bits a channel and without a palette, which has no colours in between."""
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
