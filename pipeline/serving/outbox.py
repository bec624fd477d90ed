"""Messages on their way to one client."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

MOST_QUEUED = 512  # messages; pacing keeps them far fewer

Message = dict[str, Any] | bytes


class Outbox:
    """A queue that any thread fills and the client's connection empties.

    It knows nothing of the connection: the threads that make a stream hold the outbox only, so a connection is freed
    as soon as it ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._closed = False
        self.overrun = asyncio.Event()
        """Set when the client takes its messages too slowly."""

    def put(self, message: Message) -> None:
        """Queue a message; from any thread. Nothing happens after :meth:`close`."""
        if not self._closed:
            with suppress(RuntimeError):  # the server is closing and its loop with it
                self._loop.call_soon_threadsafe(self._enqueue, message)

    async def get(self) -> Message:
        """The next message."""
        return await self._queue.get()

    def close(self) -> None:
        """Forget what is queued and what will come."""
        self._closed = True
        self._queue = asyncio.Queue()

    def _enqueue(self, message: Message) -> None:
        if self._closed:
            return
        if self._queue.qsize() >= MOST_QUEUED:
            self.overrun.set()
        else:
            self._queue.put_nowait(message)
