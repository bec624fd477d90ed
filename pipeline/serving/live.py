"""A camera, a screen or a video of a client as the source of its stream: frames come over the WebSocket.

A frame is one binary message, little endian: format u8 (0 RGB, 1 JPEG), three bytes of zero, stream u32, and then a
picture of the stream's height and width.
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress

from pipeline.serving.frames import JPEG, RAW
from pipeline.serving.limits import Rate
from pipeline.serving.live_frames import LENGTH
from pipeline.serving.live_source import LiveSource
from pipeline.serving.workers import limited_child
from utils.errors import UserError

HEADER = struct.Struct("<B3xI")
MOST_FRAME_BYTES = 96 * 1024
RATE_ROOM = 1.25  # times the stream's frame rate; frames above that are dropped
DECODE_SECONDS = 5.0  # for one frame on a busy machine
CHILD_SECONDS = 12 * 3600.0  # of computing


class Feed:
    """Takes the binary messages of one client and passes their frames to the source of its stream.

    Args:
        fps: frames per second of the stream.
    """

    def __init__(self, source: LiveSource, fps: float) -> None:
        self.source = source
        self._rate = Rate(RATE_ROOM * fps, RATE_ROOM * fps)
        self._child: asyncio.subprocess.Process | None = None

    async def take(self, kind: int, data: bytes) -> None:
        """Pass a frame on. More frames than the stream shows are dropped.

        Raises:
            UserError: it is no frame of the stream's size.
        """
        if self._rate.try_spend("frames") is None:
            return
        pixels = data if kind == RAW else await self._decoded(data) if kind == JPEG else b""
        if len(pixels) != 3 * self.source.height * self.source.width:
            size = f"{self.source.width} x {self.source.height}"
            raise UserError(f"a frame of the source is not RGB or JPEG of {size} pixels; send it in this size")
        self.source.push(pixels)

    async def close(self) -> None:
        """End the source and the process that decodes it."""
        self.source.end()
        await self._end_child()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _decoded(self, data: bytes) -> bytes:
        if len(data) > MOST_FRAME_BYTES:
            raise UserError(f"a frame of the source has {len(data):,} bytes; at most {MOST_FRAME_BYTES:,} are allowed")
        if self._child is None:
            size = str(self.source.height), str(self.source.width)
            self._child = await limited_child("pipeline.serving.live_frames", *size, seconds=CHILD_SECONDS)
        try:
            return await asyncio.wait_for(self._ask(self._child, data), DECODE_SECONDS)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
            await self._end_child()
            raise UserError("a frame of the source could not be decoded; send another one") from None

    async def _ask(self, child: asyncio.subprocess.Process, data: bytes) -> bytes:
        child.stdin.write(LENGTH.pack(len(data)) + data)
        await child.stdin.drain()
        (length,) = LENGTH.unpack(await child.stdout.readexactly(LENGTH.size))
        return await child.stdout.readexactly(length)
