"""Uploaded first frames: decoded as images and nothing else, within limits, and written anew."""

from __future__ import annotations

import io

from utils.errors import UserError

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
LONGEST_SIDE = 1280  # what is kept
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def clean_image(data: bytes) -> tuple[bytes, int, int]:
    """A PNG of the image, upright and at most 1280 pixels long, with its width and height.

    Raises:
        UserError: what is not such an image, or has more pixels or bytes than are decoded.
    """
    from PIL import Image, ImageOps

    if len(data) > MOST_BYTES:
        raise UserError(f"the image has more than {MOST_BYTES >> 20} MB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            width, height = file.size  # from the header: nothing is decoded yet
            if width * height > MOST_PIXELS:
                raise UserError(f"the image has more than {MOST_PIXELS:,} pixels")
            file.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except Image.DecompressionBombError as error:  # Pillow's own, higher limit
        raise UserError(f"the image has more than {MOST_PIXELS:,} pixels") from error
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
        raise UserError("this is not a PNG, JPEG, WebP, GIF or BMP image") from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), *image.size
