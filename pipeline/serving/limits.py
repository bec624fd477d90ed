"""How much one visitor, and all visitors together, may ask of the server. Every limit of the server is here.

A visitor is an address: one IPv4 address, or one /64 network of IPv6, which is what a household gets. If the server has
several accounts (``--auth`` given more than once), a visitor is an account.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

MOST_KEYS = 4096  # addresses whose rates are remembered; the one unused for the longest time is forgotten
IPV6_PREFIX = 64  # bits

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Limits:
    """Limits of one server. Times are seconds."""

    connections: int = 400
    """Open connections in all; fewer if the process may open few files."""
    connections_each: int = 64
    """Open connections of one address."""
    new_connections: float = 200.0
    """Connections that one address may open a second, in the long run."""
    files_kept_free: int = 160
    """Open files that connections never take: weights, clips, child processes."""
    head: float = 10.0
    """From the start of a request to its end. A body gets more time, see ``body_rate``."""
    idle: float = 30.0
    """Between two requests of a connection, and without progress in sending an answer."""
    body_rate: float = 64 * 1024
    """Bytes a second at which a body has to arrive on average, after the first ``head`` seconds."""
    requests: float = 40.0
    """Requests of one visitor a second, in the long run."""
    health_checks: float = 200.0
    """Requests for /healthz of one address a second; they do not count as other requests."""
    requests_at_once: int = 8
    """Requests of one visitor that are answered at the same time; the others wait."""
    answer_bytes: int = 256 * 1024
    """Bytes of answers that count as one more request."""
    longest_wait: float = 5.0
    """A request that would have to wait longer is refused."""
    messages: float = 200.0
    """WebSocket messages of one visitor a second, in the long run."""
    message_bytes: float = 64 * 1024
    """Bytes of WebSocket messages of one address a second, in the long run."""
    starts: float = 2.0
    """Streams that one visitor may start a second, in the long run."""
    starts_at_once: int = 60
    """Streams that one visitor may start without a pause before that counts."""
    precisions: float = 2 / 60
    """Changes of the precision by one visitor a second: each loads the model again."""
    sessions: int = 512
    """Sessions that are remembered."""
    sessions_each: int = 64
    """Sessions of one visitor that are remembered."""
    image_bytes: int = 256 * 2**20
    """First-frame images kept in memory, in all."""
    uploads: int = 8
    """Uploads that are received or decoded at the same time; more are refused."""
    uploads_each: int = 2
    """The same, of one visitor."""
    decoders: int = 2
    """Images decoded at the same time, each in a process of its own."""
    clips: int = 200
    """Clips kept in the clips folder, those of earlier runs included."""
    gifs_waiting: int = 8
    """GIFs that are asked for and not made yet; one is made at a time."""
    idle_seat: float = 600.0
    """A stream whose viewer shows no new frame for so long is stopped."""
    idle_seat_in_demand: float = 20.0
    """The same while somebody waits for a seat."""
    longest_turn: float = 600.0
    """While somebody waits for a seat, a stream that is older is stopped."""


def open_file_limit() -> int:
    """Files that this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft == resource.RLIM_INFINITY else soft


def connection_limit(limits: Limits) -> int:
    """Open connections that leave enough files for everything else."""
    return max(min(limits.connections, open_file_limit() - limits.files_kept_free), 16)


def visitor_of(address: str) -> str:
    """The address, or the /64 network, that limits are counted for."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
    return str(ip)


class Rate:
    """A budget that refills at a steady rate, for each key on its own (a token bucket).

    Args:
        per_second: units that come back each second.
        burst: units that may be spent at once.
    """

    def __init__(self, per_second: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._free_at: OrderedDict[Hashable, float] = OrderedDict()  # when the whole budget is back

    def spend(self, key: Hashable, units: float = 1.0) -> float:
        """Spend from the key's budget. Returns the seconds to wait before what is paid for may be done."""
        now = self._clock()
        free_at = max(self._free_at.pop(key, now), now) + units / self._per_second
        self._free_at[key] = free_at
        while len(self._free_at) > MOST_KEYS:
            self._free_at.popitem(last=False)
        return max(0.0, free_at - now - self._burst / self._per_second)

    def try_spend(self, key: Hashable, longest_wait: float = 0.0) -> float | None:
        """As :meth:`spend` for one unit; None, and nothing is spent, if the wait would be longer than allowed."""
        wait = self.spend(key)
        if wait <= longest_wait:
            return wait
        self._free_at[key] -= 1 / self._per_second
        return None


class Count:
    """How many of something each key has at the moment, with a limit for each key and one for all."""

    def __init__(self, each: int, total: int | None = None) -> None:
        self._each, self._total = each, total
        self._counts: Counter[Hashable] = Counter()
        self._sum = 0

    @property
    def total(self) -> int:
        """The count of all keys together."""
        return self._sum

    def of(self, key: Hashable) -> int:
        """The count of one key."""
        return self._counts[key]

    def enter(self, key: Hashable) -> bool:
        """Count one more, if both limits allow it. Returns whether they do."""
        if self._counts[key] >= self._each or (self._total is not None and self._sum >= self._total):
            return False
        self._counts[key] += 1
        self._sum += 1
        return True

    def leave(self, key: Hashable) -> None:
        """Count one less."""
        self._counts[key] -= 1
        self._sum -= 1
        if not self._counts[key]:
            del self._counts[key]


def greediest(keys: Iterable[Key]) -> Key:
    """The key that occurs most often; of several the one that occurs first."""
    return Counter(keys).most_common(1)[0][0]
