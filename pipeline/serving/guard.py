"""Who may talk to the server: host names, origins and passwords, checked before anything else sees a request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "self_forcing"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
WRONG_PASSWORD_SECONDS = 0.5
# Everything comes from this server; Gradio's page needs inline scripts and eval.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        hosts: names that a request's Host header may have, so that no foreign name can be pointed at this server; None
            allows any.
        auth: "user:password", asked for in HTTP's basic scheme; a cookie then stands in for it, as browsers do not
            send it along with a WebSocket. None asks for nothing.
    """

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...] | None, auth: str | None) -> None:
        self._app, self._hosts, self._auth = app, hosts, auth
        self._cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers) or await self._check_password(headers)
        if refusal is None:
            await self._app(scope, receive, lambda message: send(self._with_headers(message)))
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            return PlainTextResponse("this server answers to its own name only\n", 403)
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return PlainTextResponse("requests from other sites are refused\n", 403)
        return None

    async def _check_password(self, headers: Headers) -> PlainTextResponse | None:
        if self._auth is None or self._knows_cookie(headers) or self._knows_password(headers):
            return None
        if "authorization" in headers:
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        return PlainTextResponse("user and password, please\n", 401, {"www-authenticate": 'Basic realm="Self Forcing"'})

    def _knows_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and secrets.compare_digest(cookie.value.encode(), self._cookie.encode())

    def _knows_password(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and secrets.compare_digest(given, self._auth.encode())

    def _with_headers(self, message: Message) -> Message:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if self._auth is not None:
                headers.append("set-cookie", f"{COOKIE}={self._cookie}; Path=/; HttpOnly; SameSite=Strict")
        return message


def _host_name(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
