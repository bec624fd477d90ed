"""The part of a fleet that each replica has: the cookie that brings a browser back to it, and its folder for clips.

A fleet is several servers behind one address (scripts/serve_fleet.py). A session, its images and its clips live in the
replica that made them.
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
MOST_REPLICAS = 64  # on one machine
GREETING = (
    "You are on another server now, as yours has gone, and the video that it made has ended. Press Start to make one "
    "here; earlier clips stay in the folder of the other server."
)


def replica_of(cookie: str) -> str | None:
    """Return the replica that a request's Cookie header names, or None."""
    try:
        found = SimpleCookie(cookie).get(REPLICA_COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value


class Sticky:
    """ASGI middleware whose answers ask the browser to come back to this replica.

    Args:
        app: what is served.
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


@contextmanager
def claimed_folder(parent: Path) -> Iterator[Path]:
    """Hold a folder of this machine's that no other replica uses: ``parent/HOST-0`` or the next free one.

    A replica that takes the place of another gets its folder, so folders do not pile up.

    Raises:
        UserError: the folder cannot be written, or all are in use.
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
