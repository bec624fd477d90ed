"""Accounts and their passwords. Every wrong password of an address makes its next try slower."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers

from pipeline.serving.limits import MOST_KEYS

log = logging.getLogger(__name__)

COOKIE = "self_forcing"
FIRST_DELAY = 0.5  # seconds before a wrong password is answered; each further one doubles it
LONGEST_DELAY = 60.0
FORGIVEN_AFTER = 600.0  # seconds without a wrong password until the delay starts again
LOG_SECONDS = 60.0


@dataclass
class Failures:
    """Wrong passwords of one address."""

    count: int = 0
    last: float = 0.0
    """Time of the latest one in ``time.monotonic()`` seconds."""
    next_at: float = 0.0
    """Until this time no password of the address is checked."""


class Passwords:
    """Checks passwords (HTTP basic authentication), and a cookie in their place.

    The cookie is needed because browsers do not send a password with a WebSocket.

    Args:
        accounts: accounts, each written as "user:password".
        key: the key of the cookies. Servers with the same key accept the cookies of each other. None makes a new one.
    """

    def __init__(
        self, accounts: Sequence[str], *, key: bytes | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        key = secrets.token_bytes(32) if key is None else key
        self._accounts = {account.encode(): account.partition(":")[0] for account in accounts}
        self._cookies = {hmac.digest(key, account, "sha256").hex(): user for account, user in self._accounts.items()}
        self._clock = clock
        self._failures: OrderedDict[str, Failures] = OrderedDict()
        self._logged_at, self._unlogged = -LOG_SECONDS, 0

    def cookie(self, user: str) -> str:
        """Return the value of the cookie that proves that a request comes from this user."""
        return next(token for token, owner in self._cookies.items() if owner == user)

    def user_of_cookie(self, headers: Headers) -> str | None:
        """Return the user that the request's cookie proves, or None."""
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return None
        return None if cookie is None else _find(self._cookies, cookie.value)

    def wait(self, address: str) -> float:
        """Return the seconds until the next password of this address is checked."""
        failures = self._failures.get(address)
        return 0.0 if failures is None else max(0.0, failures.next_at - self._clock())

    def user_of_password(self, headers: Headers, address: str) -> str | None:
        """Return the user that the request's password proves, or None. A wrong password makes the address wait."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(value, validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            given = b""
        user = _find(self._accounts, given)
        if user is None and "authorization" in headers:
            self._failed(address)
        elif user is not None:
            self._failures.pop(address, None)
        return user

    def _failed(self, address: str) -> None:
        now = self._clock()
        failures = self._failures.pop(address, None)
        if failures is None or now - failures.last > FORGIVEN_AFTER:
            failures = Failures()
        failures.count += 1
        failures.last = now
        failures.next_at = now + min(FIRST_DELAY * 2 ** min(failures.count - 1, 20), LONGEST_DELAY)
        self._failures[address] = failures
        while len(self._failures) > MOST_KEYS:
            self._failures.popitem(last=False)
        self._log(address, failures.count, now)

    def _log(self, address: str, count: int, now: float) -> None:
        self._unlogged += 1
        if now - self._logged_at >= LOG_SECONDS:
            log.warning("%d wrong passwords since the last such line; the latest is number %d from %s",
                        self._unlogged, count, address)  # fmt: skip
            self._logged_at, self._unlogged = now, 0


def _find(known: dict, given: str | bytes) -> str | None:
    """Return the user whose secret was given, or None. Every secret is compared, so the time taken reveals nothing."""
    found = None
    for secret, user in known.items():
        left, right = (part if isinstance(part, bytes) else part.encode() for part in (secret, given))
        if secrets.compare_digest(left, right):
            found = user
    return found
