"""The parts of a fleet in each replica: the cookie that brings a browser back to it, and its folder for clips.

A fleet is a group of servers behind one address (scripts/serve_fleet.py). Only the replica that made a session has its
image and its clips.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.errors import UserError
from utils.files import ensure_writable_folder
from utils.locks import folder_lock

REPLICA_COOKIE = "self_forcing_replica"
TOO_LARGE = 1009  # the WebSocket's code for it
MOST_REPLICAS = 64  # on one machine
GREETING = (
    "The server that made your video has stopped. You are connected to another one: press Start for a new video. "
    "Earlier clips are in the folder of the other server."
)


def replica_of(cookie: str) -> str | None:
    """Return the replica that a request's Cookie header names, or None."""
    try:
        found = SimpleCookie(cookie).get(REPLICA_COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value


class Sticky:
    """ASGI middleware that sets a cookie, so that the browser comes back to this replica.

    Args:
        app: the application.
        replica: the name of this replica.
        root_path: the path below which a proxy shows the site, such as "/wan".
    """

    def __init__(self, app: ASGIApp, replica: str, root_path: str = "") -> None:
        self._app, self._replica, self._path = app, replica, root_path or "/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_cookie(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message.setdefault("headers", [])
                secure = "; Secure" if scope["scheme"] in ("https", "wss") else ""
                value = f"{REPLICA_COOKIE}={self._replica}; Path={self._path}; HttpOnly; SameSite=Lax{secure}"
                MutableHeaders(scope=message).append("set-cookie", value)
            await send(message)

        known = scope["type"] == "lifespan" or replica_of(Headers(scope=scope).get("cookie", "")) == self._replica
        await self._app(scope, receive, send if known else send_with_cookie)


class SmallMessages:
    """ASGI middleware that closes a WebSocket which sends a large message. Ray's proxy itself allows 16 MB.

    Args:
        app: what is served.
        largest: bytes of a message.
    """

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self._app, self._largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_small() -> Message:
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            if max(len(message.get("text") or ""), len(message.get("bytes") or b"")) <= self._largest:
                return message
            await send({"type": "websocket.close", "code": TOO_LARGE, "reason": "the message is too large"})
            return {"type": "websocket.disconnect", "code": TOO_LARGE}

        await self._app(scope, receive_small, send)


@contextmanager
def claimed_folder(parent: Path) -> Iterator[Path]:
    """Lock a folder that no other replica of this machine uses: ``parent/HOST-0`` or the next free one.

    A replica that replaces another one gets its folder, so the number of folders does not grow.

    Raises:
        UserError: the folder cannot be written, or all folders are in use.
    """
    with ExitStack() as stack:
        for number in range(MOST_REPLICAS):
            folder = ensure_writable_folder(parent / f"{socket.gethostname()}-{number}")
            try:
                stack.enter_context(folder_lock(folder, "a replica"))
            except UserError as error:
                refused = error
            else:
                yield folder
                return
        raise refused
