"""Check host names, origins, passwords and rates of every request before anything else handles it."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.limits import Count, Limits, Rate, visitor_of
from pipeline.serving.passwords import COOKIE, Passwords

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEALTH = "/healthz"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# The page loads everything from this server. Gradio's page needs inline scripts and eval.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server, as the command line says it."""

    hosts: tuple[str, ...] | None
    """Names that the Host header of a request may hold. None allows any name. This stops DNS rebinding: another
    site's name that points to this server is refused."""
    origins: tuple[str, ...] = ()
    """Further host names whose pages may use this server, such as the name of a proxy that changes Host."""
    accounts: tuple[str, ...] = ()
    """Accounts, each written as "user:password". Without accounts no password is needed."""
    root_path: str = ""
    """Path below which a proxy shows the server, such as "/wan". It is removed from requests that still have it."""
    cookie_key: bytes | None = None
    """The key of the cookies of signed-in visitors. The servers of a fleet share it. None makes a new one."""


class Guard:
    """ASGI middleware that refuses requests without permission and delays visitors who send too many.

    It stores the visitor in ``scope["state"]["visitor"]``; see ``limits.visitor_of``.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._passwords = Passwords(access.accounts, key=access.cookie_key) if access.accounts else None
        self._requests = Rate(limits.requests, 10 * limits.requests)
        self._health_checks = Rate(limits.health_checks, limits.health_checks)
        self._websockets = Count(limits.connections_each)
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._using_slots = Count(2**31)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = visitor_of(scope["client"][0]) if scope["client"] else ""
        user = None
        refusal = self._foreign(scope, headers) or await self._too_often(scope, address)
        if refusal is None and self._passwords is not None:
            user, refusal = await self._sign_in(headers, address)
        refusal = refusal or self._take_off_root(scope)
        if refusal is not None:
            await self._refuse(refusal, scope, receive, send)
            return
        visitor = user if user is not None and len(self._access.accounts) > 1 else address
        scope.setdefault("state", {})["visitor"] = visitor
        if scope["type"] == "websocket":
            await self._pass_websocket(visitor, scope, receive, send)
        else:
            await self._pass_request(visitor, scope, receive, self._with_headers(scope, send, user))

    async def _pass_websocket(self, visitor: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._websockets.enter(visitor):
            await send({"type": "websocket.close", "code": 1013})
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._websockets.leave(visitor)

    async def _pass_request(self, visitor: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a few requests of a visitor at the same time, and count a large answer as several requests."""

        async def pay_and_send(message: Message) -> None:
            wait = self._requests.spend(visitor, len(message.get("body", b"")) / self._limits.answer_bytes)
            if wait:
                await asyncio.sleep(wait)
            await send(message)

        if scope["path"] == HEALTH:  # a health check must not wait behind other requests
            await self._app(scope, receive, send)
            return
        slot = self._slots.setdefault(visitor, asyncio.Semaphore(self._limits.requests_at_once))
        self._using_slots.enter(visitor)
        try:
            async with slot:
                await self._app(scope, receive, pay_and_send)
        finally:
            self._using_slots.leave(visitor)
            if not self._using_slots.of(visitor):
                del self._slots[visitor]

    def _foreign(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the refusal of a request that another site sent or that names another host; None if it is allowed."""
        access, host = self._access, headers.get("host", "")
        if access.hosts is not None and host_name(host) not in access.hosts:
            return PlainTextResponse(
                "this host name is not allowed; the server's option --allowed-host allows it\n", 403
            )
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and origin is not None and not self._is_own(origin, host):
            return PlainTextResponse("this site is not allowed; the server's option --allowed-host allows it\n", 403)
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
            return parts.netloc.lower() == host.lower() or (parts.hostname or "") in self._access.origins
        except ValueError:
            return False

    async def _too_often(self, scope: Scope, address: str) -> Response | None:
        rate = self._health_checks if scope["path"].endswith(HEALTH) else self._requests
        wait = rate.try_spend(address, self._limits.longest_wait)
        if wait is None:
            return PlainTextResponse("too many requests; try again in a few seconds\n", 429, {"retry-after": "5"})
        if wait:
            await asyncio.sleep(wait)
        return None

    async def _sign_in(self, headers: Headers, address: str) -> tuple[str | None, Response | None]:
        """Return the user or the refusal."""
        passwords = self._passwords
        user = passwords.user_of_cookie(headers)
        if user is not None:
            return user, None
        if "authorization" in headers:
            wait = passwords.wait(address)
            if wait:
                text = "too many wrong passwords; wait and try again\n"
                return None, PlainTextResponse(text, 429, {"retry-after": str(int(wait) + 1)})
            user = passwords.user_of_password(headers, address)
            if user is not None:
                return user, None
            await asyncio.sleep(min(passwords.wait(address), self._limits.longest_wait))
        ask = {"www-authenticate": 'Basic realm="Self Forcing"'}
        return None, PlainTextResponse("this server needs a user name and a password\n", 401, ask)

    def _take_off_root(self, scope: Scope) -> Response | None:
        """Remove the root path if the request has it. Redirect the root path without its last slash."""
        root, path = self._access.root_path, scope["path"]
        if not root or (path != root and not path.startswith(f"{root}/")):
            return None
        if path == root:
            return RedirectResponse(f"{root}/")
        scope["path"] = path[len(root) :]
        raw = scope.get("raw_path")
        if raw is not None and raw.startswith(f"{root}/".encode()):
            scope["raw_path"] = raw[len(root) :]
        return None

    async def _refuse(self, refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _with_headers(self, scope: Scope, send: Send, user: str | None) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if user is not None:
                    secure = "; Secure" if scope["scheme"] == "https" else ""
                    value = f"{COOKIE}={self._passwords.cookie(user)}; Path={self._access.root_path or '/'}"
                    headers.append("set-cookie", f"{value}; HttpOnly; SameSite=Strict{secure}")
            await send(message)

        return send_with_headers


def proxy_check(proxies: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether an address is one of these proxies (addresses or networks)."""
    networks = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]

    def is_proxy(address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in networks)

    return is_proxy


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
