"""Frames as binary messages, one frame a message. Small frames are sent as raw RGB pixels, larger ones as JPEG.

The header is little endian: format u8 (0 RGB, 1 JPEG), three bytes of zero, stream u32, frame u32, chunk u32,
width u16, height u16, and f64 for the time at which the chunk was ready, in seconds since 1970. The pixels follow.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<B3xIIIHHd")
RAW, JPEG = 0, 1
MOST_RAW_PIXELS = 128 * 128  # a Shapes frame has 7 kB of raw pixels; JPEG would blur it and save nothing
JPEG_QUALITY = 90


def frame_messages(frames: Tensor, *, stream: int, first_frame: int, chunk: int, ready: float) -> Iterator[bytes]:
    """Yield one message for each frame.

    Args:
        frames: uint8 [F H W 3] on the CPU.
        stream: number of the stream.
        first_frame: number of the first of these frames in the stream.
        chunk: number of their chunk.
        ready: time at which the chunk was ready, in seconds since 1970.
    """
    height, width = frames.shape[1:3]
    raw = height * width <= MOST_RAW_PIXELS
    for number, pixels in enumerate(frames.contiguous().numpy(), start=first_frame):
        header = HEADER.pack(RAW if raw else JPEG, stream, number, chunk, width, height, ready)
        if raw:
            yield header + pixels.tobytes()
            continue
        buffer = io.BytesIO()
        buffer.write(header)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        yield buffer.getvalue()
