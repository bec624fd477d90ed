"""Checks whether a video file is complete, without decoding it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.video.file import open_video

HEADER = 8  # bytes: size and kind of a box (ISO/IEC 14496-12)
LARGE_SIZE = 8  # bytes that follow the header if its size is 1


def is_complete(path: str | Path) -> bool:
    """Return whether a file is a complete video.

    The boxes of an mp4 must fill the file exactly and contain an index. A file of another format must open as a video.
    """
    try:
        with open(path, "rb") as file:
            kinds = _box_kinds(file)
        if kinds is not None:
            return b"moov" in kinds
        with open_video(path):
            return True
    except (OSError, struct.error, UserError):
        return False


def _box_kinds(file: BinaryIO) -> set[bytes] | None:
    """Return the kinds of an mp4's boxes. Empty if they do not fill the file, None if it is not an mp4."""
    size = file.seek(0, 2)
    kinds: set[bytes] = set()
    position = 0
    while position < size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(HEADER))
        if position == 0 and kind != b"ftyp":
            return None
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(LARGE_SIZE))
        elif length == 0:  # up to the end of the file
            length = size - position
        if length < HEADER:
            return set()
        kinds.add(kind)
        position += length
    return kinds if position == size else set()
