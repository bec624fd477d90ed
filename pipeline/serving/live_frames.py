"""Decodes the frames of a live source as JPEGs and nothing else.

Run as a program, HEIGHT WIDTH, it reads frames from its input, each after its length in bytes (u32, little endian), and
writes the pixels in the same way: RGB, row by row, or nothing for what is no such frame. ``live.py`` runs it, so that a
harmful file ends with its process.
"""

from __future__ import annotations

import io
import struct
import sys

from PIL import Image

LENGTH = struct.Struct("<I")


def frame_pixels(data: bytes, size: tuple[int, int]) -> bytes:
    """Return the RGB pixels of a JPEG of the given width and height, row by row; nothing for anything else."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.convert("RGB").tobytes() if image.size == size else b""  # the size is checked before decoding
    except Exception:  # Pillow's decoders raise whatever the bytes lead them to
        return b""


def main() -> None:
    height, width = map(int, sys.argv[1:])
    source, out = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        pixels = frame_pixels(source.read(*LENGTH.unpack(head)), (width, height))
        out.write(LENGTH.pack(len(pixels)) + pixels)
        out.flush()


if __name__ == "__main__":
    main()
