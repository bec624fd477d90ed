"""The queue of messages to one client."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

MOST_QUEUED = 512  # messages; the pace of a stream normally keeps far fewer in the queue

Message = dict[str, Any] | bytes


class Outbox:
    """A queue that any thread may fill and that the client's connection empties.

    It has no reference to the connection. The threads that make a stream hold only the outbox, so a connection is freed
    as soon as it ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._closed = False
        self.overrun = asyncio.Event()
        """Set when the client takes its messages too slowly."""

    def put(self, message: Message) -> None:
        """Queue a message. Any thread may call this. It does nothing after :meth:`close`."""
        if not self._closed:
            with suppress(RuntimeError):  # the event loop is closed because the server is closing
                self._loop.call_soon_threadsafe(self._enqueue, message)

    async def get(self) -> Message:
        """Wait for the next message and return it."""
        return await self._queue.get()

    def close(self) -> None:
        """Drop the queued messages and all later ones."""
        self._closed = True
        self._queue = asyncio.Queue()

    def _enqueue(self, message: Message) -> None:
        if self._closed:
            return
        if self._queue.qsize() >= MOST_QUEUED:
            self.overrun.set()
        else:
            self._queue.put_nowait(message)
