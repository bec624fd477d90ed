"""Limits of open connections: how many there may be, and how long they may be idle. uvicorn has no such limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from pipeline.serving.limits import Count, Limits, Rate, connection_limit, greediest, visitor_of

SWEEP_SECONDS = 1.0
CLOSING_SECONDS = 5.0  # after this time, a closing connection whose client takes nothing is cut off
REFUSED_SECONDS = 1.0  # the same for a refused connection
MOST_REFUSED = 64  # connections that get a refusal at the same time; more are cut off without an answer
LARGEST_REQUEST = 64 * 2**20  # bytes; larger than any route accepts, so that the route can send its own error
WEBSOCKET_BURST = 2 * 2**20  # bytes
BUSY = b"too many connections: try again later\n"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\n" + (
    b"content-type: text/plain\r\ncontent-length: %d\r\n\r\n%s" % (len(BUSY), BUSY)
)


class Door:
    """Counts connections, and closes those that are idle or too slow.

    Args:
        limits: the limits of numbers and times.
        is_proxy: returns whether an address is a proxy. Connections through a proxy come from many visitors, so they
            are not counted for one visitor.
    """

    def __init__(self, limits: Limits, is_proxy: Callable[[str], bool] = lambda address: False) -> None:
        self.limits = limits
        self._message_bytes = Rate(limits.message_bytes, WEBSOCKET_BURST)
        self._is_proxy = is_proxy
        self._total = connection_limit(limits)
        self._counts = Count(limits.connections_each)
        self._proxied = self._refused = 0
        self._rate = Rate(limits.new_connections, 3 * limits.new_connections)
        self._watched: set[TimedHTTP | TimedWebSocket] = set()  # admitted ones and ones that are being refused
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return self._counts.total + self._proxied

    def protocols(self) -> dict[str, Callable]:
        """Return the options ``http`` and ``ws`` of ``uvicorn.Config``."""
        return {"http": partial(TimedHTTP, self), "ws": partial(TimedWebSocket, self)}

    def enter(self, address: str) -> bool:
        """Count a new connection. Return False if there are too many.

        If there are too many, an idle connection (one that has not sent a whole request) is closed to make room. It
        belongs to the same visitor if that visitor has reached its limit, else to the visitor with the most idle
        connections.
        """
        if self._is_proxy(address):
            if self.connections >= self._total:
                return False
            self._proxied += 1
            return True
        visitor = visitor_of(address)
        if self._rate.try_spend(visitor) is None:
            return False
        if self.connections < self._total and self._counts.enter(visitor):
            return True
        idle = [connection for connection in self._watched if connection.idle_since is not None]
        if self._counts.of(visitor) >= self.limits.connections_each:
            _close_oldest(idle, visitor)
        elif self.connections >= self._total and idle:
            _close_oldest(idle, greediest(connection.visitor for connection in idle))
        return self.connections < self._total and self._counts.enter(visitor)

    def leave(self, address: str) -> None:
        """Stop counting an admitted connection that has ended."""
        if self._is_proxy(address):
            self._proxied -= 1
        else:
            self._counts.leave(visitor_of(address))

    def pay_for_bytes(self, connection: TimedWebSocket, address: str, count: int) -> float:
        """Spend `count` bytes of the budget of a WebSocket's address. Return the seconds to wait before reading them.

        All connections of one address share a budget. Each connection through a proxy has its own.
        """
        return self._message_bytes.spend(connection if self._is_proxy(address) else visitor_of(address), count)

    def refuse(self) -> bool:
        """Return whether a refused connection may get an answer. If so, call :meth:`refused` when it has ended."""
        if self._refused >= MOST_REFUSED:
            return False
        self._refused += 1
        return True

    def refused(self) -> None:
        """Stop counting a refused connection that has ended."""
        self._refused -= 1

    def watch(self, connection: TimedHTTP | TimedWebSocket) -> None:
        """Check a connection every second from now on."""
        self._watched.add(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def forget(self, connection: TimedHTTP | TimedWebSocket) -> None:
        """Stop checking a connection."""
        self._watched.discard(connection)

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._watched):
            if connection.overdue(now):
                connection.transport.abort()
        self._sweeper = None
        if self._watched:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)


def _close_oldest(idle: list[TimedHTTP], visitor: str) -> None:
    """Close the visitor's connection that has been idle for the longest time, if there is one."""
    own = [connection for connection in idle if connection.visitor == visitor]
    if own:
        min(own, key=lambda connection: connection.idle_since).give_way()


class _Stalls:
    """Remembers since when a client takes no data and since when its connection is closing. A mixin for uvicorn."""

    transport: asyncio.Transport
    _stalled_since: float | None = None
    _closing_since: float | None = None

    def pause_writing(self) -> None:
        self._stalled_since = time.monotonic()
        super().pause_writing()  # type: ignore[misc]

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()  # type: ignore[misc]

    def _stuck(self, now: float, limits: Limits) -> bool:
        if self._stalled_since is not None and now - self._stalled_since > limits.idle:
            return True
        if not self.transport.is_closing():
            return False
        self._closing_since = self._closing_since or now
        return now - self._closing_since > CLOSING_SECONDS


class TimedHTTP(_Stalls, H11Protocol):
    """An HTTP connection whose client must send each request within a time limit."""

    def __init__(self, door: Door, **options) -> None:
        super().__init__(**options)
        self._door = door
        self._let_in = self._saying_no = self._passed_on = False
        self._waiting_since = time.monotonic()  # waiting for the first byte of a request
        self._request_since: float | None = None
        self._answered = False  # whether an earlier request was answered
        self._received = 0  # bytes of the current request

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.visitor = visitor_of(self._address)
        self._let_in = self._door.enter(self._address)
        self._door.watch(self)
        if self._let_in:
            return
        self._saying_no = self._door.refuse()
        if self._saying_no:
            transport.write(REFUSAL)
            if transport.can_write_eof():
                transport.write_eof()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._door.forget(self)
        if self._saying_no:
            self._door.refused()
        self.give_up_place()

    @property
    def idle_since(self) -> float | None:
        """Time since when it waits for a whole request; None while it has one, and after :meth:`give_way`."""
        if not self._let_in or self._passed_on or self.conn.their_state is not h11.IDLE:
            return None
        return self._request_since or self._waiting_since

    def give_way(self) -> None:
        """Close at once, to make room for another connection."""
        self.give_up_place()
        self.transport.abort()

    def give_up_place(self) -> None:
        """Stop being counted."""
        if self._let_in and not self._passed_on:
            self._let_in = False
            self._door.leave(self._address)

    def data_received(self, data: bytes) -> None:
        if not self._let_in:
            return
        if self._request_since is None:
            self._request_since = time.monotonic()
        self._received += len(data)
        if self._received > LARGEST_REQUEST:
            self.transport.abort()
            return
        super().data_received(data)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._passed_on = True  # TimedWebSocket counts it from here on
        self._door.forget(self)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        self._waiting_since, self._request_since = time.monotonic(), None
        self._answered, self._received = True, 0
        super().on_response_complete()

    def overdue(self, now: float) -> bool:
        """Return whether the connection has exceeded a time limit."""
        limits = self._door.limits
        if not self._let_in:
            return now - self._waiting_since > REFUSED_SECONDS
        if self._stuck(now, limits):
            return True
        if self._request_since is None:
            return now - self._waiting_since > (limits.idle if self._answered else limits.head)
        if self.conn.their_state is h11.SEND_BODY:
            return now - self._request_since > limits.head + self._received / limits.body_rate
        return self.conn.their_state is h11.IDLE and now - self._request_since > limits.head


class TimedWebSocket(_Stalls, WebSocketsSansIOProtocol):
    """A WebSocket with a limit of received bytes a second. Bytes above the limit are read later."""

    def __init__(self, door: Door, **options) -> None:
        super().__init__(**options)
        self._door = door
        self._held: list[bytes] = []

    idle_since = None  # never idle: the pings of the protocol show whether the client is there

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.visitor = visitor_of(self._address)
        self._door.watch(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._door.forget(self)
        self._door.leave(self._address)
        self._held.clear()

    def data_received(self, data: bytes) -> None:
        wait = self._door.pay_for_bytes(self, self._address, len(data))
        if not wait and not self._held:
            super().data_received(data)
            return
        self._held.append(data)
        self.transport.pause_reading()
        if len(self._held) == 1:
            self.loop.call_later(wait, self._go_on)

    def _go_on(self) -> None:
        held, self._held = self._held, []
        if self.disconnected or not held:
            return
        if not self.read_paused:
            self.transport.resume_reading()
        super().data_received(b"".join(held))

    def overdue(self, now: float) -> bool:
        """Return whether the connection has exceeded a time limit."""
        return self._stuck(now, self._door.limits)
